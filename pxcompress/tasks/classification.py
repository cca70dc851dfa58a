"""The task "classification": one class for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pxcompress.proof import Metric
from pxcompress.tasks import TASKS
from pxcompress.tasks.answer import Answer, name_class
from pxcompress.tasks.task import Outputs, Task, kl_divergence, pick_output


@TASKS.register("classification")
@dataclass(frozen=True)
class Classification(Task):
    """One class for each sample, the largest of its logits (n, classes); judged by top-1 accuracy."""

    metric = Metric("top-1", binary=True)
    layouts = ("classes",)
    is_classifier = True
    reads_dense = False
    output_name = "logits"

    def logits(self, outputs: Outputs) -> Tensor:
        """The logits of all classes, (n, classes)."""
        return _logits(outputs)

    def class_outputs(self, outputs: Outputs) -> Tensor:
        """The logits of all classes, (n, classes), from which probabilities are computed."""
        return _logits(outputs)

    def statistics(self, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
        """For each sample: whether the class is right, the predicted class, and the label, (n, 3)."""
        predicted = _logits(outputs).argmax(1)
        return torch.stack([(predicted == targets).double(), predicted.double(), targets.double()], 1)

    def agreement(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """For each sample 1 if both models predict the same class, else 0."""
        return (_logits(outputs).argmax(1) == _logits(dense).argmax(1)).double()

    def divergence(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """KL divergence from the dense model's distribution over classes, (n,)."""
        return kl_divergence(_logits(outputs), _logits(dense))

    def answer(self, outputs: Outputs, classes: Sequence[str], size: tuple[int, int] | None = None) -> Answer:
        """The predicted class and its softmax probability."""
        probabilities = _logits(outputs)[0].softmax(0)
        best = int(probabilities.argmax())
        return Answer(name_class(classes, best), float(probabilities[best]))

    def describe_target(self, target: Tensor, classes: Sequence[str]) -> str:
        """The name of the true class."""
        return name_class(classes, int(target))


def _logits(outputs: Outputs) -> Tensor:
    return pick_output(outputs, "logits", 2, "logits (n, classes)")
