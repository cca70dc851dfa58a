"""Widths in wide steps, on a machine whose clock is a formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from pxcompress.cost.stairs import FLATNESS_TOLERANCE, Stairs, Widths

DENSE = (256, 512)


def tiles(tile_in: int, tile_out: int) -> Callable[[Widths], float]:
    """A GPU that computes whole tiles, and takes half a tile's time for nothing."""
    return lambda widths: 0.5 + -(-widths[0] // tile_in) * -(-widths[1] // tile_out)


def counted(time: Callable[[Widths], float]) -> tuple[Callable[[Widths], float], list[Widths]]:
    """`time`, and the widths that it is asked for."""
    timed: list[Widths] = []
    return lambda widths: timed.append(widths) or time(widths), timed  # type: ignore[func-returns-value]


def all_widths(unit: int) -> itertools.product[Widths]:
    return itertools.product(range(unit, DENSE[0] + 1, unit), range(unit, DENSE[1] + 1, unit))


@pytest.mark.parametrize("tile", [(64, 128), (32, 256), (256, 64)])
def test_steps_are_found_by_timing_few_widths(tile: tuple[int, int]) -> None:
    time, timed = counted(tiles(*tile))
    stairs = Stairs(time, DENSE, 8, points=10_000)
    for widths in all_widths(8):
        assert stairs.at(widths) == pytest.approx(tiles(*tile)(widths), rel=FLATNESS_TOLERANCE)
    steps = (DENSE[0] // tile[0]) * (DENSE[1] // tile[1])
    assert len(timed) <= 16 * steps
    assert len(timed) < len(list(all_widths(8))) / 4


def test_only_where_plans_go_is_timed() -> None:
    time, timed = counted(tiles(64, 128))
    stairs = Stairs(time, DENSE)
    for outputs in (512, 256, 128):
        stairs.at((256, outputs))
    before = len(timed)
    assert before < 20
    stairs.at((250, 125))  # what is not a whole unit is one
    assert stairs.at((250, 125)) == stairs.at((256, 128))
    assert len(timed) <= before + 6


def test_with_few_points_the_error_is_small_and_nothing_falls() -> None:
    time, timed = counted(lambda widths: 1e-4 * widths[0] * widths[1])  # no step at all
    stairs = Stairs(time, DENSE, points=24)
    for widths in all_widths(8):
        assert stairs.at(widths) == pytest.approx(1e-4 * widths[0] * widths[1], rel=0.25, abs=0.05)
    assert len(timed) <= 26


def test_one_axis_and_a_width_that_is_no_multiple() -> None:
    stairs = Stairs(lambda widths: float(-(-widths[0] // 32)), (100,), 16)
    assert [stairs.at((width,)) for width in (1, 32, 33, 64, 65, 96, 97, 100)] == [1, 1, 2, 2, 3, 3, 4, 4]
