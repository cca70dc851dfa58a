"""Budget in units: every channel, neuron and head counts one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pxcompress.budgets import BUDGETS
from pxcompress.types import Budget, Group, Meter


@BUDGETS.register("channels")
@dataclass(frozen=True)
class Channels(Budget):
    """Cost as a number of units: every removable channel, neuron and head counts one."""

    unit = "units"
    normalise = "mean"  # every unit costs the same, and raw scores leave early layers bare

    def meter(self, model: nn.Module, groups: Sequence[Group], example: Tensor) -> Meter:
        """A function from kept units to their number."""
        sizes = {group.name: group.units for group in groups}
        return lambda kept_units: float(sum(kept_units.get(name, units) for name, units in sizes.items()))
