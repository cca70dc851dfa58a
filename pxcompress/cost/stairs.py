"""Milliseconds over widths that go in wide steps, as on a GPU, found by timing few of them.

There a whole tile of outputs takes as long as a part of it, and how wide tiles are depends on both widths together. So
the plane of (inputs, outputs) is halved along both axes, only where its corners take different times, and only where
plans go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Widths = tuple[int, ...]

FLAT = 0.03
"""Share by which the times at two corners may differ for all between them to be one step."""

POINTS = 64
"""Widths of one operator that are timed at most; then what lies between two of them is interpolated."""


@dataclass(frozen=True, eq=False)
class Stairs:
    """`time` of an operator, milliseconds, at widths up to the `dense` ones, all multiples of `unit`.

    `time` must not fall along any axis. Every answer is remembered, so that a width is timed once.
    """

    time: Callable[[Widths], float]
    dense: Widths
    unit: int = 8
    points: int = POINTS
    _times: dict[Widths, float] = field(default_factory=dict)

    def at(self, widths: Widths) -> float:
        """Milliseconds at `widths`; what is not a whole unit takes as long as one."""
        units = tuple(-(-min(width, dense) // self.unit) for width, dense in zip(widths, self.dense, strict=True))
        low = (1,) * len(units)
        high = tuple(-(-dense // self.unit) for dense in self.dense)
        while True:
            lowest, highest = self._measure(low), self._measure(high)
            if low == high or highest - lowest <= FLAT * highest:
                return highest
            if len(self._times) >= self.points:
                return lowest + (highest - lowest) * _place(units, low, high)
            low, high = _half(units, low, high)

    def _measure(self, units: Widths) -> float:
        if units not in self._times:
            widths = (min(count * self.unit, dense) for count, dense in zip(units, self.dense, strict=True))
            self._times[units] = self.time(tuple(widths))
        return self._times[units]


def _half(point: Widths, low: Widths, high: Widths) -> tuple[Widths, Widths]:
    """The part of the box from `low` to `high` that has `point`, when every axis is halved."""
    lows, highs = [], []
    for value, first, last in zip(point, low, high, strict=True):
        middle = (first + last) // 2
        lows.append(first if value <= middle else middle + 1)
        highs.append(middle if value <= middle else last)
    return tuple(lows), tuple(highs)


def _place(point: Widths, low: Widths, high: Widths) -> float:
    """How far `point` lies from `low` to `high`, as a share of the work between them."""
    whole, part = 1.0, 1.0
    first = 1.0
    for value, start, end in zip(point, low, high, strict=True):
        whole, part, first = whole * end, part * value, first * start
    return (part - first) / (whole - first) if whole > first else 1.0
