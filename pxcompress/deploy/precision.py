"""Converts an ONNX file to another precision: fp16, or int8 (QDQ, per channel)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from onnx_ir.passes import common as passes
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from pxcompress.deploy import runtime
from pxcompress.deploy.backends.onnxruntime import ORT_ERRORS
from pxcompress.deploy.export import artifact_of
from pxcompress.deploy.int8 import Judge
from pxcompress.deploy.qdq import Reader
from pxcompress.deploy.quiet import capture_output
from pxcompress.errors import ModelError
from pxcompress.proof import Artifact
from pxcompress.types import Batches

FP16_LIMIT = 65504 / 4
"""Largest activation for which a node is run in float16.

A quarter of float16's maximum, as a margin for other images.
"""

_CLEANING = (
    passes.TopologicalSortPass,  # the float16 converter appends its casts at the end
    passes.RemoveUnusedNodesPass,
    passes.RemoveUnusedOpsetsPass,
    passes.CheckerPass,
)

EMBEDDED_BYTES = 1536 << 20
"""Size from which on weights are stored in a file beside the ONNX file, as in `export`."""

_CONVERTER_ERRORS = (*ORT_ERRORS, AttributeError, KeyError, TypeError, AssertionError, onnx.checker.ValidationError)
"""Exceptions that the converters raise for a graph that they cannot handle; they have no common base class."""


def to_fp16(source: Path, path: Path, batches: Batches, judge: Judge) -> Artifact:
    """Convert weights and activations of `source` to float16; inputs and outputs stay float32.

    Operators that float16 cannot do, and nodes that take or give more than `FP16_LIMIT` on `batches`, stay in float32.
    """
    ranges = measure_ranges(source, batches)
    graph = onnx.load(source, load_external_data=False).graph
    float32_nodes = [
        node.name
        for node in graph.node
        if max((ranges.get(name, 0.0) for name in (*node.input, *node.output)), default=0.0) > FP16_LIMIT
    ]
    proto = convert_float_to_float16(
        str(source), keep_io_types=True, op_block_list=DEFAULT_OP_BLOCK_LIST, node_block_list=float32_nodes
    )
    _drop_repeated_casts_(proto.graph)
    model = onnx_ir.from_proto(proto)
    _join(model.graph)
    return _save(model, source, path, {"precision": "fp16"})


def to_int8(source: Path, path: Path, batches: Batches, judge: Judge) -> Artifact:
    """Convert `source` to int8 weights with a scale for each channel and 8-bit activations, by the judge's backend."""
    with tempfile.TemporaryDirectory() as folder:
        backend = runtime.find_backend(judge.provider)
        made = backend.quantise(source, Path(folder) / path.name, batches, judge)
        return _save(onnx_ir.load(made.path), source, path, {"precision": "int8", "quantisation": made.recipe})


PRECISIONS: Mapping[str, Callable[[Path, Path, Batches, Judge], Artifact]] = {"fp16": to_fp16, "int8": to_int8}
"""Precision -> the function that converts a float32 file to it."""


def convert(source: Path, path: Path, precision: str, batches: Batches, judge: Judge | None = None) -> Artifact:
    """Convert the float32 file `source` to `precision` at `path`; `batches` of inputs are for calibration.

    A `judge` says what int8 may lose; without one its loss is not measured. The result has the metadata of `source`,
    "precision", and for int8 "quantisation". Raises `ModelError` if the graph cannot be converted; then nothing is
    written.
    """
    try:
        with capture_output():
            return PRECISIONS[precision](source, path, batches, judge or Judge())
    except _CONVERTER_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{source.name} cannot be made {precision}: {reason}") from error


def measure_ranges(source: Path, batches: Batches) -> dict[str, float]:
    """Largest absolute value on `batches`, by name, of every float tensor that a node of `source` reads or writes."""
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(str(source), augmented_model_path=str(Path(folder) / "augmented.onnx"))
        calibrator.collect_data(Reader(source, batches))
        ranges = calibrator.compute_data()
    return {name: max(float(np.abs(end).max()) for end in data.range_value) for name, data in ranges.items()}


def _drop_repeated_casts_(graph: onnx.GraphProto) -> None:
    """Remove duplicates among casts that write the same tensor, in place.

    The converter adds one for every node that reads a tensor that stays float32, such as the scales of two Resize
    nodes.
    """
    declared: set[str] = set()
    nodes = []
    for node in graph.node:
        if node.op_type != "Cast" or node.output[0] not in declared:
            nodes.append(node)
        declared.update(node.output)
    del graph.node[:]
    graph.node.extend(nodes)


def _join(graph: onnx_ir.Graph) -> None:
    """Remove pairs of casts to float16 and back between two float32 nodes, in place; the converter adds them."""
    for node in graph:
        producer = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] is not None else None
        back = producer is not None and producer.op_type == "Cast" and _casts_to(producer) == onnx_ir.DataType.FLOAT16
        if producer is not None and back and _casts_to(node) == onnx_ir.DataType.FLOAT:
            for each, place in tuple(node.outputs[0].uses()):
                each.replace_input_with(place, producer.inputs[0])


def _casts_to(cast: onnx_ir.Node) -> int:
    return cast.attributes["to"].as_int()


def _save(model: onnx_ir.Model, source: Path, path: Path, metadata: Mapping[str, str]) -> Artifact:
    """Remove unused parts of `model` and write it, with the metadata of `source` and `metadata`."""
    for clean_up in _CLEANING:
        clean_up()(model)
    entries = onnx.load(source, load_external_data=False).metadata_props
    model.metadata_props.clear()
    model.metadata_props.update({entry.key: entry.value for entry in entries} | dict(metadata))
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if weights > EMBEDDED_BYTES else None
    onnx_ir.save(model, path, external_data=external)
    return artifact_of(path)
