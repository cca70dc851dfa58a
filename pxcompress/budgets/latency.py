"""Budget in milliseconds on the machine at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pxcompress.budgets import BUDGETS
from pxcompress.choices import PROVIDERS
from pxcompress.cost.latency import Conditions, latency_meter, measure_files
from pxcompress.registry import option
from pxcompress.types import Budget, Group, Meter


@BUDGETS.register("latency")
@dataclass(frozen=True)
class Latency(Budget):
    """Cost in milliseconds of one call on ONNX Runtime, under the conditions of the bench options."""

    unit = "ms"
    tolerance = 0.02
    round_to = 0  # as measures best

    batch_size: int = option(1, "samples per call", low=1)
    provider: str = option("auto", "execution provider", choices=PROVIDERS)
    threads: int = option(0, "CPU threads; 0: all physical cores", low=0)

    def meter(self, model: nn.Module, groups: Sequence[Group], example: Tensor) -> Meter:
        """A function from kept units to milliseconds of a call, predicted from measured operators."""
        return latency_meter(model, groups, example, self._conditions)

    def measure_files(self, files: Sequence[Path], example: Tensor) -> Sequence[float]:
        """Median milliseconds of one call of each file; the files take turns, so that drift hits all alike."""
        return measure_files(files, example, self._conditions)

    @property
    def _conditions(self) -> Conditions:
        return Conditions(self.batch_size, self.provider, self.threads)
