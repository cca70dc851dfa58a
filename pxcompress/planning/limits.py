"""What a plan may do to a group: how much stays in any case, and to which widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from pxcompress.errors import InputError, unknown
from pxcompress.planning.order import NORMALISATIONS
from pxcompress.types import Group

ROUNDING = 1e-9
"""Share by which products of ratios and counts may be off: 0.1 * 10 is not quite 1."""


@dataclass(frozen=True)
class Limits:
    """What a plan may do: `round_to` aligns the units that stay (channels and neurons), `min_keep` is the least share.

    `floors` are other least shares for the groups whose names their globs fit. One unit of every group stays in any
    case; groups with fewer than 2 * round_to units are not aligned.
    """

    normalise: str = "mean"
    round_to: int = 8
    min_keep: float = 0.1
    floors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.normalise not in NORMALISATIONS:
            raise unknown("normalisation", self.normalise, NORMALISATIONS)
        if self.round_to < 1:
            raise InputError(f"round-to is {self.round_to}; expected 1 (no alignment) or more")
        if not 0 <= self.min_keep < 1:
            raise InputError(f"min-keep is {self.min_keep}; expected a share from 0 up to, but without, 1")

    def floor(self, group: Group) -> int:
        """Units of `group` that stay in any case."""
        shares = [share for glob, share in self.floors.items() if fnmatchcase(group.name, glob)]
        return max(1, math.ceil(group.units * max(shares, default=self.min_keep) * (1 - ROUNDING)))


def align_width(group: Group, width: int, limits: Limits) -> int:
    """`width` rounded to the nearest multiple of `round_to` (ties upwards), within the group's floor and size."""
    if width == group.units:
        return width
    floor = limits.floor(group)
    step = limits.round_to
    if group.kind == "head" or group.units < 2 * step:
        return max(width, floor)
    beside = group.rows_beside
    rounded = (2 * (width + beside) + step) // (2 * step) * step
    return min(group.units, max(rounded, -(-(floor + beside) // step) * step) - beside)


def narrowest(group: Group, width: int, limits: Limits) -> int:
    """The least aligned width, above zero, that has room for `width` units."""
    if group.kind == "head" or group.units < 2 * limits.round_to:
        return max(1, width)
    return min(group.units, max(1, -(-width // limits.round_to)) * limits.round_to)
