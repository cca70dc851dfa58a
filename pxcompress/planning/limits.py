"""Limits on what a plan may do to a group: how many units must stay, and which widths are allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from pxcompress.errors import InputError, unknown
from pxcompress.planning.order import NORMALISATIONS
from pxcompress.types import Group

ROUNDING = 1e-9
"""Share by which products of ratios and counts may be off by floating-point rounding."""


@dataclass(frozen=True)
class Limits:
    """Limits of a plan: widths of channels and neurons are multiples of `round_to`, and the share `min_keep` stays.

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
        """Least number of units of `group` that must stay."""
        shares = [share for glob, share in self.floors.items() if fnmatchcase(group.name, glob)]
        return max(1, math.ceil(group.units * max(shares, default=self.min_keep) * (1 - ROUNDING)))


def align_width(group: Group, width: int, limits: Limits) -> int:
    """`width` rounded to the nearest multiple of `round_to`, ties upwards, but not below the group's floor or above its
    size.

    Heads, and groups with fewer than 2 * round_to units, are not rounded.
    """
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
    """The smallest allowed width of a group that is at least `width`."""
    if group.kind == "head" or group.units < 2 * limits.round_to:
        return max(1, width)
    return min(group.units, max(1, -(-width // limits.round_to)) * limits.round_to)
