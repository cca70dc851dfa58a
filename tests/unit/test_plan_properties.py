"""Plans of drawn cases against a slow reference: every length of the ranking is tried."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from groups import coins_of, make_group, price_by_count
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pxcompress.errors import BudgetError
from pxcompress.planning.limits import Limits
from pxcompress.planning.plan import make_plan
from pxcompress.types import Group, Meter, Plan

fast = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def _chain(groups: Sequence[Group], prices: Sequence[int]) -> Meter:
    """Like a chain of layers: a layer costs its width times that of the layer before it."""

    def cost(width_by_name: Mapping[str, int]) -> float:
        widths = [width_by_name.get(group.name, group.units) for group in groups]
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
        return make_plan(self.groups, self.scores, coins_of(self.meter), ratio, self.limits)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    kinds = [draw(st.sampled_from(["channel", "neuron", "head"])) for _ in sizes]
    groups = tuple(make_group(f"layer{i}", n, kind) for i, (n, kind) in enumerate(zip(sizes, kinds, strict=True)))
    # Quarters: exact in binary, and often tied.
    value = st.integers(0, 12).map(lambda quarters: quarters / 4)
    scores = {g.name: torch.tensor(draw(st.lists(value, min_size=g.units, max_size=g.units))) for g in groups}
    prices = draw(st.lists(st.integers(1, 9), min_size=4, max_size=4))
    meter = draw(st.sampled_from([price_by_count(groups), _chain(groups, prices)]))
    limits = Limits(
        draw(st.sampled_from(["none", "max", "cost", "uniform", "isomorphic"])),
        draw(st.sampled_from([1, 2, 3, 8])),
        draw(st.sampled_from([0.0, 0.1, 0.25, 0.5])),
    )
    return Case(groups, scores, meter, limits)


ratios = st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 0.99])


def _normalised(case: Case) -> dict[str, list[float]]:
    how = case.limits.normalise
    if how == "isomorphic":
        values_by_group: dict[str, list[float]] = {}
        for kind in {group.kind for group in case.groups}:
            alike = [group for group in case.groups if group.kind == kind]
            ranks = _shares([value for group in alike for value in case.scores[group.name].tolist()])
            for group in alike:
                values_by_group[group.name], ranks = ranks[: group.units], ranks[group.units :]
        return values_by_group
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
        widths = {
            group.name: _width(group, group.units - lost.count(place), case.limits)
            for place, group in enumerate(case.groups)
        }
        if Fraction(case.meter(widths)) <= (1 - Fraction(str(ratio))) * Fraction(case.meter({})):
            return {
                group.name: tuple(sorted(_lowest(normalised[group.name], group.units - widths[group.name])))
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
        remaining = plan.kept(group)
        removed = plan.removed[group.name]
        assert sorted([*remaining, *removed]) == list(range(group.units))
        assert list(removed) == sorted(removed)
        assert len(remaining) >= _floor(group, case.limits)
        if _is_aligned(group, case.limits):
            assert len(remaining) % case.limits.round_to == 0 or len(remaining) == group.units


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
    match = re.search(r"largest reachable ratio is (\d+\.\d+)", message)
    assert match, message
    reachable = float(match[1])
    if reachable > 0.002:
        case.plan(reachable - 0.002)
    if reachable < 0.997:
        with pytest.raises(BudgetError):
            case.plan(reachable + 0.002)
