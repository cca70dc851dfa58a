"""One run: its recipe with the methods that it names, its data by role, and its clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from pxcompress.budgets import BUDGETS
from pxcompress.clock import Clock
from pxcompress.notes import silent
from pxcompress.recipe import Recipe
from pxcompress.repair import REPAIRS
from pxcompress.scorers import SCORERS
from pxcompress.types import Batches, Budget, Repair, Scorer


@dataclass(frozen=True, eq=False)
class Run:
    """What all stages of a run have in common.

    `parts` are this process's batches of the roles "score" and "repair"; with "select" as well, top-1 is measured
    after every stage that changes the model.
    """

    recipe: Recipe
    parts: Mapping[str, Batches]
    clock: Clock = field(default_factory=lambda: Clock(silent))

    @cached_property
    def scorer(self) -> Scorer:
        """The recipe's scorer."""
        return SCORERS.build(self.recipe.scorer)

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
        """What repairs choose by; nothing where there is no select part."""
        return self.parts.get("select", ())

    def unheard(self) -> Run:
        """The same with a clock that nobody reads, and no top-1 between stages."""
        return replace(self, clock=Clock(silent, measures=False))
