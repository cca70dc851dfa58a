"""The task "multi-label": any number of classes for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pxcompress.errors import InputError
from pxcompress.proof import Metric
from pxcompress.tasks import TASKS
from pxcompress.tasks.answer import Answer, list_parts, name_class
from pxcompress.tasks.task import Outputs, Task, pick_output


@TASKS.register("multi-label")
@dataclass(frozen=True)
class MultiLabel(Task):
    """Any number of classes for each sample, by the signs of logits (n, classes); judged by mean average precision."""

    metric = Metric("mAP")
    layouts = ("labels",)
    reads_dense = False
    output_name = "logits"
    subject = "all labels"

    def logits(self, outputs: Outputs) -> Tensor:
        """Sum of the absolute logits of each sample, (n,), since the absence of a class is a decision too."""
        return _logits(outputs).abs().sum(1)

    def statistics(self, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
        """The logits and targets of each sample, (n, 2 * classes)."""
        return torch.cat([_logits(outputs).double(), targets.double()], 1)

    def quality(self, statistics: Tensor) -> float:
        """Mean over the classes that occur of their average precision."""
        from torchmetrics.functional.classification import multilabel_average_precision

        logits, targets = statistics.chunk(2, 1)
        occurs = targets.any(0)
        if not occurs.any():
            return 0.0
        precision = multilabel_average_precision(
            logits[:, occurs], targets[:, occurs].long(), int(occurs.sum()), validate_args=False
        )
        return float(precision)

    def agreement(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """Share of the classes on which both models decide alike, (n,)."""
        return ((_logits(outputs) > 0) == (_logits(dense) > 0)).double().mean(1)

    def divergence(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """KL divergence from the dense model's yes-or-no distribution of each class, a mean over classes, (n,)."""
        one, other = _logits(dense).double(), _logits(outputs).double()
        there = one.sigmoid() * (logsigmoid(one) - logsigmoid(other))
        return (there + (-one).sigmoid() * (logsigmoid(-one) - logsigmoid(-other))).mean(1)

    def loss(self, statistics: Tensor) -> Tensor:
        """Share of the classes that are decided wrongly, (n,)."""
        logits, targets = statistics.chunk(2, 1)
        return ((logits > 0) != (targets > 0.5)).double().mean(1)

    def check(self, outputs: Outputs, targets: Tensor) -> None:
        """Raise `InputError` for data with another number of classes than the model."""
        classes_in_data, returned = targets.shape[1], _logits(outputs).shape[1]
        if classes_in_data != returned:
            raise InputError(f"the data have {classes_in_data} classes, the model has {returned}; give as many")

    def answer(self, outputs: Outputs, classes: Sequence[str], size: tuple[int, int] | None = None) -> Answer:
        """The labels with a probability above 0.5."""
        probabilities = _logits(outputs)[0].sigmoid()
        labels = (probabilities > 0.5).nonzero()[:, 0].tolist()
        return Answer(list_parts((f"{name_class(classes, k)} {probabilities[k]:.2f}" for k in labels), "no label"))

    def describe_target(self, target: Tensor, classes: Sequence[str]) -> str:
        """The names of the true labels."""
        return list_parts((name_class(classes, k) for k in target.nonzero()[:, 0].tolist()), "no label")


def _logits(outputs: Outputs) -> Tensor:
    return pick_output(outputs, "logits", 2, "logits (n, classes)")
