"""Budget in parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pxcompress.budgets import BUDGETS
from pxcompress.cost.count import params_meter
from pxcompress.types import Budget, Group, Meter


@BUDGETS.register("params")
@dataclass(frozen=True)
class Params(Budget):
    """Cost in parameters of the model."""

    unit = "parameters"

    def meter(self, model: nn.Module, groups: Sequence[Group], example: Tensor) -> Meter:
        """A function from kept units to the exact number of parameters."""
        return params_meter(model, groups)
