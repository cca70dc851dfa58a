"""Re-estimate BatchNorm statistics: pruning shifts what every normalisation sees."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pxcompress.layout.rows import members_by_module, others, removed_rows, rows_first
from pxcompress.passes.moments import RowSums
from pxcompress.processes import summed
from pxcompress.registry import option
from pxcompress.repair import REPAIRS
from pxcompress.state import device_of, observed
from pxcompress.types import Batches, Phase, Pruned


@REPAIRS.register("batchnorm")
@dataclass(frozen=True)
class BatchNormStatistics:
    """Running mean and variance as the average over the repair samples. Without BatchNorm nothing changes.

    With match=dense they are chosen such that every layer's output has the mean and deviation that it has in the dense
    model on the same samples: 0 and 1, up to its weight and bias, only where these are like the ones it was trained on.
    """

    match: str = option("unit", "moments at the output: 0 and 1, or the dense model's", choices=("unit", "dense"))
    phase: ClassVar[Phase] = "statistics"
    smallest: ClassVar[int] = 8
    """Samples of a batch, where memory is short: statistics of fewer are too far from those of all."""

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """One pass over `batches` with BatchNorm layers, and nothing else, in training mode; no labels.

        With match=dense one pass of the dense model comes before it.

        Batches of one sample have no variance and are passed over; without any other, statistics stay as they are.
        """
        norms = _norms(pruned.model)
        usable = (inputs for inputs, _ in batches if len(inputs) > 1)
        first = next(usable, None)
        if not norms or first is None:
            return pruned
        wanted = _wanted(pruned, batches) if self.match == "dense" else {}
        samples = 0
        with observed(pruned.model), _from_scratch(norms.values()), _moved(norms, wanted), torch.no_grad():
            for inputs in chain([first], usable):
                samples += len(inputs)
                for norm in norms.values():
                    norm.momentum = len(inputs) / samples
                pruned.model(inputs.to(device_of(pruned.model)))
        _average_(norms.values(), samples)
        for name, target in wanted.items():
            _match_(norms[name], *target)
        return pruned


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm layers that keep statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def _wanted(pruned: Pruned, batches: Batches) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation of what the dense model's layers normalise to on `batches`, (kept rows,) each."""
    sums = {name: RowSums() for name in _norms(pruned.dense)}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: sums[name].add(rows_first(args[0], module))

    with observed(pruned.dense), torch.no_grad():
        for name in sums:
            pruned.dense.get_submodule(name).register_forward_pre_hook(hook(name))
        for inputs, _ in batches:
            pruned.dense(inputs.to(device_of(pruned.dense)))
    owners = members_by_module(pruned.groups, "out")
    found = {}
    for name, norm in _norms(pruned.dense).items():
        seen = sums[name].everywhere()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).sqrt()
        mean = (seen.mean - norm.running_mean) / scale
        deviation = (seen.deviation.square() + norm.eps).sqrt() / scale
        kept = others(len(mean), removed_rows(owners.get(name, ()), pruned.plan)).to(mean.device)
        found[name] = mean[kept].float(), deviation[kept].float()
    return found


@contextmanager
def _moved(norms: Mapping[str, _BatchNorm], wanted: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Layers whose outputs have the wanted moments while they normalise with the batch: later ones see those."""
    before = {name: (norms[name].weight.data, norms[name].bias.data) for name in wanted if norms[name].affine}
    try:
        for name, (weight, bias) in before.items():
            mean, deviation = wanted[name]
            norms[name].weight.data, norms[name].bias.data = weight * deviation, bias + weight * mean
        yield
    finally:
        for name, (weight, bias) in before.items():
            norms[name].weight.data, norms[name].bias.data = weight, bias


def _match_(norm: _BatchNorm, mean: Tensor, deviation: Tensor) -> None:
    """Change statistics of the inputs so that what is normalised with them has these moments, in place."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    variance = ((norm.running_var + norm.eps) / deviation.square() - norm.eps).clamp_min(0)
    norm.running_mean -= mean * (variance + norm.eps).sqrt()
    norm.running_var.copy_(variance)


def _average_(norms: Collection[_BatchNorm], samples: int) -> None:
    """Statistics as means over the samples of all processes."""
    everywhere = float(summed(torch.tensor(float(samples), dtype=torch.float64)))
    for norm in norms:
        for value in (norm.running_mean, norm.running_var):
            if value is not None:
                value.copy_(summed(value * (samples / everywhere)))


@contextmanager
def _from_scratch(norms: Collection[_BatchNorm]) -> Iterator[None]:
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
