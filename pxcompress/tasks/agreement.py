"""Agreement: the judge of any model without labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pxcompress.proof import Metric
from pxcompress.tasks import TASKS
from pxcompress.tasks.task import Outputs, Task, kl_divergence, list_float_outputs


@TASKS.register("agreement")
@dataclass(frozen=True)
class Agreement(Task):
    """Nearness to the dense model's outputs, whatever they mean: samples need no targets.

    A model with one output (n, k) agrees where the largest value has the same place, any other by 1 less the error as
    a share of the outputs' variance.
    """

    metric = Metric("agreement")
    layouts = ("unlabelled",)

    def agreement(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """1 for the same place of the largest value, else 0; of other outputs 1 less the normalised error."""
        values = list_float_outputs(outputs)
        if _are_logits(values):
            return (values[0].argmax(1) == list_float_outputs(dense)[0].argmax(1)).double()
        return super().agreement(outputs, dense)

    def divergence(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """KL divergence of the softmax of one output (n, k), of others the normalised error."""
        values = list_float_outputs(outputs)
        return (
            kl_divergence(values[0], list_float_outputs(dense)[0])
            if _are_logits(values)
            else super().divergence(outputs, dense)
        )


def _are_logits(values: list[Tensor]) -> bool:
    return len(values) == 1 and values[0].dim() == 2 and values[0].shape[1] > 1
