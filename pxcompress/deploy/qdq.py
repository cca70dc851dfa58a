"""The steps of ONNX Runtime's static quantisation: measure ranges, write quantised files, correct biases."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from pxcompress.deploy import runtime
from pxcompress.deploy.export import onnx_files
from pxcompress.deploy.float_nodes import find_masking, find_tail, write_finite
from pxcompress.deploy.session import Array, whole_batches
from pxcompress.models.signature import read_signature
from pxcompress.passes.parts import SplitBatches
from pxcompress.types import Batches

METHODS: Mapping[str, tuple[CalibrationMethod, Mapping[str, float]]] = {
    "extremes": (CalibrationMethod.MinMax, {}),
    "percentiles 0.01 and 99.99": (CalibrationMethod.Percentile, {"percentile": 99.99}),
    "percentiles 0.1 and 99.9": (CalibrationMethod.Percentile, {"percentile": 99.9}),
}
"""Ways to take the range of an activation from samples: its extremes, or a percentile without the tails.

Its entropy method is left out: it takes seconds for every tensor whose range grows from batch to batch.
"""

_AT_ONCE = 16
"""Number of samples whose activations are in memory at a time."""

_NARROW = 16
"""Matrix products with an axis below this width are no faster in int8 on a GPU."""

Means = dict[str, Array]


@dataclass(frozen=True)
class Style:
    """Integer types that suit a device: uint8 activations with int8 weights on CPUs, int8 for both on a GPU.

    ONNX Runtime takes twice as long for signed activations on x86; TensorRT takes no others, and no int32 biases.
    """

    gpu: bool = False

    @property
    def activations(self) -> QuantType:
        """Integer type of quantised activations."""
        return QuantType.QInt8 if self.gpu else QuantType.QUInt8

    @property
    def options(self) -> dict[str, Any]:
        """Further options of ONNX Runtime's quantisation for this style."""
        return {"ActivationSymmetric": True, "QuantizeBias": False} if self.gpu else {}


