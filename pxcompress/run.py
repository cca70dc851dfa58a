"""The context of one run: its recipe with the methods it names, its data by role, and its clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from pxcompress.budgets import BUDGETS
from pxcompress.clock import Clock
from pxcompress.notes import silent
from pxcompress.passes.moments import MomentCache
from pxcompress.recipe import Recipe
from pxcompress.repair import REPAIRS
from pxcompress.tasks.task import Task
from pxcompress.types import Batches, Budget, Repair


@dataclass(frozen=True, eq=False)
class Run:
    """What all stages of a run share: recipe, data by role, clock and task.

    `parts` are this process's batches for the roles "score" and "repair"; with "select" as well, quality is measured
    after every stage that changes the model. Choices are made on "select", or on "held-out". The `task` says what
    outputs mean; without one they are compared as they are.
    """

    recipe: Recipe
    parts: Mapping[str, Batches]
    clock: Clock = field(default_factory=lambda: Clock(silent))
    task: Task | None = None

    @cached_property
    def budget(self) -> Budget:
        """The recipe's budget."""
        return BUDGETS.build(self.recipe.budget)

    @cached_property
    def repairs(self) -> Mapping[str, Repair]:
        """The recipe's repairs in order, by their texts."""
        return {text: REPAIRS.build(text) for text in self.recipe.repair}

    @property
    def held_out(self) -> Batches:
        """Held-out samples, on which scores and repairs are chosen; () if there are none."""
        return self.parts.get("select", self.parts.get("held-out", ()))

    def with_moment_cache(self, role: str, model: nn.Module) -> Run:
        """A copy of this run that caches the moments (means and covariances of layer inputs) of the dense `model`.

        They are those on the samples of `role`, such as "score" or "repair".
        """
        return replace(self, parts={**self.parts, role: MomentCache(self.parts[role], model)})

    def remember_moments_of(self, model: nn.Module) -> None:
        """Make all moment caches forget the former dense model and store moments of `model` from now on."""
        for part in self.parts.values():
            if isinstance(part, MomentCache) and part.model is not model:
                part.moments.clear()
                part.model = model

    def clear_solutions(self, role: str) -> None:
        """Free what scorers computed from the cached moments of `role` and cached beside them; the moments stay."""
        part = self.parts[role]
        for each in part.moments.values() if isinstance(part, MomentCache) else ():
            each.solutions.clear()

    @property
    def short_of_samples(self) -> Mapping[str, tuple[int, int]]:
        """Layers with more input features than the score part has samples: name -> (features, samples).

        Layers that read several positions of a sample are not among them. The result is complete once the samples were
        scored.
        """
        part = self.parts["score"]
        moments_by_layer = part.moments if isinstance(part, MomentCache) else {}
        sizes = {
            name: (len(each.whole.mean), each.samples) for name, each in moments_by_layer.items() if each.one_position
        }
        return {name: size for name, size in sizes.items() if size[0] > size[1]}

    def without_progress(self) -> Run:
        """A copy that reports no progress and measures no quality between stages."""
        return replace(self, clock=Clock(silent, measures=False))
