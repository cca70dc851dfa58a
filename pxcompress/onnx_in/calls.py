"""Functions for steps without a layer: an operator of the table with its attributes, and some of our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pxcompress.onnx_in.operators.layers import pad_sides, window
from pxcompress.onnx_in.operators.reductions import REDUCTIONS
from pxcompress.onnx_in.operators.table import Settings

BOUND: dict[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Split": (1,),
    "Pad": (1, 2, 3),
    "Clip": (1, 2),
    "Expand": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
    "CumSum": (1,),
    "OneHot": (1,),
    "Trilu": (1,),
    "ConstantOfShape": (0,),
    **dict.fromkeys(REDUCTIONS, (1,)),
}
"""Operator -> positions of those inputs that are settings, such as axes or sizes, not data."""


@dataclass(frozen=True)
class Call:
    """An operator with its attributes; `bound` holds inputs that are constant settings, by position."""

    function: Callable[..., Any]
    settings: Settings
    bound: Mapping[int, Any]
    arity: int

    def __call__(self, *inputs: Any) -> Any:
        arguments = [*inputs, *[None] * (self.arity - len(inputs))]
        for place, value in self.bound.items():
            arguments[place] = value
        return self.function(self.settings, *arguments)


@dataclass(frozen=True)
class Chunk:
    """Cuts a tensor into equal parts along an axis.

    Each is a copy, because torch-pruning counts readers of a tensor.
    """

    parts: int
    axis: int

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.clone() for part in x.chunk(self.parts, self.axis))


@dataclass(frozen=True)
class Select:
    """Picks one index along an axis and drops the axis."""

    axis: int
    place: int

    def __call__(self, x: Tensor) -> Tensor:
        return x.select(self.axis, self.place)


@dataclass(frozen=True)
class Padding:
    """Pads an image with zeros, as many as a node asks for: fixed, or depending on the image's size."""

    settings: Settings
    kernel: Sequence[int]

    def __call__(self, x: Tensor) -> Tensor:
        return F.pad(x, pad_sides(window(self.settings, x.shape[2:], self.kernel)[2]))


def spatial_sizes(sizes: list[int], shapes: Sequence[Sequence[int]]) -> list[int]:
    """Target sizes of a Resize, with 0 for batch and channels if they equal those of all `shapes` of its input."""
    keeps = all(len(shape) == len(sizes) and list(shape[:2]) == sizes[:2] for shape in shapes)
    return [0, 0, *sizes[2:]] if keeps else sizes


def swap_heads(x: Tensor) -> Tensor:
    """Swap the axes of tokens and heads: (n, tokens, heads, size) -> (n, heads, tokens, size), and back."""
    return x.transpose(1, 2)


def heads_of(name: str) -> str:
    """Name for an attention's result as (n, heads, tokens, size), made from its node's name for (n, tokens, width)."""
    return f"{name}:heads"
