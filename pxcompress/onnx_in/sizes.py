"""Updates constants for sizes in a graph after its layers have become narrower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from pxcompress.errors import ModelError
from pxcompress.onnx_in.calls import heads_of
from pxcompress.onnx_in.folding import set_input
from pxcompress.onnx_in.opening import constant

if TYPE_CHECKING:
    from pxcompress.onnx_in.module import OnnxModule

Shapes = Mapping[str, tuple[int, ...]]


def resize_(model: ir.Model, module: OnnxModule) -> None:
    """Update the sizes in nodes and declared shapes of `model` to those of `module`, in place.

    That concerns Reshape, Expand, Resize, Split and Slice nodes.
    """
    from pxcompress.onnx_in.module import trace_run

    before = module.source.shapes
    after: dict[str, tuple[int, ...]] = {}
    for trace in trace_run(module):
        after |= dict(zip(trace.step.outputs, trace.outputs, strict=False))
    for name, origin in module.origins.items():
        if origin.flat:
            after[origin.flat] = (before[origin.flat][0], int(module.get_submodule(name).in_features))  # type: ignore[arg-type]
    numbers = module.source.numbers
    for node in list(model.graph):
        names = [value.name or "" for value in node.outputs]
        changed = [name for name in names if name in after and name in before and after[name] != before[name]]
        if changed:
            _resize_node(model, node, (before, after, changed[0]), numbers)
    _declare(model, before, after)


def _resize_node(
    model: ir.Model, node: ir.Node, shapes: tuple[Shapes, Shapes, str], numbers: Mapping[str, list[int]]
) -> None:
    before, after, name = shapes
    if node.op_type in ("Reshape", "Expand"):
        _resize_reshape(model, node, before[name], after[name], numbers)
    elif node.op_type == "Resize":
        _resize_sizes(model, node, (before[name], after[name]), numbers)
    elif node.op_type == "Attention":
        _set_heads(node, after)
    elif node.op_type == "Split":
        _resize_split(model, node, after)
    elif node.op_type == "Slice":
        _resize_slice(model, node, before[name], after[name], numbers)


def _resize_sizes(
    model: ir.Model, node: ir.Node, shapes: tuple[Sequence[int], Sequence[int]], numbers: Mapping[str, list[int]]
) -> None:
    """Update the constant target sizes of a Resize node."""
    value = node.inputs[3] if len(node.inputs) > 3 else None
    sizes = numbers.get(value.name or "") if value is not None else None
    if sizes and (fixed := _replace_sizes(sizes, *shapes)) != sizes:
        set_input(model, node, 3, torch.tensor(fixed))


def _set_heads(node: ir.Node, after: Shapes) -> None:
    """Set the number of remaining heads in the attributes of an `Attention` node."""
    shape = after.get(heads_of(node.outputs[0].name or ""))
    if shape is not None:
        for name in ("q_num_heads", "kv_num_heads"):
            node.attributes[name] = ir.AttrInt64(name, shape[1])


def _resize_split(model: ir.Model, node: ir.Node, after: Shapes) -> None:
    axis = node.attributes["axis"].value if "axis" in node.attributes else 0
    sizes = [after[value.name or ""][axis] for value in node.outputs if value.name in after]
    if len(sizes) != len(node.outputs):
        return
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        set_input(model, node, 1, torch.tensor(sizes))
    elif "split" in node.attributes:
        node.attributes["split"] = ir.AttrInt64s("split", sizes)


def _resize_slice(
    model: ir.Model, node: ir.Node, before: Sequence[int], after: Sequence[int], numbers: Mapping[str, list[int]]
) -> None:
    """Update a slice that cuts out one of several equal parts, so that it cuts out the same part."""
    axes = [axis for axis, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    starts = _read_numbers(node, 1, "starts", numbers)
    cut_axes = _read_numbers(node, 3, "axes", numbers) or list(range(len(starts or [])))
    if not starts or len(axes) != 1 or len(starts) != 1 or cut_axes[0] % len(before) != axes[0]:
        return
    axis = axes[0]
    first = starts[0] // before[axis] * after[axis]
    bounds = {"starts": [first], "ends": [first + after[axis]]}
    for place, (name, value) in enumerate(bounds.items(), 1):
        if len(node.inputs) > 1:
            set_input(model, node, place, torch.tensor(value))
        else:
            node.attributes[name] = ir.AttrInt64s(name, value)


def _read_numbers(node: ir.Node, place: int, name: str, numbers: Mapping[str, list[int]]) -> list[int] | None:
    """Whole numbers that a node has as an input or an attribute; None if it has neither."""
    if len(node.inputs) > 1:
        value = node.inputs[place] if place < len(node.inputs) else None
        return None if value is None else numbers.get(value.name or "")
    return list(node.attributes[name].value) if name in node.attributes else None


def _resize_reshape(
    model: ir.Model, node: ir.Node, before: Sequence[int], after: Sequence[int], numbers: Mapping[str, list[int]]
) -> None:
    """Update the target sizes of a Reshape, in a constant or in one part of a concatenated shape."""
    value = node.inputs[1]
    assert value is not None
    if (sizes := numbers.get(value.name or "")) is not None:
        fixed = _replace_sizes(sizes, before, after)
        if fixed != sizes:
            set_input(model, node, 1, torch.tensor(fixed))
        return
    joined = value.producer()
    while joined is not None and joined.op_type == "Cast" and joined.inputs[0] is not None:
        joined = joined.inputs[0].producer()
    if joined is None or joined.op_type != "Concat":
        if not _follows_shapes(value):
            raise ModelError(f"the sizes of {node.op_type} {node.name!r} are computed from no shape; export it again")
        return
    place = 0
    for index, part in enumerate(joined.inputs):
        sizes = numbers.get(part.name or "", [0]) if part is not None else [0]
        fixed = _replace_sizes(sizes, before[place : place + len(sizes)], after[place : place + len(sizes)])
        place += len(sizes)
        if fixed != sizes:
            old_tensor = constant(part)
            set_input(
                model, joined, index, torch.tensor(fixed, dtype=torch.int64 if old_tensor is None else old_tensor.dtype)
            )


def _follows_shapes(value: ir.Value) -> bool:
    """Whether sizes are computed from the shapes of other values, and so are right already."""
    waiting: list[ir.Value | None] = [value]
    while waiting:
        each = waiting.pop()
        node = each.producer() if each is not None else None
        if node is not None and node.op_type == "Shape":
            return True
        waiting += node.inputs if node is not None else ()
    return False


def _replace_sizes(sizes: Sequence[int], before: Sequence[int], after: Sequence[int]) -> list[int]:
    """`sizes` with every size that equals the old one on a changed axis replaced by the new one."""
    if not len(sizes) == len(before) == len(after):
        return list(sizes)
    triples = zip(sizes, before, after, strict=True)
    return [new if size > 0 and size == old != new else size for size, old, new in triples]


def _declare(model: ir.Model, before: Shapes, after: Shapes) -> None:
    """Declare the new shapes of outputs, and remove those of inner values."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    for value in model.graph.outputs:
        if value.shape is None or value.name not in after or len(after[value.name or ""]) != len(value.shape):
            continue
        pairs = zip(value.shape, before[value.name or ""], after[value.name or ""], strict=True)
        value.shape = ir.Shape([new if isinstance(own, int) and old != new else own for own, old, new in pairs])