class Reader(CalibrationDataReader):
    """Feeds batches to ONNX Runtime's calibrator, in the batch size of the file."""

    def __init__(self, source: Path, batches: Batches) -> None:
        self._feeds = read_feeds(source, batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def read_feeds(source: Path, batches: Batches) -> Iterator[dict[str, Array]]:
    """Inputs of a file by name, batch by batch, in the batch size that the file takes."""
    proto = onnx.load(source, load_external_data=False)
    weights = {each.name for each in proto.graph.initializer}  # old files list them among the inputs
    ports = [port for port in proto.graph.input if port.name not in weights]
    dims = ports[0].type.tensor_type.shape.dim if ports else ()
    file_batch = dims[0].dim_value if dims else 0
    signature = read_signature({each.key: each.value for each in proto.metadata_props})
    for inputs, _ in SplitBatches(batches, _AT_ONCE):
        values = [*signature.unpack(inputs).values()] if signature.inputs else [inputs]
        arrays = [value.cpu().numpy() for value in values]
        for parts in zip(*(whole_batches(each, file_batch) if file_batch else [each] for each in arrays), strict=True):
            yield {port.name: part for port, part in zip(ports, parts, strict=True)}


def measure_ranges(source: Path, batches: Batches, method: str) -> TensorsData:
    """Ranges of all activations of `source` on `batches`, measured by one of `METHODS`."""
    kind, options = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        file = write_finite(source, Path(folder) / "finite.onnx")
        calibrator = create_calibrator(
            file,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=kind,
            use_external_data_format=len(onnx_files(file)) > 1,
            extra_options=dict(options),
        )
        for inputs, labels in SplitBatches(batches, _AT_ONCE):  # each call keeps what it has collected as a histogram
            calibrator.collect_data(Reader(source, [(inputs, labels)]))
        return calibrator.compute_data()


def write_quantised(source: Path, path: Path, ranges: TensorsData, style: Style, in_float: Sequence[str] = ()) -> None:
    """Write `source` as a QDQ file with a scale for each channel of a weight; nodes in `in_float` stay float32.

    Attention masks with huge constants, and nodes behind the last layers with weights, also stay float32.
    """
    model = load_model_with_shape_infer(source)
    narrow = _find_narrow(model.graph) if style.gpu else []
    quantizer = QDQQuantizer(
        model,
        True,  # per channel
        False,
        QuantType.QInt8,
        style.activations,
        ranges,
        [],
        [*in_float, *narrow, *find_masking(model.graph), *find_tail(model.graph)],
        sorted({*QLinearOpsRegistry, *QDQRegistry}),
        style.options,
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(path), len(onnx_files(source)) > 1)


def quantisable_nodes(source: Path) -> list[str]:
    """Names of the nodes that can be quantised, in the order of the graph."""
    graph = onnx.load(source, load_external_data=False).graph
    return [node.name for node in graph.node if node.op_type in QDQRegistry and node.name]


def name_nodes(source: Path, path: Path) -> None:
    """Write `source` to `path` with a name for every node, because quantisation refers to nodes by name."""
    model = onnx.load(source)
    names = {node.name for node in model.graph.node}
    for place, node in enumerate(model.graph.node):
        if not node.name:
            node.name = next(name for name in (f"node_{place}", f"unnamed_node_{place}") if name not in names)
    external = len(onnx_files(source)) > 1
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data")


def correct_biases(source: Path, latest: Path, quantised: Path, path: Path, batches: Batches) -> int:
    """Write `latest` to `path` with biases that cancel the mean error of quantisation; returns how many were changed.

    A bias b of a layer y = w x + b is moved by the mean of y - y', which is the least-squares solution for the bias
    alone: y is the layer's output in the float32 file `source`, y' that in the file `quantised`, made of `latest`
    (`source` itself, or `source` with biases that were corrected before).
    """
    model = onnx.load(latest)
    biases = _find_biases(model.graph)
    before, after = (_measure_means(file, biases, batches) for file in (source, quantised))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    corrected = 0
    for node, (name, _) in biases.items():
        if node in before and node in after:
            values = numpy_helper.to_array(tensors[name])
            corrected_values = (values + before[node] - after[node]).astype(values.dtype)
            tensors[name].CopyFrom(numpy_helper.from_array(corrected_values, name))
            corrected += 1
    onnx.save(model, path)
    return corrected


def _find_biases(graph: onnx.GraphProto) -> dict[str, tuple[str, int]]:
    """Node name -> its bias, if no other node reads that, and the axis of the output's channels.

    The node is a convolution, a Gemm, or the Add behind a MatMul.
    """
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    readers = [name for node in graph.node for name in node.input]
    products = {name for node in graph.node if node.op_type == "MatMul" for name in node.output}
    biases = {}
    for node in graph.node:
        names: list[str] = []
        if node.op_type in ("Conv", "Gemm"):
            names = list(node.input[2:3])
        elif node.op_type == "Add" and products & set(node.input):
            names = [name for name in node.input if name in sizes]
        if node.name and len(names) == 1 and len(sizes.get(names[0], ())) == 1 and readers.count(names[0]) == 1:
            biases[node.name] = (names[0], 1 if node.op_type == "Conv" else -1)
    return biases


def _measure_means(file: Path, axes: Mapping[str, tuple[str, int]], batches: Batches) -> Means:
    """Mean of every output channel, over samples and positions, of the nodes named in `axes`."""
    model = onnx.load(file)
    outputs = {node.name: node.output[0] for node in model.graph.node if node.name in axes}
    own = {value.name for value in model.graph.output}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in sorted({*outputs.values()} - own)
    )
    sums: Means = {}
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "open.onnx")
        session = runtime.open_session(Path(folder) / "open.onnx", "cpu")
        for feed in read_feeds(file, batches):
            values = session.outputs_of(feed)
            for node, name in outputs.items():
                channels = values[name].movedim(axes[node][1], 0).flatten(1).double()
                sums[node] = sums.get(node, 0) + channels.sum(1).numpy()
                counts[node] = counts.get(node, 0) + channels.shape[1]
    return {node: total / counts[node] for node, total in sums.items()}


def _find_narrow(graph: onnx.GraphProto) -> list[str]:
    """Names of the matrix products that have a weight with an axis below `_NARROW`."""
    sizes = {tensor.name: tensor.dims for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type in ("Gemm", "MatMul") and any(min(sizes[n]) < _NARROW for n in node.input[:2] if n in sizes)
    ]
