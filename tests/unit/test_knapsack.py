from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxcompress.planning.knapsack import Choice, choose_widths

fast = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def choices(draw: st.DrawFn) -> list[Choice]:
    """Up to four groups of up to five widths; saliency falls to 0 as they get whole."""
    made = []
    for number in range(draw(st.integers(1, 4))):
        widths = sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=5)))
        steps = draw(st.lists(st.floats(0, 5), min_size=len(widths), max_size=len(widths)))
        made.append(Choice(str(number), tuple(widths), np.cumsum(steps)[::-1] - steps[0]))
    return made


def _sum(widths: Mapping[str, int]) -> float:
    return float(sum(widths.values()))


def _chain(width_by_name: Mapping[str, int]) -> float:
    """What layers in a row cost: every width times the next."""
    widths = [3, *(width_by_name[name] for name in sorted(width_by_name)), 5]
    return float(sum(a * b for a, b in itertools.pairwise(widths)))


def _every(drawn: list[Choice]) -> list[dict[str, int]]:
    names = [choice.name for choice in drawn]
    return [dict(zip(names, widths, strict=True)) for widths in itertools.product(*(c.widths for c in drawn))]


def _saliency(drawn: list[Choice], widths: Mapping[str, int]) -> float:
    return float(sum(choice.saliency[choice.widths.index(widths[choice.name])] for choice in drawn))


@pytest.mark.parametrize("meter", [_sum, _chain])
@given(drawn=choices(), share=st.floats(0, 1))
@fast
def test_it_fits_and_is_near_the_optimum(meter: object, drawn: list[Choice], share: float) -> None:
    """At most one choice away: what Lagrange relaxation with a filled rest can miss where costs add up."""
    cost = _sum if meter is _sum else _chain
    every = _every(drawn)
    least, most = min(map(cost, every)), max(map(cost, every))
    limit = least + share * (most - least)
    widths = choose_widths(drawn, cost, limit)
    assert cost(widths) <= limit
    optimum = min(_saliency(drawn, other) for other in every if cost(other) <= limit)
    if cost is _sum:
        assert _saliency(drawn, widths) <= optimum + max(float(choice.saliency.max()) for choice in drawn) + 1e-9


@given(drawn=choices())
@fast
def test_all_of_it_is_free(drawn: list[Choice]) -> None:
    whole = {choice.name: choice.widths[-1] for choice in drawn}
    assert _saliency(drawn, choose_widths(drawn, _chain, _chain(whole))) == 0


def test_costs_are_those_at_the_widths_of_the_others() -> None:
    """Two layers in a row, one without value: it gives all, and the other one, cheap by then, stays whole."""
    saliency = np.array([8.0, 4.0, 0.0])
    layers = [Choice("0", (1, 4, 8), saliency * 0), Choice("1", (1, 4, 8), saliency)]
    assert choose_widths(layers, _chain, 3 * 1 + 1 * 8 + 8 * 5) == {"0": 1, "1": 8}


def test_the_best_round_counts_and_not_the_last() -> None:
    """Costs move with the widths of the others, so that here the second round saves less than the first."""
    first = Choice("0", (5, 7, 8, 11), np.array([9.0, 5.0, 2.0, 0.0]))
    second = Choice("1", (3, 4, 9, 10), np.array([10.0, 6.0, 3.0, 0.0]))
    widths = choose_widths([first, second], _chain, 74)
    assert _saliency([first, second], widths) == 11
