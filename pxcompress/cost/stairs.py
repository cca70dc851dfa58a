"""Milliseconds of an operator over its widths, measured at few of them, where time rises in wide steps.

On a GPU a tile of outputs that is only partly used takes as long as a whole one, and the size of tiles depends on both
widths together. So the plane of (inputs, outputs) is halved along both axes again and again, but only around the widths
that a plan asks for, and only while the corners of the part take different times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Widths = tuple[int, ...]

FLATNESS_TOLERANCE = 0.03
"""Two corners of a box of widths may differ by this share of time and the box still counts as one step."""

MOST_POINTS = 64
"""Largest number of widths at which one operator is timed; after that times between them are interpolated."""


@dataclass(frozen=True, eq=False)
class Stairs:
    """Milliseconds of an operator over widths, by a function `time` that is called as rarely as possible.

    Widths go up to the `dense` ones and count in multiples of `unit`. `time` must not fall along any axis. Every answer
    is remembered, so that a width is timed once.
    """

    time: Callable[[Widths], float]
    dense: Widths
    unit: int = 8
    points: int = MOST_POINTS
    _times: dict[Widths, float] = field(default_factory=dict)

    def at(self, widths: Widths) -> float:
        """Milliseconds at `widths`; a unit that is only partly used takes as long as a whole one."""
        units = tuple(-(-min(width, dense) // self.unit) for width, dense in zip(widths, self.dense, strict=True))
        low = (1,) * len(units)
        high = tuple(-(-dense // self.unit) for dense in self.dense)
        while True:
            lowest, highest = self._measure(low), self._measure(high)
            if low == high or highest - lowest <= FLATNESS_TOLERANCE * highest:
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
    """Halve the box from `low` to `high` along every axis; returns the corners of the part that contains `point`."""
    lows, highs = [], []
    for value, first, last in zip(point, low, high, strict=True):
        middle = (first + last) // 2
        lows.append(first if value <= middle else middle + 1)
        highs.append(middle if value <= middle else last)
    return tuple(lows), tuple(highs)


def _place(point: Widths, low: Widths, high: Widths) -> float:
    """How far `point` lies on the way from `low` to `high`, from 0 to 1, measured by the product of widths."""
    whole, part = 1.0, 1.0
    first = 1.0
    for value, start, end in zip(point, low, high, strict=True):
        whole, part, first = whole * end, part * value, first * start
    return (part - first) / (whole - first) if whole > first else 1.0
