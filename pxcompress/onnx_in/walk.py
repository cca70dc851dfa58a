"""Follows values through a module's steps, across those that only move them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pxcompress.onnx_in.module import OnnxModule, Step, trace_run

SCALES = ("Mul", "Div", "Add", "Sub")
MOVES = {
    "Transpose",
    "Regroup",
    "Select",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Split",
    "Chunk",
    "Cast",
    "Reshape",
    *SCALES,
}
"""Kinds of steps that only move values, or multiply all of them by one number."""

BETWEEN = {"Add", "Mul", "Div", "Where", "Cast", "Regroup"}
"""Kinds of steps between the product of queries and keys and its softmax: scales, masks, biases."""


@dataclass(frozen=True)
class Path:
    """The step at the end of a walk, and the steps between, in the order in which they run."""

    end: Step
    between: list[Step]


Shapes = Mapping[str, tuple[int, ...]]
"""Name of a value in a module -> its shape."""


def trace_shapes(module: OnnxModule) -> Shapes:
    """The shape of every value when the module runs on the file's example."""
    shapes: dict[str, tuple[int, ...]] = {}
    for trace in trace_run(module):
        inputs = zip(trace.step.inputs, trace.inputs, strict=False)
        shapes |= {name: shape for name, shape in inputs if name and shape is not None}
        shapes |= dict(zip(trace.step.outputs, trace.outputs, strict=False))
    return shapes


class Walk:
    """Finds steps before and behind values; it knows the maker, the readers and the shape of every value."""

    def __init__(self, module: OnnxModule, shapes: Shapes) -> None:
        self.module, self.shapes = module, shapes
        self.maker = {name: step for step in module.steps for name in step.outputs}
        self.readers: dict[str, list[Step]] = {}
        for step in module.steps:
            for name in filter(None, step.inputs):
                self.readers.setdefault(name, []).append(step)

    def find_moved(self, step: Step) -> str | None:
        """The input of a step that only moves or rescales it; None for other steps."""
        if step.operator not in MOVES:
            return None
        constants = [name for name in step.inputs if name in self.module.constants]
        if step.operator in SCALES and any(self.module.get_constant(name or "").numel() != 1 for name in constants):
            return None
        live = [name for name in step.inputs if name and name not in self.module.constants]
        return live[0] if len(live) == 1 else None

    def to_layer(self, name: str | None) -> Path | None:
        """The path back from a value, across moves, to the linear layer that made it; None if there is none."""
        between: list[Step] = []
        while name is not None and (step := self.maker.get(name)) is not None:
            if step.operator == "Linear":
                return Path(step, between[::-1])
            name = self.find_moved(step)
            between.append(step)
        return None

    def to_product(self, name: str | None) -> Path | None:
        """The path back from attention scores, across scales, masks and biases, to their matrix product, or None."""
        step = self.maker.get(name or "")
        if step is None or step.operator == "MatMul":
            return None if step is None else Path(step, [])
        if step.operator not in BETWEEN:
            return None
        for each in step.inputs:
            if each in self.maker and (path := self.to_product(each)) is not None:
                return Path(path.end, [*path.between, step])
        return None

    def find_below(self, name: str, kind: str) -> Path | None:
        """The path from a value, across moves, to the next step of this kind; None if anything else reads the value."""
        between: list[Step] = []
        while name not in self.module.made and len(readers := self.readers.get(name, [])) == 1:
            step = readers[0]
            if step.operator == kind:
                return Path(step, between)
            if self.find_moved(step) is None:
                return None
            between.append(step)
            name = step.outputs[0]
        return None

    def send(self, steps: Sequence[Step], start: str, value: Tensor) -> dict[str, Tensor]:
        """Send numbers through steps that move values, to see where they go; returns each step's result by name."""
        values: dict[str, Tensor] = {start: value}
        for step in steps:
            if step.operator in (*SCALES, "Cast"):
                made: Any = next(values[name] for name in step.inputs if name in values)
            else:
                assert not isinstance(step.run, str)
                made = step.run(*[self._send_through(name, values) for name in step.inputs])
            values.update(zip(step.outputs, made if isinstance(made, tuple | list) else (made,), strict=False))
        return values

    def _send_through(self, name: str | None, values: dict[str, Tensor]) -> Tensor | None:
        if name is None or name in values:
            return None if name is None else values[name]
        return self.module.get_constant(name)
