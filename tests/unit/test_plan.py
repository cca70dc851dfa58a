from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pxcompress.errors import BudgetError, InputError
from pxcompress.planning.limits import Limits
from pxcompress.planning.order import NORMALISATIONS
from pxcompress.planning.plan import make_plan
from pxcompress.planning.plan_file import plan_from_json, plan_to_json
from pxcompress.types import Group, Kind, Meter, Plan, Price

FREE = Limits("none", 1, 0.0)
PRICES = torch.full((17,), 3.0).double()
fast = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def _group(name: str, units: int, kind: Kind = "channel") -> Group:
    return Group(name, kind, units, ())


def _coins(meter: Meter) -> Price:
    return Price("toy", "coins", meter)


def _count(groups: Sequence[Group]) -> Price:
    return _coins(lambda kept: float(sum(kept.get(group.name, group.units) for group in groups)))


def _chain(groups: Sequence[Group], prices: Sequence[int]) -> Meter:
    """Like a chain of layers: a layer costs its width times that of the layer before it."""

    def cost(kept: Mapping[str, int]) -> float:
        widths = [kept.get(group.name, group.units) for group in groups]
        inner = sum(a * b * price for a, b, price in zip(widths, widths[1:], prices, strict=False))
        return float(7 + widths[0] + inner + widths[-1])

    return cost


@dataclass(frozen=True)
class Case:
    groups: tuple[Group, ...]
    scores: dict[str, Tensor]
    meter: Meter
    limits: Limits

    def plan(self, ratio: float) -> Plan:
        return make_plan(self.groups, self.scores, _coins(self.meter), ratio, self.limits)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    kinds = [draw(st.sampled_from(["channel", "neuron", "head"])) for _ in sizes]
    groups = tuple(_group(f"layer{i}", n, kind) for i, (n, kind) in enumerate(zip(sizes, kinds, strict=True)))
    # Quarters: exact in binary, and often tied.
    value = st.integers(0, 12).map(lambda quarters: quarters / 4)
    scores = {g.name: torch.tensor(draw(st.lists(value, min_size=g.units, max_size=g.units))) for g in groups}
    prices = draw(st.lists(st.integers(1, 9), min_size=4, max_size=4))
    meter = draw(st.sampled_from([_count(groups), _chain(groups, prices)]))
    limits = Limits(
        draw(st.sampled_from(["none", "max", "cost", "uniform", "isomorphic"])),
        draw(st.sampled_from([1, 2, 3, 8])),
        draw(st.sampled_from([0.0, 0.1, 0.25, 0.5])),
    )
    return Case(groups, scores, meter, limits)


ratios = st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 0.99])


# --- a slow reference: try every length of the ranking ---


def _normalised(case: Case) -> dict[str, list[float]]:
    how = case.limits.normalise
    if how == "isomorphic":
        found: dict[str, list[float]] = {}
        for kind in {group.kind for group in case.groups}:
            alike = [group for group in case.groups if group.kind == kind]
            ranks = _shares([value for group in alike for value in case.scores[group.name].tolist()])
            for group in alike:
                found[group.name], ranks = ranks[: group.units], ranks[group.units :]
        return found
    return {group.name: _normalised_alone(case, group) for group in case.groups}


def _normalised_alone(case: Case, group: Group) -> list[float]:
    values = case.scores[group.name].double().numpy()
    if case.limits.normalise == "uniform":
        return _shares(values.tolist())
    scale = {
        "none": 1.0,
        "max": np.abs(values).max(),
        "cost": case.meter({}) - case.meter({group.name: group.units - 1}),
    }[case.limits.normalise]
    return (values / scale if scale > 0 else values).tolist()


def _shares(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda unit: (values[unit], unit))
    return [(order.index(unit) + 0.5) / len(values) for unit in range(len(values))]


def _floor(group: Group, limits: Limits) -> int:
    return max(1, math.ceil(group.units * Fraction(str(limits.min_keep))))


def _is_aligned(group: Group, limits: Limits) -> bool:
    return group.kind != "head" and group.units >= 2 * limits.round_to


def _width(group: Group, wanted: int, limits: Limits) -> int:
    if wanted == group.units or not _is_aligned(group, limits):
        return max(wanted, _floor(group, limits))
    step = limits.round_to
    nearest = math.floor(Fraction(wanted, step) + Fraction(1, 2)) * step
    lowest = math.ceil(Fraction(_floor(group, limits), step)) * step
    return min(group.units, max(nearest, lowest))


