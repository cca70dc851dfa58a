"""Re-estimate BatchNorm statistics: pruning shifts what every normalisation sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pxcompress.ranks import summed
from pxcompress.repair import REPAIRS
from pxcompress.state import device_of, observed
from pxcompress.types import Batches, Pruned


@REPAIRS.register("batchnorm")
@dataclass(frozen=True)
class BatchNormStatistics:
    """Running mean and variance as the average over the repair samples. Without BatchNorm nothing changes."""

    requires: ClassVar[tuple[str, ...]] = ("fold", "mean-absorption", "least-squares")

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """One pass over `batches` with BatchNorm layers, and nothing else, in training mode; no labels.

        Batches of one sample have no variance and are passed over; without any other, statistics stay as they are.
        """
        norms = [
            module for module in pruned.model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
        ]
        usable = (inputs for inputs, _ in batches if len(inputs) > 1)
        first = next(usable, None)
        if not norms or first is None:
            return pruned
        samples = 0
        with observed(pruned.model), _from_scratch(norms), torch.no_grad():
            for inputs in chain([first], usable):
                samples += len(inputs)
                for norm in norms:
                    norm.momentum = len(inputs) / samples
                pruned.model(inputs.to(device_of(pruned.model)))
        _average_(norms, samples)
        return pruned


def _average_(norms: Sequence[_BatchNorm], samples: int) -> None:
    """Statistics as means over the samples of all processes."""
    everywhere = float(summed(torch.tensor(float(samples), dtype=torch.float64)))
    for norm in norms:
        for value in (norm.running_mean, norm.running_var):
            if value is not None:
                value.copy_(summed(value * (samples / everywhere)))


@contextmanager
def _from_scratch(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Layers in training mode whose statistics start anew; momenta are restored."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
