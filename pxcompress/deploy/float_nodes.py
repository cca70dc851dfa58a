"""Nodes of an ONNX graph that must stay in float32: attention masks with huge constants, and the arithmetic on
outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators with weights, which take most of the time that int8 saves."""

HUGE = 1e30
"""Constants of at least this size hide what they are added to, such as minus infinity in an attention mask."""

_FINITE = 100.0
"""Size that replaces huge constants (see `HUGE`) while the ranges of activations are measured."""


def find_masking(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes that a huge constant reaches, up to and including the softmax behind it."""
    reached = {name for name, _ in _list_huge(graph)}
    names = []
    for node in graph.node:  # in the order of their calls
        if reached & set(node.input):
            names.append(node.name)
            if node.op_type != "Softmax":
                reached |= set(node.output)
    return names


def find_tail(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes behind the last layers with weights, whose results no layer with weights reads.

    They cost little, and may put numbers of different sizes into one tensor: a detector's corners in pixels beside
    probabilities, of which one scale for both would leave nothing.
    """
    weights = {each.name for each in graph.initializer}
    needed: set[str] = set()
    names = []
    for node in reversed(graph.node):
        if (node.op_type in WEIGHTED and weights & set(node.input)) or needed & set(node.output):
            needed |= set(node.input)
        else:
            names.append(node.name)
    return names


def write_finite(source: Path, path: Path) -> Path:
    """Write a copy of `source` to `path` with huge constants replaced by usual ones.

    Returns `source` if it has none.
    """
    model = onnx.load(source)
    huge = [tensor for _, tensor in _list_huge(model.graph)]
    for tensor in huge:
        values = numpy_helper.to_array(tensor)
        is_huge = np.abs(values) >= HUGE
        finite = np.where(is_huge, np.sign(values) * _FINITE, values).astype(values.dtype)
        tensor.CopyFrom(numpy_helper.from_array(finite, tensor.name))
    if not huge:
        return source
    onnx.save(model, path, save_as_external_data=model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF)
    return path


def _list_huge(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Names and tensors of the constants that contain a huge number."""
    constants = [(each.name, each) for each in graph.initializer]
    for node in graph.node:
        if node.op_type in ("Constant", "ConstantOfShape"):
            constants += [(node.output[0], each.t) for each in node.attribute if each.HasField("t")]
    for name, tensor in constants:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
            values = numpy_helper.to_array(tensor) if tensor.data_location != onnx.TensorProto.EXTERNAL else np.zeros(0)
            if values.size and np.abs(values).max() >= HUGE:
                yield name, tensor
