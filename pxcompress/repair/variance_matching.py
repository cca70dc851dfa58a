"""Give layers the output mean and variance that they had, in nets without BatchNorm to re-estimate.

After Jordan et al., "REPAIR" (https://arxiv.org/abs/2211.08403), where statistics of merged networks are reset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pxcompress.layout.consumers import Consumer, add_, consumers
from pxcompress.layout.rows import rows_first
from pxcompress.passes.moments import RowSums
from pxcompress.repair import REPAIRS
from pxcompress.state import device_of, observed
from pxcompress.types import Batch, Batches, Phase, Pruned

LARGEST = 10.0
"""A row is scaled by this factor, or its inverse, at most: a variance of nearly zero says nothing."""


@REPAIRS.register("variance-matching")
@dataclass(frozen=True)
class VarianceMatching:
    """Scale and shift every output of a consumer so that its mean and variance are those it had in the dense model."""

    phase: ClassVar[Phase] = "statistics"

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """One pass of the dense and one of the slim model over `batches`; a layer sees those before it matched.

        Layers whose outputs go straight into BatchNorm are left to the repair `batchnorm`.
        """
        first = next(iter(batches), None)
        if first is None:
            return pruned
        layers = {layer.name: layer for layer in consumers(pruned)}
        for name in _normalised(pruned.dense, list(layers), first):
            del layers[name]
        wanted = _sums(pruned.dense, layers, batches)
        found = _sums(pruned.model, layers, batches, wanted)
        for name, layer in layers.items():
            scale, shift = _change(wanted[name], found[name], layer.outputs)
            weight: Tensor = layer.slim.weight.detach()  # type: ignore[operator]
            bias = 0.0 if layer.slim.bias is None else layer.slim.bias.detach()  # type: ignore[operator]
            shape = (-1, *[1] * (weight.ndim - 1))
            add_(layer.slim, weight * (scale.to(weight).reshape(shape) - 1), (bias * (scale - 1) + shift).to(weight))
        return pruned


def _change(wanted: RowSums, found: RowSums, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """s and t, (outputs,) float64, such that s y + t has the wanted moments; dead rows are only shifted."""
    mean, deviation = wanted.mean[outputs], wanted.deviation[outputs]
    ratio = (deviation / found.deviation).clamp(1 / LARGEST, LARGEST)
    scale = torch.where((found.deviation > 0) & (deviation > 0), ratio, torch.ones_like(ratio))
    return scale, mean - scale * found.mean


def _sums(
    model: nn.Module, layers: Mapping[str, Consumer], batches: Batches, wanted: Mapping[str, RowSums] | None = None
) -> dict[str, RowSums]:
    """Output moments of `layers`; with `wanted`, each batch leaves a layer with those moments."""
    sums = {name: RowSums() for name in layers}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            rows = rows_first(output, module)
            sums[name].add(rows)
            if wanted is None:
                return None
            here = RowSums()
            here.add(rows)
            scale, shift = (each.to(output) for each in _change(wanted[name], here, layers[name].outputs))
            axis = -1 if isinstance(module, nn.Linear) else 1
            shape = [-1 if place == axis % output.ndim else 1 for place in range(output.ndim)]
            return output * scale.reshape(shape) + shift.reshape(shape)

        return add

    with observed(model), torch.no_grad():
        for name in layers:
            model.get_submodule(name).register_forward_hook(hook(name))
        for inputs, _ in batches:
            model(inputs.to(device_of(model)))
    return {name: each.everywhere() for name, each in sums.items()}


def _normalised(model: nn.Module, names: list[str], batch: Batch) -> set[str]:
    """Those of `names` whose output is the input of a BatchNorm layer."""
    owners: dict[int, str] = {}
    kept: list[Tensor] = []
    found: set[str] = set()

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            kept.append(output)  # so that no later tensor takes its id
            owners[id(output)] = name

        return add

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if id(args[0]) in owners:
            found.add(owners[id(args[0])])

    with observed(model), torch.no_grad():
        for name in names:
            model.get_submodule(name).register_forward_hook(note(name))
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(look)
        model(batch[0][:1].to(device_of(model)))
    return found
