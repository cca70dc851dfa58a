"""Adds the mean effect of removed units to biases, the simplest repair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from pxcompress.layout.consumers import add_bias_, find_consumers, output_of_constants
from pxcompress.passes.moments import collect_moments
from pxcompress.repair import REPAIRS
from pxcompress.types import Batches, Phase, Pruned, Repair


@REPAIRS.register("mean-absorption")
@dataclass(frozen=True)
class MeanAbsorption(Repair):
    """Add what removed units contributed on average to the next layers' biases: bias += W_P E[x_P].

    A centred fold does this too: give one of the two.
    """

    phase: ClassVar[Phase] = "absorb"

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """Change the biases of all layers that lost inputs, from one pass of the dense model over `batches`.

        The mean is also added at borders that are padded with zeros.
        """
        layers = find_consumers(pruned)
        inputs_of = collect_moments(pruned.dense, {layer.name: layer.layout for layer in layers}, batches)
        for layer in layers:
            rows = torch.zeros(layer.layout.numel(), dtype=torch.float64)
            rows[layer.layout] = inputs_of[layer.name].whole.mean.cpu()[:, None]
            add_bias_(layer.slim, output_of_constants(layer, rows))
        return pruned
