"""An ONNX model, opened and ready to run: what it takes and gives, a call, and a call on bound buffers to time."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from torch import Tensor

from pxcompress.deploy.quiet import shorten_message
from pxcompress.errors import InputError
from pxcompress.proof import Placement

Array = npt.NDArray[Any]

Inputs = Array | Tensor | Mapping[str, Array]
"""A batch (n, ...) for a file with one input, or what every input takes, by name."""

CPU = "CPUExecutionProvider"

_graphs = itertools.count(1)
"""Numbers of recorded graphs: every bound call has its own, or it would replay another one on that one's buffers."""

_NO_GRAPH = -1
"""Number of a call that is neither recorded nor replayed, as ONNX Runtime has it."""

_WHOLE = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "bool")
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    **{f"tensor({name})": np.dtype(name) for name in _WHOLE},
}
_WEIGHTS: Mapping[int, str] = {
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp64",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "int8",
}
ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.EPFail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True)
class Port:
    """Name, shape (None where dynamic) and type of an input or the output."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"({', '.join('any' if size is None else str(size) for size in self.shape)})"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of `shape` can be given, whatever its first axis."""
        pairs = zip(self.shape[1:], shape[1:], strict=False)
        return len(self.shape) == len(shape) and all(own in (None, given) for own, given in pairs)


@dataclass(frozen=True, eq=False)
class Session:
    """An ONNX model, ready to run; `placement` says on what. Outputs after the first are not computed.

    `threads` are CPU threads, not pinned to cores.
    """

    path: Path
    placement: Placement
    providers: tuple[str, ...]
    inputs: tuple[Port, ...]
    output: Port
    threads: int
    _model: Any

    @classmethod
    def of(cls, path: Path, model: Any, placement: Placement, threads: int) -> Session:
        """What ONNX Runtime's session `model` is; `InputError` for inputs or outputs of a type that is none of ours."""
        inputs = tuple(_port(path, node) for node in model.get_inputs())
        output = _port(path, model.get_outputs()[0])
        return cls(path, placement, tuple(model.get_providers()), inputs, output, threads, model)

    @property
    def input(self) -> Port:
        """The only input. Raises `InputError` where there are others, or none."""
        if len(self.inputs) != 1:
            names = ", ".join(port.name for port in self.inputs)
            raise InputError(f"{self.path} has {len(self.inputs)} inputs ({names}); expected one: images")
        return self.inputs[0]

    @property
    def device(self) -> str:
        """Where inputs and outputs live while timing: "cuda" or "cpu"."""
        return "cpu" if self.placement.got == CPU else "cuda"

    @property
    def precision(self) -> str:
        """What the file says ("int8", "fp16"), else what most of its weights are; "tf32" where float32 is not kept.

        cuDNN uses TF32 whatever ONNX Runtime is told, unless NVIDIA_TF32_OVERRIDE=0.
        """
        if weights_precision := self.metadata.get("precision") or _of_weights(self.path):
            return weights_precision
        tf32 = self.device == "cuda" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
        return "tf32" if tf32 else "fp32"

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says about itself: its metadata_props."""
        return dict(self._model.get_modelmeta().custom_metadata_map)

    def predict(self, inputs: Inputs) -> Array:
        """First output for a batch of inputs, from and to host memory; `InputError` where it cannot run.

        A file with one input and a fixed batch is called as often as it takes, at the end with repeated inputs.
        """
        feed = self._feed(inputs)
        if isinstance(inputs, Mapping):
            return self._run(feed)
        array, file_batch = feed[self.input.name], self.input.shape[0]
        if file_batch in (None, len(array)):
            return self._run(feed)
        parts = (self._run({self.input.name: part}) for part in whole_batches(array, file_batch))
        return np.concatenate(list(parts))[: len(array)]

    def runner(self, inputs: Inputs) -> Bound:
        """One inference call on buffers bound once, on the device; returns when the result is there.

        It was called once. On a GPU this is device time: copies from and to the host are not part of it. `InputError`
        where it cannot run, also for inputs that are not the batch of a file where that is fixed.
        """
        feed = self._feed(inputs)
        for port in self.inputs:
            if port.shape and port.shape[0] not in (None, len(feed[port.name])):
                samples = len(feed[port.name])
                raise InputError(f"{self.path} has a fixed batch of {port.shape[0]}; given {samples} samples")
        outputs = self._run(feed)  # its shape is needed to bind the output
        binding = self._model.io_binding()
        try:
            sources = {name: ort.OrtValue.ortvalue_from_numpy(array, self.device, 0) for name, array in feed.items()}
            target = ort.OrtValue.ortvalue_from_shape_and_type(outputs.shape, outputs.dtype.type, self.device, 0)
            for name, source in sources.items():
                binding.bind_ortvalue_input(name, source)
            binding.bind_ortvalue_output(self.output.name, target)
            call = Bound(self._model, binding, sources, target, _run_options(next(_graphs)))
            call()  # takes all memory that it needs, and records the graph where there is one
        except ORT_ERRORS as error:
            raise self._unable(feed, error) from error
        return call

    def _run(self, feed: Mapping[str, Array]) -> Array:
        try:
            (outputs,) = self._model.run([self.output.name], dict(feed), _run_options(_NO_GRAPH))
        except ORT_ERRORS as error:
            raise self._unable(feed, error) from error
        return np.asarray(outputs)

    def _unable(self, feed: Mapping[str, Array], error: Exception) -> InputError:
        shapes = " and ".join(str(array.shape) for array in feed.values())
        where = f"{self.path.name} does not run on inputs of shape {shapes} on {self.placement.asked}"
        return InputError(f"{where}: {shorten_message(str(error))}")

    def _feed(self, inputs: Inputs) -> dict[str, Array]:
        """What every input takes, by name and in its type. Raises `InputError` for other shapes."""
        arrays = inputs if isinstance(inputs, Mapping) else {self.input.name: inputs}
        feed = {}
        for port in self.inputs:
            value = arrays[port.name]
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            if not port.fits(array.shape):
                raise InputError(f"{self.path.name} expects inputs of shape {port}; given {array.shape}")
            feed[port.name] = np.asarray(array, dtype=port.dtype, order="C")
        return feed


@dataclass(frozen=True, eq=False)
class Bound:
    """A call on bound buffers. It holds the buffers because a binding on the CPU only points at their memory."""

    model: Any
    binding: Any
    sources: Mapping[str, Any]
    target: Any
    options: Any

    def __call__(self) -> None:
        self.model.run_with_iobinding(self.binding, self.options)
        self.binding.synchronize_outputs()


def whole_batches(array: Array, size: int) -> list[Array]:
    """`array` in parts of `size` rows; the last one is filled up with its last row."""
    padded = np.pad(array, [(0, -len(array) % size), *[(0, 0)] * (array.ndim - 1)], mode="edge")
    return np.split(padded, len(padded) // size)


def _of_weights(path: Path) -> str:
    """The type of most weights of a file, by our names; "" for float32, and for what we have no name for."""
    counts: Counter[int] = Counter()
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        counts[tensor.data_type] += prod(tensor.dims)
    return _WEIGHTS.get(max(counts, key=lambda kind: counts[kind]), "") if counts else ""


def _run_options(graph: int) -> Any:
    """Options of one call, with the number of the graph that it records or replays; without effect elsewhere."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _port(path: Path, node: Any) -> Port:
    if node.type not in _DTYPES:
        raise InputError(f"{path}: {node.name!r} is a {node.type}; expected one of: {', '.join(_DTYPES)}")
    return Port(node.name, tuple(s if isinstance(s, int) else None for s in node.shape), _DTYPES[node.type])
