"""ONNX Runtime as a backend; it checks on which execution provider the nodes really run.

Asked for a GPU that it cannot use, ONNX Runtime writes to stderr and hands out a CPU session. Here a provider is tried
on a one-node model before any work starts, and every session knows which nodes run where.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnxruntime.capi import build_and_package_info
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from pxcompress.deploy.backends import BACKENDS, Backend, CannotOpen
from pxcompress.deploy.export import read_metadata
from pxcompress.deploy.hardware import TF32_SWITCH, explain_missing_gpu, explain_old_driver, load_tensorrt
from pxcompress.deploy.plugins import choose_plugin, explain_no_plugin
from pxcompress.deploy.quiet import capture_output, shorten_message
from pxcompress.deploy.session import Array, Port, Session, read_weight_type
from pxcompress.errors import InputError
from pxcompress.proof import Placement

VERSION: str = ort.__version__
CUDA_VERSION: str = getattr(build_and_package_info, "cuda_version", "")
"""Version of CUDA that this ONNX Runtime was built for; "" where it was built without."""

_CPU, _CUDA, _TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "EXHAUSTIVE",  # DEFAULT is 4 to 50 times slower
    "enable_cuda_graph": "0",
    "arena_extend_strategy": "kSameAsRequested",  # else memory grows by powers of two, whatever is needed
    "use_tf32": "0" if os.environ.get(TF32_SWITCH) == "0" else "1",
}
_TENSORRT_TYPES = {"fp16": "trt_fp16_enable", "int8": "trt_int8_enable"}
_TENSORRT_OPTIONS = {**dict.fromkeys(_TENSORRT_TYPES.values(), "0"), "trt_engine_cache_enable": "0"}
_STACKS: Mapping[str, list[Any]] = {
    "cpu": [_CPU],
    "cuda": [(_CUDA, _CUDA_OPTIONS), _CPU],
    "cuda-graph": [(_CUDA, {**_CUDA_OPTIONS, "enable_cuda_graph": "1"}), _CPU],
    "tensorrt": [(_TENSORRT, _TENSORRT_OPTIONS), (_CUDA, _CUDA_OPTIONS), _CPU],
}
"""Execution providers of a session in order of preference, by the provider's name here, with options that change
results.

