"""Reads files in half precision as float32, and restores their types when they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

HALF = (ir.DataType.FLOAT16,)

Types = Mapping[str, ir.DataType]
"""Name of a value that is in half precision in the file -> its type there."""

HALF_TOLERANCE = 5e-2
"""Largest accepted difference from a file in half precision, as a share of an output's scale; deep nets round often."""


def widen_(model: ir.Model) -> Types:
    """Convert all values in half precision to float32, in place; returns their former types."""
    types = {value.name or "": kind for value in _values(model) if (kind := _type_of(value)) in HALF}
    for node in model.graph:
        kind = _made_type(node)
        if kind in HALF:
            types |= {value.name or "": kind for value in node.outputs}
    _set_types_(model, dict.fromkeys(types, ir.DataType.FLOAT))
    return types


def narrow_(model: ir.Model, types: Types) -> None:
    """Give values the types that they have in the file, in place.

    New constants follow the values they are combined with.
    """
    if not types:
        return
    kinds = dict(types)
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        kind = next((kinds[value.name or ""] for value in inputs if value.name in kinds), None)
        if kind is None:
            continue
        for value in inputs:
            if value.is_initializer() and _type_of(value) == ir.DataType.FLOAT and node.op_type != "Resize":
                kinds.setdefault(value.name or "", kind)
        if node.op_type != "Cast":
            for value in node.outputs:
                kinds.setdefault(value.name or "", kind)
    _set_types_(model, kinds)


def _set_types_(model: ir.Model, types: Types) -> None:
    """Change float types of values, constants, and of the outputs that nodes declare, by name, in place."""
    for value in _values(model):
        kind = types.get(value.name or "")
        if kind is None or _type_of(value) not in (*HALF, ir.DataType.FLOAT):
            continue
        value.dtype = kind
        if value.const_value is not None:
            array = value.const_value.numpy().astype(kind.numpy())
            value.const_value = ir.tensor(array, dtype=kind, name=value.name)
    for node in model.graph:
        kind = types.get(node.outputs[0].name or "") if node.outputs else None
        if kind is None or _made_type(node) not in (*HALF, ir.DataType.FLOAT):
            continue
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", kind.value)
        else:
            array = node.attributes["value"].value.numpy().astype(kind.numpy())
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array, dtype=kind))


def _made_type(node: ir.Node) -> ir.DataType | None:
    """The type that a node's attributes declare for its output; None if they declare none."""
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].value)
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        return ir.DataType(node.attributes["value"].value.dtype)
    return None


def _type_of(value: ir.Value) -> ir.DataType | None:
    return value.dtype if value.const_value is None else value.const_value.dtype


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """All values of a graph: inputs, constants and outputs of nodes."""
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs
