"""Put the mean of what the removed units carried into the biases: the least that a repair can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pxcompress.collect import moments
from pxcompress.consumers import add_, consumers
from pxcompress.repair import REPAIRS
from pxcompress.types import Batches, Pruned


@REPAIRS.register("mean-absorption")
@dataclass(frozen=True)
class MeanAbsorption:
    """bias += W_P E[x_P] in every consumer. A centred fold does this too: give one of the two."""

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """One pass of the dense model over `batches`. At zero-padded borders the mean is put in as well."""
        layers = consumers(pruned)
        found = moments(pruned.dense, {layer.name: layer.layout for layer in layers}, batches)
        for layer in layers:
            weight: Tensor = layer.dense.weight.detach()  # type: ignore[operator]
            parts = weight.double().chunk(getattr(layer.dense, "groups", 1))
            mean = found[layer.name].mean.clone()
            mean[layer.kept] = 0
            shifts = [
                torch.einsum("oik,i->o", part.reshape(len(part), len(each), -1), each)
                for part, each in zip(parts, mean.chunk(len(parts)), strict=True)
            ]
            add_(layer.slim, torch.zeros((), dtype=weight.dtype), torch.cat(shifts).to(weight.dtype)[layer.outputs])
        return pruned