def _reference(case: Case, ratio: float) -> dict[str, tuple[int, ...]] | None:
    """Units removed by the shortest prefix of the ranking that meets the target; None where none does."""
    normalised = _normalised(case)
    ranking = sorted(
        (normalised[group.name][unit], place, unit)
        for place, group in enumerate(case.groups)
        for unit in range(group.units)
    )
    for length in range(len(ranking) + 1):
        lost = [place for _, place, _ in ranking[:length]]
        kept = {
            group.name: _width(group, group.units - lost.count(place), case.limits)
            for place, group in enumerate(case.groups)
        }
        if Fraction(case.meter(kept)) <= (1 - Fraction(str(ratio))) * Fraction(case.meter({})):
            return {
                group.name: tuple(sorted(_lowest(normalised[group.name], group.units - kept[group.name])))
                for group in case.groups
            }
    return None


def _lowest(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda unit: (values[unit], unit))[:count]


@fast
@given(cases(), ratios)
def test_the_plan_is_the_shortest_cut_that_meets_the_target(case: Case, ratio: float) -> None:
    expected = _reference(case, ratio)
    if expected is None:
        with pytest.raises(BudgetError):
            case.plan(ratio)
        return
    plan = case.plan(ratio)
    assert dict(plan.removed) == expected
    assert plan.cost_dense == case.meter({})
    assert plan.cost_target == pytest.approx((1 - ratio) * plan.cost_dense)
    assert plan.cost_planned == case.meter({group.name: len(plan.kept(group)) for group in case.groups})
    assert plan.cost_planned <= plan.cost_target * (1 + 1e-9)
    assert (plan.budget, plan.unit) == ("toy", "coins")


@fast
@given(cases(), ratios)
def test_widths_keep_floors_and_alignment(case: Case, ratio: float) -> None:
    try:
        plan = case.plan(ratio)
    except BudgetError:
        return
    for group in case.groups:
        kept = plan.kept(group)
        removed = plan.removed[group.name]
        assert sorted([*kept, *removed]) == list(range(group.units))
        assert list(removed) == sorted(removed)
        assert len(kept) >= _floor(group, case.limits)
        if _is_aligned(group, case.limits):
            assert len(kept) % case.limits.round_to == 0 or len(kept) == group.units


@fast
@given(cases())
def test_plans_of_growing_ratios_are_nested(case: Case) -> None:
    smaller: dict[str, set[int]] = {group.name: set() for group in case.groups}
    for ratio in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        try:
            plan = case.plan(ratio)
        except BudgetError:
            continue
        larger = {name: set(units) for name, units in plan.removed.items()}
        assert all(smaller[name] <= larger[name] for name in smaller)
        smaller = larger


@fast
@given(cases(), ratios)
def test_the_plan_does_not_depend_on_anything_else(case: Case, ratio: float) -> None:
    """Not on the order of the scores' mapping, nor their precision or device layout."""
    shuffled = replace(case, scores={name: case.scores[name].double() for name in reversed(case.scores)})
    try:
        plan = case.plan(ratio)
    except BudgetError:
        with pytest.raises(BudgetError):
            shuffled.plan(ratio)
        return
    assert shuffled.plan(ratio) == plan == case.plan(ratio)


@fast
@given(cases())
def test_the_largest_reachable_ratio_is_named_and_reachable(case: Case) -> None:
    try:
        case.plan(0.999)
    except BudgetError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message
    found = re.search(r"largest reachable ratio is (\d+\.\d+)", message)
    assert found, message
    reachable = float(found[1])
    if reachable > 0.002:
        case.plan(reachable - 0.002)
    if reachable < 0.997:
        with pytest.raises(BudgetError):
            case.plan(reachable + 0.002)


@pytest.mark.parametrize("units", [3, 6, 7, 11, 13, 37])
def test_the_named_ratio_can_be_typed_in(units: int) -> None:
    """Whoever is told "the largest reachable ratio is 0.667" types 0.667."""
    groups = [_group("a", units)]
    scores = {"a": torch.arange(units, dtype=torch.float32)}
    with pytest.raises(BudgetError) as caught:
        make_plan(groups, scores, _count(groups), 0.9999, FREE)
    named = float(re.search(r"largest reachable ratio is (\d+\.\d+)", str(caught.value))[1])
    plan = make_plan(groups, scores, _count(groups), named, FREE)
    assert len(plan.kept(groups[0])) == 1


