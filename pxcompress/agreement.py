"""How near a pruned model's outputs are to the dense model's: what choices are judged by without labels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from pxcompress.models.adapter import Adapter
from pxcompress.models.outputs import floats
from pxcompress.notes import silent
from pxcompress.passes.memory import in_smaller_batches
from pxcompress.passes.parts import InParts
from pxcompress.processes import summed
from pxcompress.state import device_of, evaluating
from pxcompress.types import Agreement, Batches

KEPT_BYTES = 1 << 28
"""Outputs of the dense model that are kept between comparisons, at most; beyond that it runs again for each."""


class DenseOutputs:
    """The dense model's outputs on a set of samples, to compare pruned models with. Empty batches are allowed."""

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self._model = model
        self._batches = InParts(batches)
        self._kept: list[Tensor] | None = None

    def compare(self, model: nn.Module) -> Agreement:
        """One pass of `model`, over all processes' samples; of the dense model too where its outputs are not kept.

        In smaller batches where memory asks for them.
        """
        sums = in_smaller_batches(partial(self._sums, model), self._batches, silent)
        samples, share, divergence = summed(sums.to(device_of(model))).tolist()
        return Agreement(int(samples), share / max(samples, 1), divergence / max(samples, 1))

    def _sums(self, model: nn.Module, batches: Batches) -> Tensor:
        sums = torch.zeros(3, dtype=torch.float64)
        seen: list[list[Tensor]] = []
        first = size = 0
        for inputs, _ in batches:
            dense = self._dense(inputs, first)
            first += len(inputs)
            size += sum(value.numel() * value.element_size() for value in dense)
            if self._kept is None and size <= KEPT_BYTES:
                seen.append(dense)
            with evaluating(model), torch.no_grad():
                pruned = _outputs(model, inputs.to(device_of(model)))
            sums += _compared(model, dense, pruned)
        if self._kept is None and seen and size <= KEPT_BYTES:
            self._kept = [torch.cat(parts) for parts in zip(*seen, strict=True)]
        return sums

    def _dense(self, inputs: Tensor, first: int) -> list[Tensor]:
        """What the dense model makes of `inputs`, the first of which has the number `first`."""
        if self._kept is not None:
            return [value[first : first + len(inputs)] for value in self._kept]
        with evaluating(self._model), torch.no_grad():
            return [value.cpu() for value in _outputs(self._model, inputs.to(device_of(self._model)))]


def _outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Logits alone where they are what counts, else every floating-point tensor (n, ...) that comes out."""
    if not isinstance(model, Adapter) or model.signature_.logits is not None:
        return [model(inputs)]
    return [value for value in floats(model.outputs_(inputs)) if value.dim() and len(value) == len(inputs)]


def _compared(model: nn.Module, dense: list[Tensor], pruned: list[Tensor]) -> Tensor:
    """Samples, and the sums over them of what they share and of their divergence, (3,) float64."""
    pairs = [(one.double(), other.double().cpu()) for one, other in zip(dense, pruned, strict=True)]
    samples = len(pairs[0][0])
    if len(pairs) == 1 and pairs[0][0].dim() == 2 and pairs[0][0].shape[1] > 1 and _are_logits(model):
        one, other = pairs[0]
        same = (one.argmax(1) == other.argmax(1)).double().sum()
        divergence = kl_div(other.log_softmax(1), one.log_softmax(1), reduction="sum", log_target=True)
    else:
        errors = torch.stack([_relative_errors(one, other) for one, other in pairs]).mean(0)
        same, divergence = (1 - errors).clamp_min(0).sum(), errors.sum()
    return torch.stack([torch.tensor(float(samples), dtype=torch.float64), same, divergence])


def _are_logits(model: nn.Module) -> bool:
    return not isinstance(model, Adapter) or model.signature_.logits is not None


def _relative_errors(dense: Tensor, pruned: Tensor) -> Tensor:
    """Squared error of every sample over the mean squared size of the dense output around its mean, (n,)."""
    scale = (dense - dense.mean()).square().mean().clamp_min(1e-12)
    return (
        (pruned - dense).square().flatten(1).mean(1) / scale if dense.dim() > 1 else (pruned - dense).square() / scale
    )
