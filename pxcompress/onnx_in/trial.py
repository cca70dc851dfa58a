"""Runs a graph on examples, operator by operator, to learn the shapes of all values and which are constant.

Two runs differ in every size that the file leaves open. What comes out the same in both, made of shapes and constants
alone, is a constant, so sub-graphs that compute shapes disappear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from pxcompress.errors import ModelError, short
from pxcompress.onnx_in.opening import RECURRENT, constant, opset_of, settings_of
from pxcompress.onnx_in.operators.table import DTYPES, OPERATORS, Unsupported
from pxcompress.onnx_in.recurrent import Recurrent

LARGEST_KNOWN = 1 << 20
"""Most elements of a computed constant that the module stores instead of computing it again."""

LARGEST_INPUT = 1 << 30
"""Most numbers in one input of a trial."""

OPEN_SIDE = 96
"""Default size in pixels for an image side that the file leaves open; later axes get larger sizes."""


class Refused(Exception):
    """Raised if the graph does not run on the example."""


class Trial:
    """One run of the graph: `shapes` of all values, and `known`, the values computed from initializers and shapes
    alone.

    An `If` whose condition is known becomes the branch that it takes, in the graph itself. `weights` are initializers
    that another run of the same graph has read already.
    """

    def __init__(
        self, model: ir.Model, inputs: Mapping[str, Tensor], weights: Mapping[ir.Value, Tensor] | None = None
    ) -> None:
        self.shapes: dict[ir.Value, tuple[int, ...]] = {}
        self.known: dict[ir.Value, Tensor] = {}
        self.inputs = inputs
        self._model, self._opset, self._weights = model, opset_of(model), weights or {}
        self._values: dict[ir.Value, Any] = {}
        for value in model.graph.initializers.values():
            self._take_initializer(value)
        for value in model.graph.inputs:
            if value.name in inputs:
                self._values[value] = inputs[value.name or ""]
                self.shapes[value] = tuple(inputs[value.name or ""].shape)
        with torch.no_grad():
            for node in list(model.graph):
                self._run(node)
        self._values.clear()

    def _take_initializer(self, value: ir.Value) -> None:
        tensor = self._weights.get(value)
        tensor = constant(value) if tensor is None else tensor
        assert tensor is not None
        self._values[value] = self.known[value] = tensor
        self.shapes[value] = tuple(tensor.shape)

    def _run(self, node: ir.Node) -> None:
        if node.op_type == "If":
            self._take_branch(node)
            return
        made = self._compute(node)
        results = made if isinstance(made, tuple | list) else (made,)
        of_constants = all(value is None or value in self.known for value in node.inputs)
        static = of_constants or node.op_type in ("Shape", "Size")
        for value, result in zip(node.outputs, results, strict=False):
            self._values[value] = result
            self.shapes[value] = tuple(result.shape)
            if static and result.numel() < LARGEST_KNOWN:
                self.known[value] = result

    def _compute(self, node: ir.Node) -> Any:
        missing = [value.name for value in node.inputs if value is not None and value not in self._values]
        if missing:
            raise ModelError(f"{node.op_type} {node.name!r} reads {missing[0]!r}, which nothing in the file makes")
        args = [None if value is None else self._values[value] for value in node.inputs]
        settings = settings_of(node, self._opset)
        try:
            if node.op_type in RECURRENT:
                weights = [constant(value) for value in node.inputs]
                return Recurrent(node.op_type, settings, weights)(args[0], *args[5:7])
            return OPERATORS[node.op_type](settings, *args)
        except Unsupported as error:
            raise ModelError(f"{node.op_type} {node.name!r} cannot be read: {error}") from error
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, NotImplementedError) as error:
            shapes = ", ".join(str(self.shapes.get(value)) for value in node.inputs if value is not None)
            reason = short(error, 150) or type(error).__name__
            raise Refused(f"{node.op_type} {node.name!r} fails on {shapes}: {reason}") from error

    def _take_branch(self, node: ir.Node) -> None:
        condition = None if node.inputs[0] is None else self.known.get(node.inputs[0])
        if condition is None:
            raise ModelError(
                f"If {node.name!r}: which way it goes depends on the input's values; export the model without it"
            )
        branch = node.attributes["then_branch" if bool(condition) else "else_branch"].as_graph()
        for value in list(branch.initializers.values()):
            branch.initializers.pop(value.name or "")
            self._model.graph.register_initializer(value)
            self._take_initializer(value)
        nodes, outputs = list(branch), list(branch.outputs)
        branch.outputs.clear()
        for inner in nodes:
            branch.remove(inner)
        self._model.graph.insert_before(node, nodes)
        for inner in nodes:
            self._run(inner)
        for before, after in zip(node.outputs, outputs, strict=True):
            before.replace_all_uses_with(after, replace_graph_outputs=True)
        self._model.graph.remove(node, safe=True)


class Trials:
    """Two runs of a graph on inputs of different sizes; what is equal in both holds for any size."""

    def __init__(self, model: ir.Model, first: Trial, second: Trial) -> None:
        self.model = model
        self.runs = (first, second)

    @property
    def example(self) -> Mapping[str, Tensor]:
        """The inputs of the first run."""
        return self.runs[0].inputs

    def again(self) -> Trials:
        """Repeat both runs on the graph as it is now."""
        return Trials(self.model, *(Trial(self.model, run.inputs) for run in self.runs))

    def shape(self, value: ir.Value, run: int = 0) -> tuple[int, ...]:
        """Shape of a value in one of the runs, 0 or 1."""
        return self.runs[run].shapes[value]

    def constant(self, value: ir.Value | None) -> Tensor | None:
        """The tensor of a value that is the same in both runs; None for other values."""
        if value is None or any(value not in run.known for run in self.runs):
            return None
        first, second = (run.known[value] for run in self.runs)
        same = first is second or (first.shape == second.shape and torch.equal(first, second))
        return first if same else None

    def learn(self, value: ir.Value, tensor: Tensor) -> None:
        """Record a constant that was put into the graph after the runs."""
        for run in self.runs:
            run.known[value], run.shapes[value] = tensor, tuple(tensor.shape)


def run_trials(model: ir.Model, sizes: Mapping[str, Sequence[int]], name: str) -> Trials:
    """Run the graph twice, with different sizes wherever the file leaves them open. Raises `ModelError`.

    `sizes` are shapes of one sample by input name, for sizes that the file leaves open. If only one size works although
    the file leaves it open, such as the height of a text line, that is found by trying.
    """
    shapes = {value.name or "": _shape(value, sizes) for value in model.graph.inputs}
    try:
        first = Trial(model, draw_inputs(model, shapes, 0))
    except Refused as error:
        raise ModelError(f"{name} does not run as it is read: {_size_hint(model, shapes)}{error}") from error
    return Trials(model, first, _second_trial(model, shapes, first.known))


def _second_trial(model: ir.Model, shapes: Mapping[str, Sequence[int]], weights: Mapping[ir.Value, Tensor]) -> Trial:
    """A run with all open sizes changed, or if that fails, with those changed that can be changed alone."""
    places = [
        (value.name or "", axis)
        for value in model.graph.inputs
        for axis, size in enumerate(list_open_sizes(value))
        if size is None
    ]
    try:
        return Trial(model, draw_inputs(model, _enlarge(shapes, places), 1), weights)
    except Refused:
        pass
    last, enlarged = None, _enlarge(shapes, [])
    for place in places:
        try:
            last = Trial(model, draw_inputs(model, _enlarge(enlarged, [place]), 1), weights)
            enlarged = _enlarge(enlarged, [place])
        except Refused:
            continue
    return last or Trial(model, draw_inputs(model, shapes, 1), weights)


def _enlarge(shapes: Mapping[str, Sequence[int]], places: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    """Copies of `shapes` with one more sample (axis 0), or 32 more pixels, at the given places."""
    larger = {name: list(shape) for name, shape in shapes.items()}
    for name, axis in places:
        larger[name][axis] += 1 if axis == 0 else 32
    return larger


def draw_inputs(model: ir.Model, shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Random inputs in the file's types: normal numbers, bytes for images, 0 and 1 for other whole numbers."""
    draw = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for value in model.graph.inputs:
        assert value.dtype is not None
        dtype, shape = DTYPES[value.dtype.value], tuple(shapes[value.name or ""])
        whole = 256 if dtype == torch.uint8 and len(shape) == 4 else 2
        drawn = (
            torch.randn(shape, generator=draw)
            if dtype.is_floating_point
            else torch.randint(whole, shape, generator=draw)
        )
        inputs[value.name or ""] = drawn.to(dtype)
    return inputs


