"""The stop rule by relevance against a slow version, unit by unit; and what comes out of a run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batches_of
from models import subject as subject_named

from pxcompress.errors import BudgetError, InputError
from pxcompress.planning.limits import Limits
from pxcompress.planning.relevance_share import plan_by_share
from pxcompress.recipe import Guarantee, Recipe
from pxcompress.report.summary import format_command
from pxcompress.run import Run
from pxcompress.stages import prune_and_repair
from pxcompress.types import Group, Plan, Price

SHARES = st.floats(0.001, 0.999)


def group_of(units: int) -> Group:
    return Group("g", "channel", units, ())


def plan_of(scores: list[float], share: float, limits: Limits) -> Plan:
    """A plan for one group whose units cost 1 each."""
    group = group_of(len(scores))
    price = Price("x", "y", lambda widths: float(widths.get("g", len(scores))))
    return plan_by_share([group], {"g": torch.tensor(scores)}, price, share, limits)


def slow(scores: list[float], share: float) -> set[int]:
    """Drop the lowest unit again and again, for as long as what is gone holds at most the share."""
    sizes = {unit: abs(float(torch.tensor(value))) for unit, value in enumerate(scores)}
    units: set[int] = set()
    for unit in sorted(sizes, key=lambda unit: (scores[unit], unit)):
        if sum(sizes[each] for each in (*units, unit)) > share * sum(sizes.values()) * (1 + 1e-9):
            return units
        units.add(unit)
    return units


@given(st.lists(st.integers(-300, 1000).map(float), min_size=2, max_size=24), SHARES)
@settings(deadline=None, derandomize=True)
def test_it_drops_what_the_slow_version_drops(scores: list[float], share: float) -> None:
    expected = slow(scores, share)
    expected -= {max(expected, key=lambda unit: (scores[unit], unit))} if len(expected) == len(scores) else set()
    if expected:
        assert set(plan_of(scores, share, Limits(round_to=1, min_keep=0.0)).removed["g"]) == expected
    else:
        with pytest.raises(BudgetError, match="no unit goes"):
            plan_of(scores, share, Limits(round_to=1, min_keep=0.0))


@given(st.lists(st.integers(1, 1000).map(float), min_size=16, max_size=40), SHARES)
@settings(deadline=None, derandomize=True)
def test_never_more_than_the_share_goes_whatever_the_alignment(scores: list[float], share: float) -> None:
    limits = Limits(round_to=4, min_keep=0.2)
    try:
        removed = plan_of(scores, share, limits).removed["g"]
    except BudgetError:
        return
    assert sum(scores[unit] for unit in removed) <= share * sum(scores) * (1 + 1e-9)
    width = len(scores) - len(removed)
    assert width % 4 == 0
    assert width >= 0.2 * len(scores)


def test_a_share_does_not_depend_on_the_scale_of_a_layer() -> None:
    scores = [5.0, 1.0, 9.0, 0.5, 3.0]
    plans = [plan_of([scale * each for each in scores], 0.2, Limits(round_to=1)) for scale in (1e-6, 1.0, 1e6)]
    assert [plan.removed["g"] for plan in plans] == [(1, 3)] * 3
    assert (plans[0].cost_dense, plans[0].cost_planned, plans[0].cost_target) == (5, 3, 3)


def test_a_run_removes_at_most_the_share_of_every_layer() -> None:
    subject = subject_named("flatten_cnn")
    batches = batches_of(subject.inputs, 3)
    recipe = Recipe("mine", relevance_share=0.2, scorer="lrp", round_to=1, budget="macs", repair=("fold",))
    slim = prune_and_repair(subject.model, subject.example, Run(recipe, {"score": batches, "repair": batches}))
    shares = []
    for group in slim.pruned.groups:
        scores, removed = slim.scores[group.name], list(slim.pruned.plan.removed[group.name])
        shares.append(float(scores[removed].sum() / scores.sum()))
    assert max(shares) <= 0.2 + 1e-6
    assert min(shares) > 0
    assert slim.pruned.plan.cost_planned < slim.pruned.plan.cost_dense


def test_it_is_a_goal_like_the_others() -> None:
    recipe = Recipe("mine", relevance_share=0.05)
    assert recipe.label == "mine-macs-0.05-relevance"
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert format_command(recipe) == "pxcompress run --model mine --relevance-share 0.05"
    for wrong, message in (
        ({"relevance_share": 1.0}, "relevance-share is 1.0; expected a share of every layer's scores"),
        ({"relevance_share": 0.1, "ratio": 0.5}, "--ratio and --relevance-share are given"),
        ({"relevance_share": 0.1, "rounds": 2}, "rounds is 2; --relevance-share is met in one"),
        ({"relevance_share": 0.1, "guarantee": Guarantee(0.03)}, "--relevance-share is given with a guarantee"),
    ):
        with pytest.raises(InputError, match=message):
            Recipe("mine", **wrong)
