"""Objectives of a search: the value of a choice as one number, from the data's score, repair and select parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import optuna
from torch import Tensor, nn

from pxcompress.deploy.predictions import torch_quality
from pxcompress.graph import mask_units
from pxcompress.passes.moments import MomentCache
from pxcompress.planning.order import find_lowest
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.stages import cut, plan_at, price_groups, unit_scores
from pxcompress.state import seeded
from pxcompress.tasks.task import Task
from pxcompress.types import Batches, PruneResult, ScoredModel, Scores

PXP_RATES = tuple(percent / 100 for percent in range(0, 100, 5))
"""Shares of all units that are masked in turn for the objective "pxp", after "Pruning by Explaining Revisited"."""


@dataclass(frozen=True, eq=False)
class Workbench:
    """The dense model and everything that all trials of a search share, computed once."""

    scored: ScoredModel
    parts: Mapping[str, Batches]
    task: Task
    scores: dict[str, Scores] = field(default_factory=dict)

    @cached_property
    def dense(self) -> float:
        """Quality of the dense model on the select split."""
        return self.quality(self.scored.model)

    @classmethod
    def of(
        cls, model: nn.Module, example: Tensor, parts: Mapping[str, Batches], recipe: Recipe, task: Task
    ) -> Workbench:
        """Prepare a search around `recipe`; `parts` has batches for score, repair, select. Raises `BudgetError`."""
        scored = price_groups(model, example, Run(recipe, parts))
        return cls(scored, {role: MomentCache(part, model) for role, part in parts.items()}, task)

    def quality(self, model: nn.Module) -> float:
        """The metric on the select split, with its sign set so that larger is better."""
        return self.task.metric.gain(torch_quality(model, self.parts["select"], self.task, self.scored.model))

    def with_scores(self, recipe: Recipe) -> ScoredModel:
        """The dense model scored as `recipe` says; each scorer runs once. Raises `ResultError` for infinite scores."""
        if recipe.scorer not in self.scores:
            groups = self.scored.structure.groups
            run = Run(recipe, self.parts)
            self.scores[recipe.scorer] = unit_scores(self.scored.model, groups, recipe.scorers[0], run)
        return replace(self.scored, scores=self.scores[recipe.scorer])


def prune_at(bench: Workbench, recipe: Recipe) -> PruneResult:
    """The model that `run` would ship: pruned to the recipe's ratio, then repaired."""
    scored = bench.with_scores(recipe)
    with seeded(recipe.seed):
        return cut(scored, plan_at(scored, scored.ratio, recipe), Run(recipe, bench.parts).without_progress())


def shipped_quality(bench: Workbench, recipe: Recipe) -> float:
    """Quality of the model that `run` would ship: the objective "operating-point"."""
    return bench.quality(prune_at(bench, recipe).pruned.model)


def masked_area(bench: Workbench, recipe: Recipe, trial: optuna.Trial | None = None) -> float:
    """Mean quality while the lowest-scored units are masked, over `PXP_RATES`: the objective "pxp".

    Nothing is repaired. The middle rates come first: they tell choices apart, so that a bad `trial` ends early.
    """
    total = 0.0
    for step, rate in enumerate(sorted(PXP_RATES, key=lambda rate: abs(rate - 0.475)), 1):
        total += masked_quality(bench, recipe, rate)
        if trial is not None:
            trial.report(total / step, step)
            if trial.should_prune():
                raise optuna.TrialPruned
    return total / len(PXP_RATES)


def masked_quality(bench: Workbench, recipe: Recipe, rate: float) -> float:
    """Quality with the share `rate` of all units, those with the lowest scores, masked."""
    if not rate:
        return bench.dense
    scored = bench.with_scores(recipe)
    groups = scored.structure.groups
    return bench.quality(mask_units(scored.model, groups, find_lowest(groups, scored.scores, rate, recipe.normalise)))
