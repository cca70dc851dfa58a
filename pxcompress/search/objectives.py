"""Objectives of a search: the value of a choice as one number, from the data's score, repair and select parts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import optuna
from torch import nn

from pxcompress.graph import mask_units
from pxcompress.planning.order import find_lowest
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.stages import plan_and_cut, quality_on_select, score_by
from pxcompress.state import seeded
from pxcompress.tasks.agreement import Agreement
from pxcompress.types import PruneResult, ScoredModel

PXP_RATES = tuple(percent / 100 for percent in range(0, 100, 5))
"""Shares of all units that are masked in turn for the objective "pxp", after "Pruning by Explaining Revisited"."""


@dataclass(frozen=True, eq=False)
class Workbench:
    """What all trials of a search share, computed once: the prepared model, its run, and its scores by scorer."""

    prepared: ScoredModel
    run: Run
    scored: dict[str, ScoredModel] = field(default_factory=dict)

    @cached_property
    def dense(self) -> float:
        """Quality of the dense model on the select split."""
        return self.quality(self.prepared.model)

    def quality(self, model: nn.Module) -> float:
        """The metric on the select split, with its sign set so that larger is better."""
        task = self.run.task or Agreement()
        return task.metric.gain(quality_on_select(model, self.prepared.model, self.run, task))

    def with_scores(self, recipe: Recipe) -> ScoredModel:
        """The dense model scored as `recipe` says; each scorer runs once. Raises `ResultError` for infinite scores."""
        if recipe.scorer not in self.scored:
            self.scored[recipe.scorer] = score_by(self.prepared, recipe.scorers[0], self.run_of(recipe))
        return self.scored[recipe.scorer]

    def run_of(self, recipe: Recipe) -> Run:
        """The run of one trial."""
        return replace(self.run, recipe=recipe).without_progress()


def prune_at(bench: Workbench, recipe: Recipe) -> PruneResult:
    """The model that `run` would ship for a recipe that names its scorer.

    No file is made: a cost that only files tell is the plan's.
    """
    scored = bench.with_scores(recipe)
    with seeded(recipe.seed):
        return plan_and_cut(scored, bench.run_of(recipe))


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
