"""Opens an ONNX file as one flat graph, or refuses it in one line before any work; nothing is renamed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from onnx_ir.passes import common
from torch import Tensor

from pxcompress.errors import ModelError, describe, short, suggest_path
from pxcompress.onnx_in.operators import OPERATORS
from pxcompress.onnx_in.operators.table import DTYPES, Settings

logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # what it warns of is refused here in one line

OPSETS = range(7, onnx.defs.onnx_opset_version() + 1)
"""Versions of ONNX's operators that can be read: older ones broadcast differently, newer ones are unknown."""

LARGEST = 2**31
"""Most bytes of a file without external data: protobuf reads no more."""

LARGEST_TENSOR = 2**33
"""Most numbers of one tensor."""

MOST_DOUBLES = 64
"""Most numbers of a constant in double precision; larger ones are taken for weights and refused."""

QUANTISED = {
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
}
FLOW = {"Loop", "Scan", "SequenceMap"}
RECURRENT = {"LSTM", "GRU"}
OWN_DOMAINS = ("", "ai.onnx")
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ir.passes.InvariantError)
"""Exceptions of onnx_ir for files that it cannot read."""


def open_graph(path: Path) -> ir.Model:
    """Open a file: functions are inlined, and constants become initializers. Raises `ModelError`."""
    proto = read_proto(path)
    _check(proto, path)
    try:
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.resolve().parent)
        for tidy in (
            common.TopologicalSortPass(),
            common.InlinePass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.RemoveInitializersFromInputsPass(),
            common.IdentityEliminationPass(),
            common.RemoveUnusedNodesPass(),
        ):
            model = tidy(model).model
        for value in model.graph.initializers.values():  # every look at a tensor of the file copies it
            if isinstance(value.const_value, ir.TensorProtoTensor):
                value.const_value = _read_once(value.const_value)
    except UNREADABLE as error:
        raise ModelError(f"{path.name} cannot be read: {describe(error)}") from error
    _check_weights(model, path)
    return model


def _read_once(tensor: ir.TensorProtoTensor) -> ir.Tensor[Any]:
    return ir.Tensor(
        tensor.numpy(),
        tensor.dtype,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def read_proto(path: Path) -> onnx.ModelProto:
    """The content of an ONNX file, without its external weights.

    Raises `ModelError` if it is missing, damaged, too large for one file, or no model.
    """
    if not path.is_file():
        raise ModelError(f"no ONNX file at {str(path)!r}{suggest_path(path) or '; check the path'}")
    if path.stat().st_size >= LARGEST:
        raise ModelError(f"{path.name} has more than 2 GB; save it with external data")
    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise ModelError(f"{path.name} is no ONNX file, or not a whole one ({short(error, 80)})") from error
    if not proto.graph.node or not proto.graph.output or not proto.opset_import:
        raise ModelError(f"{path.name} is no ONNX file, or not a whole one: it has no graph with outputs")
    for tensor in tensors_of(proto):
        _check_size(tensor, path)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path)
    return proto


def _check_size(tensor: onnx.TensorProto, path: Path) -> None:
    """Raise `ModelError` for a tensor that is too large, or whose shape does not match its number of values."""
    numbers = prod(max(dim, 0) for dim in tensor.dims)
    if any(dim < 0 for dim in tensor.dims) or numbers > LARGEST_TENSOR:
        raise ModelError(f"{path.name}: tensor {tensor.name!r} says it has the shape {list(tensor.dims)}; refused")
    size = len(tensor.raw_data)  # read once: every look at it copies it
    expected = numbers * DTYPES[tensor.data_type].itemsize if tensor.data_type in DTYPES else size
    if size not in (0, expected):
        raise ModelError(
            f"{path.name}: tensor {tensor.name!r} of shape {list(tensor.dims)} has {size} bytes, not {expected}; "
            "fetch the whole file"
        )


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Raise `ModelError` for external weights that are not in one complete plain file beside the model."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    file = path.parent / location
    if not location or Path(location).name != location or location in (".", "..") or file.is_symlink():
        raise ModelError(
            f"{path.name} keeps weights in {location!r}, which is not beside it; put all weights into one folder"
        )
    try:
        end = int(entries.get("offset") or 0) + int(entries.get("length") or 0)
        there = file.stat().st_size
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} keeps weights in {location!r}, which cannot be read: {short(error)}") from error
    if end > there or int(entries.get("offset") or 0) < 0:
        raise ModelError(f"{path.name} reads {end} bytes of {location!r}, which has {there}; fetch the whole file")