@pytest.mark.parametrize("tenths", range(1, 10))
@pytest.mark.parametrize("units", [10, 50, 1000])
def test_a_ratio_that_comes_out_even_removes_exactly_that(tenths: int, units: int) -> None:
    """(1 - 0.9) * 10 is a hair below 1 in floating point; one of ten units must still be enough."""
    groups = [_group("a", units)]
    scores = {"a": torch.arange(units, dtype=torch.float32)}
    plan = make_plan(groups, scores, _count(groups), tenths / 10, FREE)
    assert len(plan.removed["a"]) == tenths * units // 10


@pytest.mark.parametrize("min_keep", [0.1, 0.2, 0.3, 0.55, 0.7])
def test_min_keep_is_the_least_share_and_no_more(min_keep: float) -> None:
    """0.1 * 70 is a hair above 7 in floating point; seven of seventy units are a tenth."""
    for units in [1, 2, 3, 7, *range(10, 210, 10)]:
        groups = [_group("a", units), _group("b", 1000)]
        scores = {"a": torch.zeros(units), "b": torch.ones(1000)}
        lowest = max(1, math.ceil(units * Fraction(str(min_keep))))
        if lowest == units:
            continue
        ratio = (units - lowest) / (units + 1000)
        plan = make_plan(groups, scores, _count(groups), ratio - 1e-9, Limits("none", 1, min_keep))
        assert len(plan.kept(groups[0])) == lowest, units
        assert plan.removed["b"] == (), units


def test_alignment_leaves_groups_alone_that_lose_nothing() -> None:
    """A group of 19 is not cut to 16 because another one has to shrink."""
    groups = [_group("a", 19), _group("b", 64)]
    scores = {"a": torch.full((19,), 5.0), "b": torch.arange(64) / 64}
    plan = make_plan(groups, scores, _count(groups), 0.25, Limits("none", 8, 0.0))
    assert plan.removed["a"] == ()
    assert len(plan.kept(groups[1])) == 40


@pytest.mark.parametrize(
    ("kind", "units", "round_to", "ratio", "kept"),
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
def test_alignment_by_hand(kind: Kind, units: int, round_to: int, ratio: float, kept: int) -> None:
    groups = [_group("a", units, kind)]
    scores = {"a": torch.arange(units, dtype=torch.float32)}
    plan = make_plan(groups, scores, _count(groups), ratio, Limits("none", round_to, 0.0))
    assert len(plan.kept(groups[0])) == kept
    assert plan.removed["a"] == tuple(range(units - kept))


def test_ties_do_not_over_prune() -> None:
    """torch-pruning's threshold removes 59 % for 25 % asked where 60 % of the scores are equal."""
    groups = [_group("a", 100), _group("b", 100)]
    scores = {name: torch.cat([torch.full((60,), 0.5), torch.rand(40) + 1]) for name in "ab"}
    plan = make_plan(groups, scores, _count(groups), 0.25, FREE)
    assert sum(len(units) for units in plan.removed.values()) == 50
    assert plan.removed == {"a": tuple(range(50)), "b": ()}


def test_a_group_below_every_other_keeps_a_unit_and_is_cut() -> None:
    """torch-pruning leaves a layer that lies wholly below the threshold whole, in silence."""
    groups = [_group("weak", 10), _group("strong", 10)]
    scores = {"weak": torch.full((10,), 0.1), "strong": torch.full((10,), 9.0)}
    plan = make_plan(groups, scores, _count(groups), 0.5, FREE)
    assert len(plan.kept(groups[0])) == 1
    assert len(plan.removed["strong"]) == 1


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratios_outside_of_zero_and_one(ratio: float) -> None:
    groups = [_group("a", 4)]
    with pytest.raises(InputError, match="ratio"):
        make_plan(groups, {"a": torch.ones(4)}, _count(groups), ratio, FREE)


@pytest.mark.parametrize(
    "scores",
    [torch.tensor([1, 2, float("nan"), 3]), torch.tensor([1, 2, float("inf"), 3]), torch.ones(3), torch.ones(4, 1)],
)
def test_scores_that_cannot_be_ranked(scores: Tensor) -> None:
    groups = [_group("odd", 4)]
    with pytest.raises((ValueError, InputError), match="odd"):
        make_plan(groups, {"odd": scores}, _count(groups), 0.5, FREE)


def test_a_model_without_groups_is_a_budget_error() -> None:
    with pytest.raises(BudgetError):
        make_plan([], {}, _coins(lambda kept: 100.0), 0.5, FREE)


def test_a_budget_that_no_group_touches_is_a_budget_error() -> None:
    groups = [_group("a", 4)]
    with pytest.raises(BudgetError, match=r"0\.0"):
        make_plan(groups, {"a": torch.ones(4)}, _coins(lambda kept: 100.0), 0.5, FREE)


# --- normalisations ---


def _random_scores(seed: int) -> Tensor:
    return torch.randn(17, generator=torch.Generator().manual_seed(seed)).double() * 3


@pytest.mark.parametrize("name", NORMALISATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_normalising_keeps_the_order(name: str, seed: int) -> None:
    scores = _random_scores(seed)
    before = scores.clone()
    after = NORMALISATIONS[name](scores, PRICES[: len(scores)])
    assert torch.equal(scores, before), "changed its argument"
    assert torch.equal(torch.argsort(after), torch.argsort(scores))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mean", lambda s: s.abs().mean()),
        ("max", lambda s: s.abs().max()),
        ("sum", lambda s: s.abs().sum()),
        ("norm", lambda s: s.square().sum().sqrt()),
    ],
)
def test_each_normalisation_brings_its_size_to_one(name: str, size: object) -> None:
    for seed in range(3):
        after = NORMALISATIONS[name](_random_scores(seed), PRICES)
        assert float(size(after)) == pytest.approx(1)  # type: ignore[operator]
        assert torch.allclose(after, NORMALISATIONS[name](7 * _random_scores(seed), PRICES))
        assert torch.equal(after.sign(), _random_scores(seed).sign())


