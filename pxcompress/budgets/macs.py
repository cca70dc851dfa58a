"""Budget in multiply-accumulates of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pxcompress.budgets import BUDGETS
from pxcompress.cost.count import macs_meter
from pxcompress.types import Budget, Group, Meter


@BUDGETS.register("macs")
@dataclass(frozen=True)
class MACs(Budget):
    """Cost in multiply-accumulates of convolutions, linear layers and attention for one sample."""

    unit = "MACs"

    def meter(self, model: nn.Module, groups: Sequence[Group], example: Tensor) -> Meter:
        """A function from kept units to the exact number of multiply-accumulates."""
        return macs_meter(model, groups, example)