"cuda-graph" records the kernels of a call once and replays them; "plugin", which is not here, is a provider from a
package of its own.
"""

_SHOWN = {*_CUDA_OPTIONS, *_TENSORRT_OPTIONS}
"""Provider options that reports show, as ONNX Runtime confirms them."""

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    **{
        f"tensor({name})": np.dtype(name)
        for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "bool")
    },
}
"""ONNX Runtime's name of a type -> NumPy's; inputs of other types are refused."""

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
"""Exceptions that ONNX Runtime raises; they have no base class of their own."""

_graphs = itertools.count(1)
"""Numbers for recorded CUDA graphs. Every bound call needs its own, or it would replay another one on wrong buffers."""

_NO_GRAPH = -1
"""The number that tells ONNX Runtime neither to record nor to replay a CUDA graph."""


@BACKENDS.register("cpu")
@BACKENDS.register("cuda")
@BACKENDS.register("cuda-graph")
@BACKENDS.register("plugin")
@BACKENDS.register("tensorrt")
@dataclass(frozen=True)
class OnnxRuntime(Backend):
    """ONNX Runtime on the CPU, on NVIDIA GPUs by CUDA or TensorRT, and through plug-in providers of other packages."""

    title: ClassVar[str] = "ONNX Runtime"

    @property
    def version(self) -> str:
        """Version of the package onnxruntime."""
        return VERSION

    def get_device(self, provider: str) -> str:
        """ "cpu" for the CPU and for plugins, which read host memory; "cuda" for CUDA and TensorRT."""
        return "cpu" if provider in ("cpu", "plugin") else "cuda"

    def explain_failure(self, provider: str) -> str:
        """Why `provider` does not work here, "" if it does.

        It is tried, since ONNX Runtime lists what was compiled in only.
        """
        return _try_provider(provider)

    def open(self, source: Path | bytes, provider: str, threads: int) -> OrtSession:
        """A session on `provider`; its `placement` says which nodes run on another one."""
        model, failure = _create(source, provider, threads)
        if model is None:
            raise CannotOpen(failure)
        return OrtSession.of(Path("model") if isinstance(source, bytes) else source, model, provider, threads)


@dataclass(frozen=True, eq=False)
class OrtSession(Session):
    """A session of ONNX Runtime; `providers` are its execution providers, the first one first."""

    providers: tuple[str, ...]
    _model: Any
    errors: ClassVar[tuple[type[Exception], ...]] = ORT_ERRORS

    @classmethod
    def of(cls, path: Path, model: Any, provider: str, threads: int) -> OrtSession:
        """Wrap ONNX Runtime's session `model`. Raises `InputError` for an input or output of an unknown type."""
        return cls(
            path=path,
            placement=_describe_placement(model, provider),
            inputs=tuple(_make_port(path, node) for node in model.get_inputs()),
            outputs=tuple(_make_port(path, node) for node in model.get_outputs()),
            threads=threads,
            metadata=dict(model.get_modelmeta().custom_metadata_map),
            providers=tuple(model.get_providers()),
            _model=model,
        )

    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        """The outputs for one batch."""
        names = [port.name for port in self.outputs]
        return [np.asarray(value) for value in self._model.run(names, dict(feed), _run_options(_NO_GRAPH))]

    def bind_feed(self, feed: Mapping[str, Array]) -> Bound:
        """A function that runs the model once on inputs that are already on the device, warmed up."""
        outputs = self.run(feed)  # their shapes are needed to bind them
        binding = self._model.io_binding()
        sources = {name: ort.OrtValue.ortvalue_from_numpy(array, self.device, 0) for name, array in feed.items()}
        targets = [
            ort.OrtValue.ortvalue_from_shape_and_type(value.shape, value.dtype.type, self.device, 0)
            for value in outputs
        ]
        for name, source in sources.items():
            binding.bind_ortvalue_input(name, source)
        for port, target in zip(self.outputs, targets, strict=True):
            binding.bind_ortvalue_output(port.name, target)
        call = Bound(self._model, binding, sources, targets, _run_options(next(_graphs)))
        call()  # takes all memory that it needs, and records the graph where there is one
        return call


@dataclass(frozen=True, eq=False)
class Bound:
    """A function that runs a model on bound buffers; it also holds the buffers, since a binding only points at them."""

    model: Any
    binding: Any
    sources: Mapping[str, Any]
    targets: Sequence[Any]
    options: Any

    def __call__(self) -> None:
        self.model.run_with_iobinding(self.binding, self.options)
        self.binding.synchronize_outputs()


def _try_provider(provider: str) -> str:
    """Why a session on `provider` cannot be opened and run here, found by trying it; "" if it can."""
    if provider == "plugin":
        if reason := explain_no_plugin():
            return reason
    elif _name(provider) not in ort.get_available_providers():
        return f"onnxruntime {VERSION} was built without {_name(provider)} (the onnxruntime-gpu package has it)"
    if OnnxRuntime().get_device(provider) == "cuda":
        if reason := explain_missing_gpu() or explain_old_driver(CUDA_VERSION):
            return reason
        with capture_output():
            ort.preload_dlls()  # CUDA and cuDNN from PyTorch's packages
            if provider == "tensorrt":
                load_tensorrt()
    model, failure = _create(_make_convolution(), provider, threads=1)
    if failure:
        return failure
    try:
        OrtSession.of(Path("probe"), model, provider, 1).bind(np.zeros((1, 1, 2, 2), np.float32))
    except (InputError, *ORT_ERRORS) as error:
        return shorten_message(str(error))
    return ""


