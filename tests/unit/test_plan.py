"""Plans by hand: alignment, floors, ties, and goals that cannot be reached."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
import torch
from groups import FREE, coins_of, make_group, price_by_count
from torch import Tensor

from pxcompress.errors import BudgetError, InputError
from pxcompress.planning.limits import Limits
from pxcompress.planning.plan import make_plan
from pxcompress.types import Kind


@pytest.mark.parametrize("units", [3, 6, 7, 11, 13, 37])
def test_the_named_ratio_can_be_typed_in(units: int) -> None:
    """Whoever is told "the largest reachable ratio is 0.667" types 0.667."""
    groups = [make_group("a", units)]
    scores = {"a": torch.arange(units, dtype=torch.float32)}
    with pytest.raises(BudgetError) as caught:
        make_plan(groups, scores, price_by_count(groups), 0.9999, FREE)
    named = float(re.search(r"largest reachable ratio is (\d+\.\d+)", str(caught.value))[1])
    plan = make_plan(groups, scores, price_by_count(groups), named, FREE)
    assert len(plan.kept(groups[0])) == 1


@pytest.mark.parametrize("tenths", range(1, 10))
@pytest.mark.parametrize("units", [10, 50, 1000])
def test_a_ratio_that_comes_out_even_removes_exactly_that(tenths: int, units: int) -> None:
    """(1 - 0.9) * 10 is a hair below 1 in floating point; one of ten units must still be enough."""
    groups = [make_group("a", units)]
    scores = {"a": torch.arange(units, dtype=torch.float32)}
    plan = make_plan(groups, scores, price_by_count(groups), tenths / 10, FREE)
    assert len(plan.removed["a"]) == tenths * units // 10


@pytest.mark.parametrize("min_keep", [0.1, 0.2, 0.3, 0.55, 0.7])
def test_min_keep_is_the_least_share_and_no_more(min_keep: float) -> None:
    """0.1 * 70 is a hair above 7 in floating point; seven of seventy units are a tenth."""
    for units in [1, 2, 3, 7, *range(10, 210, 10)]:
        groups = [make_group("a", units), make_group("b", 1000)]
        scores = {"a": torch.zeros(units), "b": torch.ones(1000)}
        lowest = max(1, math.ceil(units * Fraction(str(min_keep))))
        if lowest == units:
            continue
        ratio = (units - lowest) / (units + 1000)
        plan = make_plan(groups, scores, price_by_count(groups), ratio - 1e-9, Limits("none", 1, min_keep))
        assert len(plan.kept(groups[0])) == lowest, units
        assert plan.removed["b"] == (), units


def test_alignment_leaves_groups_alone_that_lose_nothing() -> None:
    """A group of 19 is not cut to 16 because another one has to shrink."""
    groups = [make_group("a", 19), make_group("b", 64)]
    scores = {"a": torch.full((19,), 5.0), "b": torch.arange(64) / 64}
    plan = make_plan(groups, scores, price_by_count(groups), 0.25, Limits("none", 8, 0.0))
    assert plan.removed["a"] == ()
    assert len(plan.kept(groups[1])) == 40


@pytest.mark.parametrize(
    ("kind", "units", "round_to", "ratio", "width"),
    [
        ("channel", 64, 8, 0.5, 32),
        ("channel", 64, 8, 0.49, 32),  # nearest multiple of the width that meets the target
        ("channel", 64, 16, 0.1, 48),
        ("neuron", 20, 8, 0.3, 8),
        ("channel", 15, 8, 0.3, 10),  # too small to align
        ("head", 64, 8, 0.3, 44),  # heads are not aligned
        ("channel", 64, 1, 0.3, 44),
    ],
)
def test_alignment_by_hand(kind: Kind, units: int, round_to: int, ratio: float, width: int) -> None:
    groups = [make_group("a", units, kind)]
    scores = {"a": torch.arange(units, dtype=torch.float32)}
    plan = make_plan(groups, scores, price_by_count(groups), ratio, Limits("none", round_to, 0.0))
    assert len(plan.kept(groups[0])) == width
    assert plan.removed["a"] == tuple(range(units - width))


def test_ties_do_not_over_prune() -> None:
    """torch-pruning's threshold removes 59 % for 25 % asked where 60 % of the scores are equal."""
    groups = [make_group("a", 100), make_group("b", 100)]
    scores = {name: torch.cat([torch.full((60,), 0.5), torch.rand(40) + 1]) for name in "ab"}
    plan = make_plan(groups, scores, price_by_count(groups), 0.25, FREE)
    assert sum(len(units) for units in plan.removed.values()) == 50
    assert plan.removed == {"a": tuple(range(50)), "b": ()}


def test_a_group_below_every_other_keeps_a_unit_and_is_cut() -> None:
    """torch-pruning leaves a layer that lies wholly below the threshold whole, in silence."""
    groups = [make_group("weak", 10), make_group("strong", 10)]
    scores = {"weak": torch.full((10,), 0.1), "strong": torch.full((10,), 9.0)}
    plan = make_plan(groups, scores, price_by_count(groups), 0.5, FREE)
    assert len(plan.kept(groups[0])) == 1
    assert len(plan.removed["strong"]) == 1


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratios_outside_of_zero_and_one(ratio: float) -> None:
    groups = [make_group("a", 4)]
    with pytest.raises(InputError, match="ratio"):
        make_plan(groups, {"a": torch.ones(4)}, price_by_count(groups), ratio, FREE)


@pytest.mark.parametrize(
    "scores",
    [torch.tensor([1, 2, float("nan"), 3]), torch.tensor([1, 2, float("inf"), 3]), torch.ones(3), torch.ones(4, 1)],
)
def test_scores_that_cannot_be_ranked(scores: Tensor) -> None:
    groups = [make_group("odd", 4)]
    with pytest.raises((ValueError, InputError), match="odd"):
        make_plan(groups, {"odd": scores}, price_by_count(groups), 0.5, FREE)


def test_a_model_without_groups_is_a_budget_error() -> None:
    with pytest.raises(BudgetError):
        make_plan([], {}, coins_of(lambda widths: 100.0), 0.5, FREE)


def test_a_budget_that_no_group_touches_is_a_budget_error() -> None:
    groups = [make_group("a", 4)]
    with pytest.raises(BudgetError, match=r"0\.0"):
        make_plan(groups, {"a": torch.ones(4)}, coins_of(lambda widths: 100.0), 0.5, FREE)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"normalise": "mean_"}, "mean"),
        ({"round_to": 0}, "round-to"),
        ({"round_to": -8}, "round-to"),
        ({"min_keep": 1.0}, "min-keep"),
        ({"min_keep": -0.1}, "min-keep"),
        ({"min_keep": float("nan")}, "min-keep"),
    ],
)
def test_limits_are_checked(limits: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Limits(**limits)  # type: ignore[arg-type]
