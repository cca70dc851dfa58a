"""Where a module and its layers come from: the graph, its nodes, and what is known of its values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from pxcompress.onnx_in.half import Types
from pxcompress.onnx_in.operators.table import to_ints
from pxcompress.onnx_in.trial import Trials

MOST_NUMBERS = 16
"""Most elements that an integer constant may have to be taken for sizes, axes or bounds."""


@dataclass(frozen=True)
class Origin:
    """The nodes that a layer stands for, and the digest of what was `read`. `kind` says how its weights lie there.

    `unflattened` is (channels, height, width) of what a linear layer reads with the channels last in the file, where it
    is named `flat`; in the module they come first. Copies of a module share it.
    """

    kind: str
    nodes: tuple[ir.Node, ...]
    unflattened: tuple[int, int, int] | None = None
    flat: str = ""
    read: str = ""

    def __deepcopy__(self, memo: Any) -> Origin:
        return self

    def has_changed(self, layer: nn.Module) -> bool:
        """Whether a layer has other values than those that were read."""
        return digest(layer) != self.read


def digest(layer: nn.Module) -> str:
    """Hashes of a layer's values and shapes, by which `Origin` tells whether they are still those that were read."""
    return " ".join(f"{name}:{digest_of(value)}" for name, value in layer.state_dict().items())


def digest_of(value: Tensor) -> str:
    """A hash of a tensor's values and shape."""
    numbers = value.detach().cpu().contiguous().numpy()
    return blake2b(numbers.reshape(-1).view("u1").data, key=str(tuple(value.shape)).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Source:
    """The graph that a module was made from, what is known of its values by name, and an example. Copies share it.

    The graph is in float32; `types` names the values that are in half precision in the file. The `example` is what the
    module takes.
    """

    path: Path
    model: ir.Model
    shapes: Mapping[str, tuple[int, ...]]
    constants: frozenset[str]
    numbers: Mapping[str, list[int]]
    example: Mapping[str, Tensor]
    types: Types = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> Source:
        return self


def source_of(trials: Trials, path: Path) -> Source:
    """The `Source` of a graph: what is known of its values, by their names, once it is a module."""
    first = trials.runs[0]
    constants = {value.name: tensor for value in first.known if (tensor := trials.constant(value)) is not None}
    numbers = {
        name: to_ints(tensor)
        for name, tensor in constants.items()
        if name and not tensor.is_floating_point() and tensor.numel() <= MOST_NUMBERS
    }
    return Source(
        path,
        trials.model,
        {value.name: shape for value, shape in first.shapes.items() if value.name},
        frozenset(name for name in constants if name),
        numbers,
        trials.example,
    )
