"""The task "regression": numbers for every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pxcompress.errors import InputError
from pxcompress.proof import Metric
from pxcompress.registry import option
from pxcompress.tasks import TASKS
from pxcompress.tasks.answer import Answer, list_parts, name_class
from pxcompress.tasks.task import Outputs, Task, list_float_outputs


@TASKS.register("regression")
@dataclass(frozen=True)
class Regression(Task):
    """Numbers (n, k) for every sample; judged by the mean absolute error, in the targets' own unit."""

    output: str = option("output", "name of the output with the numbers; else the first")
    largest: float = option(0.0, "target whose size is a loss of 1; 0: the largest of the samples", low=0)

    metric = Metric("MAE", unit="number", higher_is_better=False)
    layouts = ("numbers",)
    reads_dense = False
    scaled = True
    subject = "the number"

    def logits(self, outputs: Outputs) -> Tensor:
        """The predicted numbers, (n, k), each by itself."""
        return self._numbers(outputs)

    def statistics(self, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
        """For each sample the mean absolute error, and the largest absolute target, (n, 2)."""
        errors = (self._numbers(outputs).double() - targets.double().reshape(len(targets), -1)).abs().mean(1)
        size = targets.double().reshape(len(targets), -1).abs().amax(1)
        return torch.stack([errors, size], 1)

    def loss(self, statistics: Tensor) -> Tensor:
        """Mean absolute error of each sample as a share of the largest target, at most 1, (n,)."""
        return (statistics[:, 0] / (self.largest or max(_largest(statistics), 1e-12))).clamp(0, 1)

    def with_scale(self, statistics: Tensor) -> Task:
        """This task with the largest target of these samples as the scale of losses."""
        return replace(self, largest=self.largest or _largest(statistics))

    def check(self, outputs: Outputs, targets: Tensor) -> None:
        """Raise `InputError` for targets with another count of numbers than the model returns."""
        numbers_in_data, returned = targets.reshape(len(targets), -1).shape[1], self._numbers(outputs).shape[1]
        if numbers_in_data != returned:
            raise InputError(
                f"the data have {numbers_in_data} numbers a sample, the model returns {returned}; give as many"
            )

    def answer(self, outputs: Outputs, classes: Sequence[str], size: tuple[int, int] | None = None) -> Answer:
        """The predicted numbers with their names."""
        return Answer(_list_numbers(self._numbers(outputs)[0], classes))

    def describe_target(self, target: Tensor, classes: Sequence[str]) -> str:
        """The true numbers with their names."""
        return _list_numbers(target.reshape(-1), classes)

    def _numbers(self, outputs: Outputs) -> Tensor:
        values = outputs[self.output] if self.output in outputs else list_float_outputs(outputs)[0]
        return values.reshape(len(values), -1)


def _largest(statistics: Tensor) -> float:
    """The largest absolute target in the statistics of some samples."""
    return float(statistics[:, 1].max())


def _list_numbers(values: Tensor, names: Sequence[str]) -> str:
    return list_parts((f"{name_class(names, k)} {value:.3g}" for k, value in enumerate(values.tolist())), "no number")
