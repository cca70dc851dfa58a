"""Pruning in rounds: the same units are gone as if they had gone at once."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import FlattenCNN, Subject, batches_of, random_plan
from torch import Tensor

from pxcompress import InputError, Recipe, compress_module
from pxcompress.graph import prune
from pxcompress.planning.limits import Limits
from pxcompress.planning.order import REMOVED_SCORE
from pxcompress.planning.plan import make_plan
from pxcompress.planning.rounds import groups_left, list_ratios, prune_further, spread_scores
from pxcompress.state import seeded
from pxcompress.types import Plan, Price, Pruned


def _further(subject: Subject, first: Plan, whole: Plan) -> Pruned:
    before = prune(subject.model, subject.groups, first)
    return prune_further(before, groups_left(before), whole)


def _joined(first: Plan, second: Plan, subject: Subject) -> Plan:
    """What either removes; one unit of every group stays."""
    removed = {
        group.name: tuple(
            sorted({*first.removed.get(group.name, ()), *second.removed.get(group.name, ())})[: group.units - 1]
        )
        for group in subject.groups
    }
    return replace(first, removed=removed)


def test_two_rounds_remove_what_one_would(subject: Subject) -> None:
    joined = _joined(random_plan(subject.groups, 1), random_plan(subject.groups, 2), subject)
    first = replace(joined, removed={name: units[::2] for name, units in joined.removed.items()})
    further = _further(subject, first, joined)
    at_once = prune(subject.model, subject.groups, joined).model
    assert further.whole.dense is subject.model
    assert further.whole.model is further.model
    assert further.whole.plan == joined
    with torch.no_grad():
        torch.testing.assert_close(further.model(subject.inputs), at_once(subject.inputs))


def test_scores_of_the_rest_stand_at_their_dense_places(small: Subject) -> None:
    plan = random_plan(small.groups, 3)
    pruned = prune(small.model, small.groups, plan)
    scores = {group.name: torch.arange(len(plan.kept(group))) + 1.0 for group in small.groups}
    for group in small.groups:
        values = spread_scores(scores, pruned)[group.name]
        assert values[plan.kept(group)].tolist() == scores[group.name].tolist()
        assert [unit for unit in range(group.units) if values[unit] == REMOVED_SCORE] == list(
            plan.removed.get(group.name, ())
        )


@pytest.mark.parametrize("normalise", ["none", "mean", "uniform", "max"])
@pytest.mark.parametrize("round_to", [1, 4])
def test_plans_of_later_rounds_hold_those_of_earlier_ones(small: Subject, normalise: str, round_to: int) -> None:
    limits = Limits(normalise, round_to, 0.1)

    def meter(widths: object) -> float:
        return float(sum(widths.get(group.name, group.units) for group in small.groups))  # type: ignore[attr-defined]

    with seeded(5):
        scores: dict[str, Tensor] = {group.name: torch.rand(group.units) for group in small.groups}
        plans = []
        for ratio in list_ratios(0.6, 4):
            plans.append(make_plan(small.groups, scores, Price("channels", "units", meter), ratio, limits))
            for group in small.groups:  # new scores for what is left
                scores[group.name] = torch.rand(group.units)
                scores[group.name][list(plans[-1].removed[group.name])] = REMOVED_SCORE
    for earlier, later in itertools.pairwise(plans):
        assert all(set(earlier.removed[name]) <= set(later.removed[name]) for name in earlier.removed)
    assert plans[-1].cost_planned <= plans[-1].cost_target + 1e-9


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_every_round_removes_the_same_share_of_the_rest(rounds: int) -> None:
    ratios = list_ratios(0.7, rounds)
    left = [1.0, *(1 - ratio for ratio in ratios)]
    shares = [after / before for before, after in itertools.pairwise(left)]
    assert len(ratios) == rounds
    assert ratios[-1] == 0.7
    assert max(shares) - min(shares) < 1e-9


def test_a_module_pruned_in_rounds_reaches_the_ratio_and_stays_as_it_was() -> None:
    with seeded(0):
        model = FlattenCNN().eval()
        inputs = torch.randn(32, 3, 12, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = batches_of(inputs, 16)
    options: dict[str, Any] = {"budget": "channels", "round_to": 1, "repair": ("closed-form",)}
    slim = compress_module(model, inputs[:1], batches, 0.5, rounds=3, **options)
    at_once = compress_module(model, inputs[:1], batches, 0.5, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert slim.pruned.dense is model
    assert slim.pruned.first is None
    assert slim.pruned.plan.cost_planned == at_once.pruned.plan.cost_planned
    assert slim.pruned.model(inputs).isfinite().all()


def test_rounds_are_at_least_one() -> None:
    with pytest.raises(InputError, match="rounds is 0; expected 1 or more"):
        Recipe("resnet18", 0.5, rounds=0)
