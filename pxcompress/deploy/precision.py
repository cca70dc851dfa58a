"""One ONNX file in another precision: fp16, or int8 for ONNX Runtime (static quantisation, QDQ, per channel)."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnx_ir.passes import common as passes
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from pxcompress.deploy.backends.onnxruntime import ORT_ERRORS
from pxcompress.deploy.export import artifact_of, onnx_files
from pxcompress.deploy.session import whole_batches
from pxcompress.errors import ModelError
from pxcompress.proof import Artifact
from pxcompress.types import Batches

FP16_LIMIT = 65504 / 4
"""Largest activation of a node that computes in float16; the factor is for images that were not seen."""

_CLEANING = (
    passes.TopologicalSortPass,  # the float16 converter appends its casts at the end
    passes.RemoveUnusedNodesPass,
    passes.RemoveUnusedOpsetsPass,
    passes.CheckerPass,
)

EMBEDDED_BYTES = 1536 << 20
"""Weights above it go beside the file, as in `export`."""

_CONVERTER_ERRORS = (*ORT_ERRORS, AttributeError, KeyError, TypeError, AssertionError, onnx.checker.ValidationError)
"""What the converters raise for a graph that they cannot handle; they have no base class of their own."""


def to_fp16(source: Path, path: Path, batches: Batches) -> Artifact:
    """`source` with weights and activations in float16; input and output stay float32.

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
    model = onnx_ir.from_proto(proto)
    _join(model.graph)
    return _save(model, source, path, "fp16")


def to_int8(source: Path, path: Path, batches: Batches) -> Artifact:
    """`source` with int8 weights, a scale for each channel, and uint8 activations between their extremes on `batches`.

    Unsigned, because CPUs multiply uint8 by int8; ONNX Runtime takes twice as long for signed ones on x86.
    """
    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / path.name
        quantize_static(
            source,
            beside,
            _Reader(source, batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=len(onnx_files(source)) > 1,
        )
        return _save(onnx_ir.load(beside), source, path, "int8")


PRECISIONS: Mapping[str, Callable[[Path, Path, Batches], Artifact]] = {"fp16": to_fp16, "int8": to_int8}
"""What a float32 file can be made into."""


def convert(source: Path, path: Path, precision: str, batches: Batches) -> Artifact:
    """Write the float32 file `source` in `precision` to `path`; `batches` are inputs to calibrate on, without labels.

    The result has the metadata of `source`, and "precision". Raises `ModelError` where the graph cannot be converted;
    then nothing is written.
    """
    try:
        with _silence():
            return PRECISIONS[precision](source, path, batches)
    except _CONVERTER_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{source.name} cannot be made {precision}: {reason}") from error


def measure_ranges(source: Path, batches: Batches) -> dict[str, float]:
    """Largest absolute value on `batches` of every float tensor that a node of `source` takes or gives."""
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(str(source), augmented_model_path=str(Path(folder) / "augmented.onnx"))
        calibrator.collect_data(_Reader(source, batches))
        ranges = calibrator.compute_data()
    return {name: max(float(np.abs(end).max()) for end in data.range_value) for name, data in ranges.items()}


class _Reader(CalibrationDataReader):
    """Batches as the calibrator asks for them, of the size that the file takes."""

    def __init__(self, source: Path, batches: Batches) -> None:
        graph = onnx.load(source, load_external_data=False).graph
        weights = {each.name for each in graph.initializer}  # old files list them among the inputs
        port = next((port for port in graph.input if port.name not in weights), onnx.ValueInfoProto())
        dims = port.type.tensor_type.shape.dim
        self._input, file_batch = port.name, dims[0].dim_value if dims else 0
        arrays = (inputs.cpu().numpy() for inputs, _ in batches)
        self._parts = (
            part for array in arrays for part in (whole_batches(array, file_batch) if file_batch else [array])
        )

    def get_next(self) -> dict[str, Any] | None:
        part = next(self._parts, None)
        return None if part is None else {self._input: part}


def _join(graph: onnx_ir.Graph) -> None:
    """Let float32 nodes that follow each other hand on float32: the converter puts a float16 between them."""
    for node in graph:
        producer = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] is not None else None
        back = producer is not None and producer.op_type == "Cast" and _casts_to(producer) == onnx_ir.DataType.FLOAT16
        if producer is not None and back and _casts_to(node) == onnx_ir.DataType.FLOAT:
            for each, place in tuple(node.outputs[0].uses()):
                each.replace_input_with(place, producer.inputs[0])


def _casts_to(cast: onnx_ir.Node) -> int:
    return cast.attributes["to"].as_int()


def _save(model: onnx_ir.Model, source: Path, path: Path, precision: str) -> Artifact:
    """Write `model` without what it does not use, with the metadata of `source`."""
    for clean_up in _CLEANING:
        clean_up()(model)
    entries = onnx.load(source, load_external_data=False).metadata_props
    model.metadata_props.clear()
    model.metadata_props.update({entry.key: entry.value for entry in entries}, precision=precision)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if weights > EMBEDDED_BYTES else None
    onnx_ir.save(model, path, external_data=external)
    return artifact_of(path)


@contextmanager
def _silence() -> Iterator[None]:
    """No log lines and warnings of the converters; what goes wrong is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
