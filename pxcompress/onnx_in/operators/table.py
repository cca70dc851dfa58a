"""The table of all operators that can be run, and functions that they share.

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
"""ONNX's name of an operator -> the function that computes it, called with the node's settings and inputs."""

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
    """Raised for an operator, or an option of one, that is not supported here."""


@dataclass(frozen=True)
class Settings:
    """A node's attributes, the opset that defines their meaning, and its number of outputs."""

    attributes: Mapping[str, Any]
    opset: int
    outputs: int = 1

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute `name`, or `default` if the node does not have it."""
        return self.attributes.get(name, default)


def operator(*names: str) -> Callable[[F], F]:
    """A decorator that registers a function under the ONNX names of the operators that it computes."""

    def add(function: F) -> F:
        for name in names:
            if name in OPERATORS:
                raise ValueError(f"operator {name!r} is in the table already")
            OPERATORS[name] = function
        return function

    return add


def to_ints(value: Tensor | Sequence[int] | None) -> list[int]:
    """The whole numbers in a tensor or list; an empty list for None."""
    if value is None:
        return []
    return [int(each) for each in (value.reshape(-1).tolist() if isinstance(value, Tensor) else value)]


def to_number(value: Any) -> Any:
    """The single number in a tensor; anything else is returned as it is."""
    return value.item() if isinstance(value, Tensor) else value


def axes_of(node: Settings, axes: Any) -> list[int]:
    """The axes given as an input, as in newer opsets, else those in the attribute "axes"."""
    return to_ints(axes) if axes is not None else list(node.get("axes", ()))
