"""The layers that lost inputs, dense and slim version side by side, for all repairs that change weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.layout.rows import complement, input_layouts, list_removed_rows, members_by_module
from pxcompress.types import Pruned


@dataclass(frozen=True, eq=False)
class Consumer:
    """A convolution or linear layer that lost inputs, before and after.

    `layout` (features, k) gives the dense layer's input rows of every feature (`rows.input_layouts`), `removed` the
    features that are gone, `outputs` the dense layer's output rows that are still there; both ascending.
    """

    name: str
    dense: nn.Module
    slim: nn.Module
    layout: Tensor
    removed: Tensor
    outputs: Tensor

    @property
    def kept(self) -> Tensor:
        """The remaining features, ascending."""
        return complement(len(self.layout), self.removed)


def find_consumers(pruned: Pruned) -> list[Consumer]:
    """All layers of `pruned` that lost inputs, in the order of the groups."""
    layouts = input_layouts(pruned.dense, pruned.groups)
    producers = members_by_module(pruned.groups, "out")
    layers = []
    for name, owners in members_by_module(pruned.groups, "in").items():
        rows = list_removed_rows(owners, pruned.plan)
        if len(rows):
            dense, layout = pruned.dense.get_submodule(name), layouts[name]
            weight: Tensor = dense.weight  # type: ignore[assignment]
            removed_features = torch.isin(layout[:, 0], rows).nonzero().flatten()
            outputs = complement(len(weight), list_removed_rows(producers.get(name, ()), pruned.plan)).to(weight.device)
            layers.append(Consumer(name, dense, pruned.model.get_submodule(name), layout, removed_features, outputs))
    return layers


def is_padded(module: nn.Module) -> bool:
    """Whether a convolution pads with zeros, so that a constant input is not constant at the border."""
    padding = getattr(module, "padding", 0)
    return isinstance(padding, str) or any(padding if isinstance(padding, tuple) else (padding,))


def output_of_constants(layer: Consumer, values: Tensor) -> Tensor:
    """W_P x_P, (kept outputs,): the output of a layer due to its removed inputs, if these are the constants `values`
    (rows,).
    """
    weight: Tensor = layer.dense.weight.detach()  # type: ignore[operator]
    constants = torch.zeros(layer.layout.numel(), dtype=torch.float64, device=weight.device)
    rows = layer.layout[layer.removed].flatten()
    constants[rows] = values[rows].to(constants)
    parts = weight.double().chunk(getattr(layer.dense, "groups", 1))
    shifts = [
        torch.einsum("oik,i->o", part.reshape(len(part), len(value), -1), value)
        for part, value in zip(parts, constants.chunk(len(parts)), strict=True)
    ]
    return torch.cat(shifts)[layer.outputs].to(weight.dtype)


def add_bias_(module: nn.Module, shift: Tensor) -> None:
    """Add `shift` (outputs,) to a layer's bias, in place; a layer without a bias gets one."""
    add_(module, torch.zeros_like(module.weight), shift)  # type: ignore[arg-type]


def add_(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Add `weight` and `bias` to a layer's parameters, in place; a layer without a bias gets one if needed."""
    with torch.no_grad():
        module.weight += weight  # type: ignore[operator]
        if bias is None:
            return
        if module.bias is None:
            bias = bias.clone(memory_format=torch.contiguous_format)  # also strides of a single value
            module.bias = nn.Parameter(bias, requires_grad=module.weight.requires_grad)
        else:
            module.bias += bias  # type: ignore[operator]
