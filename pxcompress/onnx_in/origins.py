"""Records where a module and its layers come from: the graph, its nodes, and the known values."""

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
"""Most elements of an integer constant that is taken for sizes, axes or bounds."""


@dataclass(frozen=True)
class Origin:
    """The nodes that a layer was made from, and a hash (`read`) of its values then.

    `kind` says how they store its weights. `unflattened` is (channels, height, width) of the input of a linear layer
    that the file flattens with channels last, under the name `flat`; in the module channels come first. Copies of a
    module share it.
    """

    kind: str
    nodes: tuple[ir.Node, ...]
    unflattened: tuple[int, int, int] | None = None
    flat: str = ""
    read: str = ""

    def __deepcopy__(self, memo: Any) -> Origin:
        return self

    def has_changed(self, layer: nn.Module) -> bool:
        """Whether a layer's values differ from those that were read from the file."""
        return digest(layer) != self.read


def digest(layer: nn.Module) -> str:
    """Hashes of a layer's values and shapes, from which `Origin` can tell whether they have changed."""
    return " ".join(f"{name}:{digest_of(value)}" for name, value in layer.state_dict().items())


def digest_of(value: Tensor) -> str:
    """A hash of a tensor's values and shape."""
    numbers = value.detach().cpu().contiguous().numpy()
    return blake2b(numbers.reshape(-1).view("u1").data, key=str(tuple(value.shape)).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Source:
    """The graph that a module was made from, the values known in it by name, and an example. Copies share it.

    The graph is in float32; `types` names the values that are in half precision in the file. The `example` is an input
    of the module.
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
    """Make the `Source` of a graph from its trial runs."""
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
