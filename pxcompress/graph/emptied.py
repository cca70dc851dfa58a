"""Layers that have lost all of their outputs or inputs: what stays of a branch of which no unit is kept.

A layer without outputs gives a tensor without channels; one without inputs gives its bias, wherever it is read. Nothing
of either is left in an exported file but that constant. Parameters keep their names and axes, one of them of length 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from pxcompress.graph.dependencies import CONVOLUTIONS
from pxcompress.types import Group, Plan


def empty_(model: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
    """Make the layers of all groups that lost every unit compute nothing, in place; their rows are gone already."""
    for group in groups:
        if plan.kept(group):
            continue
        for member in (member for member in group.members if member.dim is None):
            module: Any = model.get_submodule(member.module)
            if member.axis == "out":
                _turn_(module, _Silent)
            elif not isinstance(module, _Silent) and not module.weight.shape[1]:
                _turn_(module, _Constant)
        if group.kind == "head":
            attention: Any = model.get_submodule(group.name)
            attention.reads = group.consumers[0].module.removeprefix(f"{group.name}.")
            _turn_(attention, _Unattended)


class _Silent:
    """A layer without outputs: (n, 0, positions ...), or (..., 0) where it is a linear one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(_shape(self, x, 0))


class _Constant:
    """A layer without inputs: its bias everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # type: ignore[attr-defined]
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        shape = _shape(self, x, len(weight))
        axes = 1 if isinstance(self, nn.Linear) else len(shape) - 1
        return bias.reshape(-1, *[1] * (axes - 1)).expand(shape).clone()  # a copy: what follows may write into it


class _Unattended:
    """Attention without heads: what its output projection makes of nothing."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        return self.get_submodule(self.reads)(x)  # type: ignore[attr-defined]


def _shape(layer: Any, x: Tensor, outputs: int) -> tuple[int, ...]:
    """Shape of what `layer` makes of `x`, with `outputs` channels."""
    if isinstance(layer, nn.Linear):
        return (*x.shape[:-1], outputs)
    if not isinstance(layer, CONVOLUTIONS):
        return (x.shape[0], outputs, *x.shape[2:])
    sizes = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, _padding(layer), strict=True)
    return (
        x.shape[0],
        outputs,
        *((size + pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, step, gap, pad in sizes),
    )


def _padding(layer: Any) -> list[int]:
    """Zeros that a convolution adds along every axis, on both sides together."""
    if layer.padding == "same":
        return [gap * (kernel - 1) for gap, kernel in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [0 if layer.padding == "valid" else 2 * pad for pad in layer.padding]


def _turn_(module: Any, kind: type) -> None:
    """Let `module` compute as `kind` does, and be what it was else."""
    if not isinstance(module, kind):
        module.__class__ = _turned(kind, module.__class__)
    if getattr(module, "groups", 1) == 0:
        module.groups = 1


@cache
def _turned(kind: type, layer: type) -> type:
    return type(f"{kind.__name__.strip('_')}{layer.__name__}", (kind, layer), {})
