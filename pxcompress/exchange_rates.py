"""Makes scores of different groups comparable: measures for each group what a point of score is worth.

Scores put the units of a group in order. How much an error in one layer matters beside an error in another no formula
says well: it depends on what later layers make of it. So some units of each group are removed, alone, what they carried
is folded into the others, and the change of the outputs on held-out samples says what one point of score costs there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import torch

from pxcompress.agreement import DenseOutputs
from pxcompress.graph import prune
from pxcompress.layout.rows import input_layouts
from pxcompress.passes.moments import collect_moments
from pxcompress.passes.parts import spread_samples
from pxcompress.processes import from_first
from pxcompress.tasks.task import Task
from pxcompress.types import Batches, Group, Plan, Repair, ScoredModel, Scores

REMOVED_SHARE = 0.25
"""Share of a group's units, those with the lowest scores, that is removed to measure its rate."""

SAMPLE_PASSES = 2048
"""Number of samples in all that run through pruned models; with many groups each gets fewer samples."""

FEWEST_SAMPLES, MOST_SAMPLES = 16, 64
"""Fewest and most samples on which a group is measured."""

LARGEST_SPREAD = 100.0
"""A group's rate may differ from the median rate by at most this factor."""


def with_measured_rates(
    candidates: Sequence[ScoredModel], repairs: Sequence[Repair], fit: Batches, held_out: Batches, task: Task | None
) -> list[ScoredModel]:
    """Multiply the scores of each group by its rate: measured divergence of outputs per point of score.

    `candidates` are one model, scored in several ways. Removed for the measurement are the lowest units by the first of
    them; the same share of the others' lowest is taken to cost as much. `repairs`, those that absorb what is removed,
    are fitted to `fit`; outputs are compared on some samples of `held_out`, in one pass for every group.
    """
    scored = candidates[0]
    groups = scored.structure.groups
    samples = min(MOST_SAMPLES, max(FEWEST_SAMPLES, SAMPLE_PASSES // max(len(groups), 1)))
    dense = DenseOutputs(scored.model, spread_samples(held_out, samples), task)
    if repairs:  # one pass for all groups, where `fit` remembers it
        collect_moments(scored.model, input_layouts(scored.model, groups), fit)
    divergences: dict[str, float] = {}
    for group in groups:
        pruned = prune(scored.model, groups, _plan_alone(group, _list_lowest(group, scored)))
        for repair in repairs:
            pruned = repair(pruned, fit)
        divergences[group.name] = dense.compare(pruned.model).divergence
    divergences = from_first(divergences)
    return [_apply_rates(each, divergences) for each in candidates]


def _list_lowest(group: Group, scored: ScoredModel) -> list[int]:
    """Indices of the group's units with the lowest scores: the share `REMOVED_SHARE` of them, at least one."""
    order = torch.argsort(scored.scores[group.name], stable=True).tolist()
    return list(order[: max(1, round(REMOVED_SHARE * group.units))])


def _plan_alone(group: Group, units: Sequence[int]) -> Plan:
    """A plan that removes `units` of one group and nothing else."""
    units_left = group.units - len(units)
    return Plan({group.name: tuple(sorted(units))}, "channels", "units", group.units, units_left, units_left)


def _apply_rates(scored: ScoredModel, divergences: Mapping[str, float]) -> ScoredModel:
    """Scores multiplied by each group's measured divergence / sum of removed scores.

    Unmeasured groups get the median rate.
    """
    rates: dict[str, float] = {}
    for group in scored.structure.groups:
        score_sum = float(scored.scores[group.name][_list_lowest(group, scored)].clamp_min(0).sum())
        if score_sum > 0 and 0 < divergences[group.name] < math.inf:
            rates[group.name] = divergences[group.name] / score_sum
    if not rates:
        return scored
    middle = median(rates.values())

    bounded_rates = {
        name: min(max(rates.get(name, middle), middle / LARGEST_SPREAD), middle * LARGEST_SPREAD)
        for name in scored.scores
    }
    return replace(scored, scores=at_rates(scored.scores, bounded_rates), rates=bounded_rates)


def at_rates(scores: Scores, rates: Mapping[str, float]) -> Scores:
    """The scores of every group multiplied by its rate; groups without a rate stay as they are."""
    return {name: values * rates.get(name, 1.0) for name, values in scores.items()}