def list_open_sizes(value: ir.Value) -> list[int | None]:
    """The sizes of an input, with None where the file leaves them open."""
    return [size if isinstance(size, int) and size > 0 else None for size in (value.shape or ())]


def _shape(value: ir.Value, sizes: Mapping[str, Sequence[int]]) -> list[int]:
    """A shape for an input: the file's sizes, else those in `sizes`, else some that most networks accept.

    Raises `ModelError` if that is too large.
    """
    sizes_of_sample = sizes.get(value.name or "")
    shape = []
    for axis, size in enumerate(list_open_sizes(value)):
        chosen_size = sizes_of_sample[axis - 1] if sizes_of_sample and 0 < axis <= len(sizes_of_sample) else None
        shape.append(size or (2 if axis == 0 else chosen_size or OPEN_SIDE + 32 * axis))
    if prod(shape) > LARGEST_INPUT:
        raise ModelError(f"input {value.name!r} takes samples of {' x '.join(map(str, shape[1:]))}: too many numbers")
    return shape


def _size_hint(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> str:
    """Advice for error messages if the file leaves sizes open; "" if it does not."""
    for value in model.graph.inputs:
        sizes = list_open_sizes(value)
        if None in sizes[1:]:
            shape = " x ".join(map(str, shapes[value.name or ""][1:]))
            hint = f"input {value.name!r} leaves its size open, and {shape} was tried: give --input-size"
            is_unclear = len(sizes) == 4 and sizes[1] is None and sizes[3] is None
            return hint + (", or --layout nhwc where its channels are last; " if is_unclear else "; ")
    return ""