def _check(proto: onnx.ModelProto, path: Path) -> None:
    """Raise `ModelError` for a model that cannot be pruned as it is, such as one with unknown operators, all named at
    once.
    """
    counts = Counter((node.domain, node.op_type) for node in _nodes(proto))
    local = {(function.domain, function.name) for function in proto.functions}
    foreign = Counter({key: count for key, count in counts.items() if key[0] not in OWN_DOMAINS and key not in local})
    own = Counter({key[1]: count for key, count in counts.items() if key[0] in OWN_DOMAINS})
    if quantised := own.keys() & QUANTISED:
        raise ModelError(
            f"{path.name} is quantised already ({', '.join(sorted(quantised))}): prune the float32 file it was made "
            "from, then --targets int8 quantises the result"
        )
    if foreign:
        domains = ", ".join(sorted({domain for domain, _ in foreign}))
        listed = ", ".join(sorted({kind for _, kind in foreign})[:4])
        raise ModelError(
            f"{path.name} has operators of {domains} ({listed}), which one runtime made for itself: give the file as "
            "it was exported, before optimisation"
        )
    version = next((entry.version for entry in proto.opset_import if entry.domain in OWN_DOMAINS), 0)
    if version not in OPSETS:
        raise ModelError(
            f"{path.name} has opset {version}; known are {OPSETS[0]} to {OPSETS[-1]}: convert it, or export it again"
        )
    if loops := own.keys() & FLOW:
        raise ModelError(
            f"{path.name} has a loop ({', '.join(sorted(loops))}): what it computes depends on its inputs; export the "
            "part without it"
        )
    unknown = {kind: n for kind, n in own.items() if kind not in {*OPERATORS, *RECURRENT, "If", "Constant"}}
    if unknown:
        listed = ", ".join(f"{kind} ({n}x)" for kind, n in sorted(unknown.items()))
        raise ModelError(f"{path.name} has operators that have no rule here: {listed}")


def _check_weights(model: ir.Model, path: Path) -> None:
    """Raise `ModelError` for weights in types that cannot be pruned, and for inputs without a shape."""
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if any(tensor.dtype == ir.DataType.DOUBLE and tensor.size > MOST_DOUBLES for tensor in tensors):
        raise ModelError(f"{path.name} holds weights in float64: export it again in float32")
    types = {tensor.dtype for tensor in tensors} | {value.dtype for value in model.graph.inputs}
    if ir.DataType.BFLOAT16 in types:
        raise ModelError(
            f"{path.name} holds numbers in bfloat16, which ONNX Runtime has few operators for: export it in float32 or "
            "float16"
        )
    for tensor in tensors:
        if tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) and bool(np.isnan(tensor.numpy()).any()):
            raise ModelError(f"{path.name}: weight {tensor.name!r} holds NaN; give a file that was trained to the end")
    for value in model.graph.inputs:
        if not value.shape or value.dtype is None or value.dtype.value not in DTYPES:
            kind = "no type" if value.dtype is None else value.dtype.name.lower()
            raise ModelError(
                f"{path.name}: input {value.name!r} has {'a' if value.shape else 'no'} shape and {kind}; expected "
                "numbers of shape (n, ...)"
            )


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all graphs inside its nodes."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for inner in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
            yield from _graphs(inner)


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(proto.graph):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def tensors_of(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All constants of a model, in initializers and in nodes."""
    for graph in _graphs(proto.graph):
        yield from graph.initializer
    for attribute in (attribute for node in _nodes(proto) for attribute in node.attribute):
        yield from attribute.tensors
        if attribute.HasField("t"):
            yield attribute.t


def opset_of(model: ir.Model) -> int:
    """The version of ONNX's operators that a model uses."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))


def settings_of(node: ir.Node, opset: int) -> Settings:
    """The attributes of a node as plain values and tensors, without graphs."""
    values: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        value = attribute.value
        if attribute.type == ir.AttributeType.GRAPH:
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            value = torch.from_numpy(np.array(value.numpy()))
        elif isinstance(value, bytes):
            value = value.decode()
        values[name] = list(value) if isinstance(value, tuple) else value
    return Settings(values, opset, sum(bool(value.name) for value in node.outputs))


def constant(value: ir.Value | None) -> Tensor | None:
    """The value of an initializer as a tensor; None for other values."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return torch.from_numpy(np.array(value.const_value.numpy()))


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value."""
    return [use.node for use in value.uses()]


def only_reader(value: ir.Value) -> ir.Node | None:
    """The only node that reads a value; None if there is none, if there are several, or if the value is an output."""
    nodes = readers(value)
    return nodes[0] if len(nodes) == 1 and not value.is_graph_output() else None
