"""Re-estimate BatchNorm statistics: pruning shifts what every normalisation sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pxcompress.repair import REPAIRS
from pxcompress.state import device_of, observed
from pxcompress.types import Batches, Pruned


@REPAIRS.register("batchnorm")
@dataclass(frozen=True)
class BatchNormStatistics:
    """Running mean and variance as the average over the repair batches. Without BatchNorm nothing changes."""

    def __call__(self, pruned: Pruned, batches: Batches) -> Pruned:
        """One pass over `batches` with BatchNorm layers, and nothing else, in training mode; no labels."""
        norms = [
            module for module in pruned.model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
        ]
        if not norms:
            return pruned
        momenta = [norm.momentum for norm in norms]
        device = device_of(pruned.model)
        with observed(pruned.model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for inputs, _ in batches:
                if len(inputs) > 1:
                    pruned.model(inputs.to(device))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return pruned