def _make_convolution() -> bytes:
    """The bytes of the smallest ONNX model that needs cuDNN."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", kind, [1, 1, 2, 2])],
        [helper.make_tensor_value_info("y", kind, [1, 1, 1, 1])],
        [helper.make_tensor("w", kind, [1, 1, 2, 2], [1.0] * 4)],
    )
    opset = helper.make_opsetid("", 18)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())


def _create(source: Path | bytes, provider: str, threads: int) -> tuple[Any, str]:
    """A session on `provider` and ""; or None and the reason in one line."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is in the exception, too
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Idle threads of one session otherwise spin on the cores that another one is timed on (1.7x on 2 cores).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model, failure = None, ""
    with capture_output() as noise:
        try:
            if provider == "plugin":
                options.add_provider_for_devices(_list_plugin_devices(), {})
            stack = _list_providers(source, provider)
            model = ort.InferenceSession(source, options, providers=stack, enable_fallback=0)
        except (*ORT_ERRORS, DecodeError) as error:
            failure = str(error)
    if model is None:
        return None, shorten_message(f"{failure}\n{noise()}")
    if model.get_providers()[0] != _name(provider):
        return None, shorten_message(noise()) or f"ONNX Runtime gave {model.get_providers()[0]} instead"
    return model, ""


def _list_providers(source: Path | bytes, provider: str) -> list[Any] | None:
    """The execution providers for a session on a file; None for a plugin, which the session's options name.

    TensorRT computes in float16 and int8 only where it is allowed to: it is where the file has these types.
    """
    if provider != "tensorrt" or isinstance(source, bytes):
        return _STACKS.get(provider)
    (name, options), *others = _STACKS[provider]
    types = read_metadata(source).get("precision") or read_weight_type(source)
    allowed = {option: "1" for kind, option in _TENSORRT_TYPES.items() if kind == types}
    return [(name, {**options, **allowed}), *others]


def _list_plugin_devices() -> list[Any]:
    """The devices of the plugin's first provider. Raises `ValueError` where there is no plugin."""
    plugin = choose_plugin()
    if plugin is None:
        raise ValueError(explain_no_plugin())
    return [device for device in plugin.devices if device.ep_name == plugin.devices[0].ep_name]


def _name(provider: str) -> str:
    """ONNX Runtime's own name for a provider."""
    if provider == "plugin":
        return str(_list_plugin_devices()[0].ep_name)
    provider_name = _STACKS[provider][0]
    return str(provider_name if isinstance(provider_name, str) else provider_name[0])


def _describe_placement(model: Any, provider: str) -> Placement:
    """Count the nodes on each execution provider, as ONNX Runtime assigned them (before it fuses nodes)."""
    got = model.get_providers()[0]
    nodes = [
        (part.ep_name, node.op_type) for part in model.get_provider_graph_assignment_info() for node in part.get_nodes()
    ]
    elsewhere = Counter(f"{op} on {place}" for place, op in nodes if place != got)
    names = ", ".join(f"{count} {name}" for name, count in elsewhere.most_common(5))
    reason = f"{elsewhere.total()} of {len(nodes)} nodes run elsewhere: {names}" if elsewhere else ""
    counts = dict(Counter(place for place, _ in nodes if place != got))
    options = {
        name: value for name, value in sorted(model.get_provider_options().get(got, {}).items()) if name in _SHOWN
    }
    device = OnnxRuntime().get_device(provider)
    return Placement(provider, got, len(nodes) - elsewhere.total(), len(nodes), reason, counts, options, device)


def _run_options(graph: int) -> Any:
    """Options of one call: the number of the CUDA graph to record or replay; no effect on other providers."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def _make_port(path: Path, node: Any) -> Port:
    """Name, shape and type of an input or output of a session.

    Raises `InputError` for types that NumPy does not have.
    """
    if node.type not in _DTYPES:
        raise InputError(f"{path}: {node.name!r} is a {node.type}; expected one of: {', '.join(_DTYPES)}")
    return Port(node.name, tuple(s if isinstance(s, int) else None for s in node.shape), _DTYPES[node.type])
