"""The objective of training a slim model: to follow the dense model's outputs, and labels if asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pxcompress.errors import DataError
from pxcompress.models.adapter import Adapter, named_outputs
from pxcompress.models.outputs import is_real
from pxcompress.processes import sum_over_processes
from pxcompress.tasks.task import Outputs, relative_errors
from pxcompress.types import Batches

LOGITS = "logits"
"""Name of a classifier's only output."""


class Objective:
    """What a slim model is trained towards: the dense model's outputs and, if asked for, labels."""

    def __init__(self, dense: nn.Module, temperature: float, labels: bool) -> None:
        self.dense = dense
        self._temperature = temperature
        self._labels = labels

    def loss(self, outputs: Outputs, target: Outputs, labels: Tensor) -> Tensor:
        """The loss to minimise, a mean over samples. `target` are the dense model's outputs.

        Raises `DataError` for labels that are no class.
        """
        if isinstance(self.dense, Adapter):
            return _distances(self.dense, outputs, target).mean().float()
        logits = outputs[LOGITS]
        loss = _divergence(logits, target[LOGITS], self._temperature) / len(logits)
        if not self._labels:
            return loss
        low, high, classes = int(labels.min()), int(labels.max()), logits.shape[1]
        if low < 0 or high >= classes:
            raise DataError(
                f"label {low if low < 0 else high} for a model of {classes} classes; expected 0 to {classes - 1}: "
                "correct the labels, or fine-tune without them (labels=false)"
            )
        return loss + F.cross_entropy(logits, labels)

    def error(self, outputs: Outputs, target: Outputs, labels: Tensor) -> float:
        """The error by which weights are chosen, summed over samples: distance from the dense model, or wrong answers.

        Wrong answers count if labels are used.
        """
        if isinstance(self.dense, Adapter):
            return float(_distances(self.dense, outputs, target).sum())
        if self._labels:
            return float((outputs[LOGITS].argmax(dim=1) != labels).sum())
        return float(_divergence(outputs[LOGITS], target[LOGITS], 1.0))


def named_predictions(model: nn.Module, inputs: Tensor) -> Outputs:
    """A model's outputs by name: `LOGITS` (n, classes) for a classifier, all outputs (n, ...) for an adapted module.

    If they have a value for every position of a text, those of padding are 0.
    """
    if not isinstance(model, Adapter):
        return {LOGITS: model(inputs).float()}
    outputs, counted = named_outputs(model, inputs), model.signature_.find_counted(inputs)
    if counted is None:
        return outputs
    return {
        name: value.masked_fill(~counted[..., None], 0.0)
        if value.dim() == 3 and value.shape[:2] == counted.shape
        else value
        for name, value in outputs.items()
    }


def _distances(dense: Adapter, outputs: Outputs, target: Outputs) -> Tensor:
    """Distance of `outputs` from the dense model's for every sample, (n,).

    It is the task's divergence if it has one, else the mean over floating-point outputs of their squared errors over
    the variance of the dense ones.
    """
    if dense.signature_.divergence is not None:
        return dense.signature_.divergence(outputs, target)
    names = [name for name, value in target.items() if is_real(value)]
    return torch.stack([relative_errors(outputs[name].float(), target[name].float()) for name in names]).mean(0)


def _divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(target / T), softmax(logits / T)), summed over samples; T^2 keeps the size of gradients.

    T is the `temperature`.
    """
    log_slim, log_dense = (logits / temperature).log_softmax(1), (target / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_slim, log_dense, reduction="sum", log_target=True)


class Validation:
    """A function from a model to its mean error on held-out samples; it stores the dense model's outputs for that."""

    def __init__(self, aim: Objective, held_out: Batches, samples: int, device: torch.device) -> None:
        self._aim = aim
        self._held_out = held_out
        self._samples = samples
        self._device = device
        self._targets = [target for target, _ in self._outputs(aim.dense)]

    def __call__(self, model: nn.Module) -> float:
        """Mean error of `model`, with its present weights, over the held-out samples of all processes."""
        pairs = zip(self._outputs(model), self._targets, strict=True)
        error = sum(self._aim.error(outputs, target, labels) for (outputs, labels), target in pairs)
        total, samples = sum_over_processes(
            torch.tensor([error, self._samples], dtype=torch.float64, device=self._device)
        ).tolist()
        return float(total / samples)

    def _outputs(self, model: nn.Module) -> Iterator[tuple[Outputs, Tensor]]:
        """The model's outputs and the labels, batch by batch."""
        for inputs, labels in self._held_out:
            with torch.no_grad():
                outputs = named_predictions(model, inputs.to(self._device))
            yield outputs, labels.to(self._device)
