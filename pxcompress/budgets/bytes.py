"""Budget in bytes of the exported file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pxcompress.budgets import BUDGETS
from pxcompress.cost.count import params_meter
from pxcompress.deploy.export import artifact_of
from pxcompress.types import Budget, Group, Meter

BYTES_PER_WEIGHT = 4
"""Size of a float32 weight, in bytes."""


@BUDGETS.register("bytes")
@dataclass(frozen=True)
class Bytes(Budget):
    """Cost in bytes of the exported file, counted as 4 for each float32 weight."""

    unit = "bytes"
    tolerance = 0.0

    def meter(self, model: nn.Module, groups: Sequence[Group], example: Tensor) -> Meter:
        """A function from kept units to bytes of the weights.

        The rest of the file is small, and is measured on the file itself.
        """
        params = params_meter(model, groups)
        return lambda kept_units: BYTES_PER_WEIGHT * params(kept_units)

    def measure_files(self, files: Sequence[Path], example: Tensor) -> Sequence[float]:
        """Sizes of the files in bytes, external weights included."""
        return [float(artifact_of(path).bytes) for path in files]
