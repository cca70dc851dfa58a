"""The one table of operators, and what its functions share.

A function of the table gets the `Settings` of a node and its inputs as tensors, None for inputs that are left out, and
gives a tensor or a tuple of tensors. Whole numbers that say how (axes, sizes, pads) come as tensors, lists or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Operator = Callable[..., Any]
F = TypeVar("F", bound=Operator)

OPERATORS: dict[str, Operator] = {}
"""ONNX's name of an operator -> the function that computes it."""

DTYPES: Mapping[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""ONNX's number of a data type -> PyTorch's type."""


class Unsupported(Exception):
    """An operator, or a way of using one, that has no counterpart here."""


@dataclass(frozen=True)
class Settings:
    """Settings of a node: its attributes, the opset that gives them their meaning, its count of outputs."""

    attributes: Mapping[str, Any]
    opset: int
    outputs: int = 1

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute `name`, or what ONNX takes where the node leaves it out."""
        return self.attributes.get(name, default)


def operator(*names: str) -> Callable[[F], F]:
    """Decorator: register a function as the one that computes the operators of these ONNX names, each only once."""

    def add(function: F) -> F:
        for name in names:
            if name in OPERATORS:
                raise ValueError(f"operator {name!r} is in the table already")
            OPERATORS[name] = function
        return function

    return add


def to_ints(value: Tensor | Sequence[int] | None) -> list[int]:
    """Whole numbers of a tensor or list; none for None."""
    if value is None:
        return []
    return [int(each) for each in (value.reshape(-1).tolist() if isinstance(value, Tensor) else value)]


def to_number(value: Any) -> Any:
    """The only number of a tensor; anything else as it is."""
    return value.item() if isinstance(value, Tensor) else value


def axes_of(node: Settings, axes: Any) -> list[int]:
    """Axes as an input, as newer opsets have them, else as an attribute."""
    return to_ints(axes) if axes is not None else list(node.get("axes", ()))
