"""Restores the mean and variance of layers' outputs, for nets without BatchNorm, whose statistics could be changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pxcompress.layout.consumers import add_, find_consumers
from pxcompress.passes.matching import moment_changes
from pxcompress.repair import REPAIRS
from pxcompress.state import device_of, evaluating
from pxcompress.types import Batch, Batches, Phase, Pruned, Repair


@REPAIRS.register("variance-matching")
@dataclass(frozen=True)
class VarianceMatching(Repair):
    """Scale and shift the outputs of layers that lost inputs, so that mean and variance are the dense model's."""

    phase: ClassVar[Phase] = "statistics"

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """Match layers from one pass of the dense and one of the pruned model; later layers see earlier ones matched.

        Layers whose outputs go straight into BatchNorm are left to the repair `batchnorm`.
        """
        first_batch = next(iter(batches), None)
        if first_batch is None:
            return pruned
        layers = {layer.name: layer for layer in find_consumers(pruned)}
        for name in _find_normalised(pruned.dense, list(layers), first_batch):
            del layers[name]
        rows = {name: layer.outputs for name, layer in layers.items()}
        changes = moment_changes(pruned.dense, pruned.model, rows, "out", batches)
        for name, (scale, shift) in changes.items():
            layer = layers[name]
            weight: Tensor = layer.slim.weight.detach()  # type: ignore[operator]
            bias = 0.0 if layer.slim.bias is None else layer.slim.bias.detach()  # type: ignore[operator]
            shape = (-1, *[1] * (weight.ndim - 1))
            add_(layer.slim, weight * (scale.to(weight).reshape(shape) - 1), (bias * (scale - 1) + shift).to(weight))
        return pruned


def _find_normalised(model: nn.Module, names: list[str], batch: Batch) -> set[str]:
    """Those of `names` whose output is the input of a BatchNorm layer."""
    owners: dict[int, str] = {}
    outputs: list[Tensor] = []
    normalised_names: set[str] = set()

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            outputs.append(output)  # so that no later tensor takes its id
            owners[id(output)] = name

        return add

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if id(args[0]) in owners:
            normalised_names.add(owners[id(args[0])])

    with evaluating(model), torch.no_grad():
        for name in names:
            model.get_submodule(name).register_forward_hook(note(name))
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(look)
        model(batch[0][:1].to(device_of(model)))
    return normalised_names