def test_none_changes_nothing_and_uniform_gives_ranks() -> None:
    scores = torch.tensor([3.0, -1.0, 3.0, 2.0]).double()
    assert torch.equal(NORMALISATIONS["none"](scores, PRICES[:4]), scores)
    assert NORMALISATIONS["uniform"](scores, PRICES[:4]).tolist() == [0.625, 0.125, 0.875, 0.375]


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_scores_of_zero_stay_finite(name: str) -> None:
    assert torch.isfinite(NORMALISATIONS[name](torch.zeros(5).double(), torch.zeros(5).double())).all()


def test_uniform_takes_the_same_share_of_every_group() -> None:
    groups = [_group("a", 10), _group("b", 40), _group("c", 100)]
    scores = {group.name: 10.0**place * torch.rand(group.units) for place, group in enumerate(groups)}
    plan = make_plan(groups, scores, _count(groups), 0.3, Limits("uniform", 1, 0.0))
    assert {name: len(units) for name, units in plan.removed.items()} == {"a": 3, "b": 12, "c": 30}


# --- limits and plan.json ---


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


def _example() -> tuple[list[Group], Plan]:
    groups = [_group("a", 4), _group("b.attn", 3, "head")]
    return groups, Plan({"a": (0, 3), "b.attn": ()}, "macs", "MACs", 100.0, 55.5, 60.0)


def test_plan_json_round_trip() -> None:
    groups, plan = _example()
    text = plan_to_json(plan, groups)
    assert plan_from_json(text, groups) == plan
    assert json.loads(text)["groups"] == {"a": {"kind": "channel", "units": 4}, "b.attn": {"kind": "head", "units": 3}}
    assert plan_to_json(plan_from_json(text, groups), groups) == text


@pytest.mark.parametrize(
    "others",
    [
        [_group("a", 4)],
        [_group("a", 5), _group("b.attn", 3, "head")],
        [_group("a", 4), _group("b.attn", 3)],
        [_group("a", 4), _group("c", 3, "head")],
    ],
)
def test_a_plan_for_another_model_is_refused(others: list[Group]) -> None:
    groups, plan = _example()
    with pytest.raises(InputError, match="groups"):
        plan_from_json(plan_to_json(plan, groups), others)


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"groups": 3}'])
def test_a_file_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_from_json(text, _example()[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("removed", [{"a": [4]}, {"a": [-1]}, {"a": [0, 0]}, {"a": [0, 1, 2, 3]}, {"nowhere": [0]}])
def test_a_plan_that_removes_what_is_not_there_is_refused(removed: dict[str, list[int]]) -> None:
    groups, plan = _example()
    content = json.loads(plan_to_json(plan, groups))
    content["removed"] = removed
    with pytest.raises(InputError):
        plan_from_json(json.dumps(content), groups)
