"""The task "agreement", which judges any model without labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pxcompress.proof import Metric
from pxcompress.tasks import TASKS
from pxcompress.tasks.task import Outputs, Task, kl_divergence, list_float_outputs


@TASKS.register("agreement")
@dataclass(frozen=True)
class Agreement(Task):
    """Similarity to the dense model's outputs, whatever they mean, so that samples need no targets.

    A model with one output (n, k) agrees if the largest value is at the same index; for others agreement is 1 minus the
    error as a share of the outputs' variance.
    """

    metric = Metric("agreement")
    layouts = ("unlabelled",)

    def agreement(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """For each sample 1 if the largest value is at the same index, else 0.

        For other outputs 1 minus the relative error.
        """
        values = list_float_outputs(outputs)
        if _are_logits(values):
            return (values[0].argmax(1) == list_float_outputs(dense)[0].argmax(1)).double()
        return super().agreement(outputs, dense)

    def divergence(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """KL divergence of the softmax for one output (n, k); for other outputs the relative error, (n,)."""
        values = list_float_outputs(outputs)
        return (
            kl_divergence(values[0], list_float_outputs(dense)[0])
            if _are_logits(values)
            else super().divergence(outputs, dense)
        )


def _are_logits(values: list[Tensor]) -> bool:
    return len(values) == 1 and values[0].dim() == 2 and values[0].shape[1] > 1
