"""The only door to ONNX Runtime: sessions whose execution provider is proven, and a stop-watch.

Asked for a GPU that it cannot use, ONNX Runtime writes to stderr and hands out a CPU session. Here a provider is tried
on a one-node model before any work starts, and every session knows which nodes run where.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnxruntime.capi import build_and_package_info
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from torch import Tensor

from pxcompress.deploy.hardware import cpu_name, load_tensorrt, missing_gpu
from pxcompress.deploy.quiet import captured, one_line
from pxcompress.deploy.stopwatch import WARMUP, time_interleaved
from pxcompress.errors import InputError, ResultError
from pxcompress.proof import Placement

VERSION: str = ort.__version__
CUDA_VERSION: str = getattr(build_and_package_info, "cuda_version", "")
"""What this ONNX Runtime was built for; "" for none."""
Array = npt.NDArray[Any]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_NAMES = {"cpu": _CPU, "cuda": _CUDA, "cuda-graph": _CUDA, "tensorrt": "TensorrtExecutionProvider"}
PROVIDERS = ("auto", *_NAMES)
MOST_THREADS = 1024

_CUDA_OPTIONS = {"cudnn_conv_algo_search": "EXHAUSTIVE"}  # DEFAULT is 4 to 50 times slower
_STACKS: Mapping[str, list[Any]] = {
    "cpu": [_CPU],
    "cuda": [(_CUDA, _CUDA_OPTIONS), _CPU],
    "cuda-graph": [(_CUDA, {**_CUDA_OPTIONS, "enable_cuda_graph": "1"}), _CPU],
    "tensorrt": ["TensorrtExecutionProvider", (_CUDA, _CUDA_OPTIONS), _CPU],
}
"""What a session is asked for, by our names. "cuda-graph" records the kernels of a call once and replays them."""

_graphs = itertools.count(1)
"""Numbers of recorded graphs: every bound call has its own, or it would replay another one on that one's buffers."""

_NO_GRAPH = -1
"""Number of a call that is neither recorded nor replayed, as ONNX Runtime has it."""

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    **{f"tensor({name})": np.dtype(name) for name in ("uint8", "int8", "int32", "int64")},
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
    """Name, shape (None where dynamic) and type of the input or the output."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"({', '.join('any' if size is None else str(size) for size in self.shape)})"


@dataclass(frozen=True, eq=False)
class Session:
    """An ONNX model with one input, ready to run; `placement` says on what. Outputs after the first are not computed.

    `threads` are CPU threads, not pinned to cores.
    """

    path: Path
    placement: Placement
    providers: tuple[str, ...]
    input: Port
    output: Port
    threads: int
    _model: Any

    @property
    def device(self) -> str:
        """Where inputs and outputs live while timing: "cuda" or "cpu"."""
        return "cpu" if self.placement.got == _CPU else "cuda"

    @property
    def precision(self) -> str:
        """What the file says ("int8", "fp16"), else what most of its weights are; "tf32" where float32 is not kept.

        cuDNN uses TF32 whatever ONNX Runtime is told, unless NVIDIA_TF32_OVERRIDE=0.
        """
        if said := self.metadata.get("precision") or _of_weights(self.path):
            return said
        tf32 = self.device == "cuda" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
        return "tf32" if tf32 else "fp32"

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says about itself: its metadata_props."""
        return dict(self._model.get_modelmeta().custom_metadata_map)

    def predict(self, inputs: Array | Tensor) -> Array:
        """First output for a batch of inputs (n, ...), from and to host memory; `InputError` where it cannot run.

        A file with a fixed batch is called as often as it takes, at the end with repeated inputs.
        """
        array = self._array(inputs)
        fixed = self.input.shape[0]
        if fixed in (None, len(array)):
            return self._run(array)
        return np.concatenate([self._run(part) for part in whole_batches(array, fixed)])[: len(array)]

    def _run(self, array: Array) -> Array:
        try:
            (logits,) = self._model.run([self.output.name], {self.input.name: array}, _run_options(_NO_GRAPH))
        except ORT_ERRORS as error:
            raise self._unable(array, error) from error
        return np.asarray(logits)

    def _unable(self, array: Array, error: Exception) -> InputError:
        said = f"{self.path.name} does not run on inputs of shape {array.shape}"
        return InputError(f"{said} on {self.placement.asked}: {one_line(str(error))}")

    def runner(self, inputs: Array | Tensor) -> _Bound:
        """One inference call on buffers bound once, on the device; returns when the result is there.

        It was called once. On a GPU this is device time: copies from and to the host are not part of it. `InputError`
        where it cannot run, also for inputs that are not the batch of a file where that is fixed.
        """
        array = self._array(inputs)
        if self.input.shape[0] not in (None, len(array)):
            raise InputError(f"{self.path} has a fixed batch of {self.input.shape[0]}; given {len(array)} samples")
        logits = self.predict(array)  # its shape is needed to bind the output
        binding = self._model.io_binding()
        try:
            source = ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
            target = ort.OrtValue.ortvalue_from_shape_and_type(logits.shape, logits.dtype.type, self.device, 0)
            binding.bind_ortvalue_input(self.input.name, source)
            binding.bind_ortvalue_output(self.output.name, target)
            run = _Bound(self._model, binding, source, target, _run_options(next(_graphs)))
            run()  # takes all memory that it needs, and records the graph where there is one
        except ORT_ERRORS as error:
            raise self._unable(array, error) from error
        return run

    def _array(self, inputs: Array | Tensor) -> Array:
        array = inputs.detach().cpu().numpy() if isinstance(inputs, Tensor) else inputs
        expected = self.input.shape
        pairs = zip(expected[1:], array.shape[1:], strict=False)
        if len(expected) != array.ndim or not all(a in (None, b) for a, b in pairs):
            raise InputError(f"{self.path.name} expects inputs of shape {self.input}; given {array.shape}")
        return np.ascontiguousarray(array, dtype=self.input.dtype)


@dataclass(frozen=True, eq=False)
class _Bound:
    """A call on bound buffers. It holds the buffers because a binding on the CPU only points at their memory."""

    model: Any
    binding: Any
    source: Any
    target: Any
    options: Any

    def __call__(self) -> None:
        self.model.run_with_iobinding(self.binding, self.options)
        self.binding.synchronize_outputs()


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


def whole_batches(array: Array, size: int) -> list[Array]:
    """`array` in parts of `size` rows; the last one is filled up with its last row."""
    filled = np.pad(array, [(0, -len(array) % size), *[(0, 0)] * (array.ndim - 1)], mode="edge")
    return np.split(filled, len(filled) // size)


def session(path: Path | str, provider: str = "auto", *, threads: int = 0, strict: bool = False) -> Session:
    """Load an ONNX file.

    `provider`: "cpu", "cuda", "cuda-graph", "tensorrt", or "auto" (CUDA where it works, else the CPU; the reason stands
    in `placement.fallback_reason`). `threads`: CPU threads; 0 takes PyTorch's number (the physical cores on x86, or
    OMP_NUM_THREADS). Raises `InputError` for a file that is missing or no model and for an asked provider that cannot
    be used; with `strict` `ResultError` when any node runs elsewhere.
    """
    path = Path(path)
    check_provider(provider)
    if not path.is_file():
        raise InputError(f"no ONNX file at {path}; check the path")
    threads = threads or torch.get_num_threads()
    used, reason = _choose(provider)
    model, failure = _create(path, used, threads)
    if failure and used != "cpu" and provider == "auto":
        used, reason = "cpu", f"{used} failed on this model: {failure}"
        model, failure = _create(path, used, threads)
    if failure:
        raise InputError(f"{path} cannot be loaded by ONNX Runtime on {used}: {failure}")
    placement = _placement(model, provider, reason)
    if strict and placement.fallback_reason:
        raise ResultError(f"{path.name} does not run on {provider} alone: {placement.fallback_reason}")
    return _session(path, model, placement, threads)


def _session(path: Path, model: Any, placement: Placement, threads: int) -> Session:
    source, target = _ports(path, model)
    return Session(path, placement, tuple(model.get_providers()), source, target, threads, model)


def check_provider(name: str) -> None:
    """Raise `InputError` if a provider of this name is unknown or cannot be used here; "auto" and "cpu" always can."""
    if name not in PROVIDERS:
        raise InputError(f"unknown provider {name!r}; expected one of: {', '.join(PROVIDERS)}")
    reason = "" if name == "auto" else unusable(name)
    if reason:
        raise InputError(f"provider {name!r} cannot be used: {reason}; use auto or cpu")


def check_threads(threads: int) -> None:
    """Raise `InputError` for a number of CPU threads that no machine has."""
    if not 0 <= threads <= MOST_THREADS:
        raise InputError(f"threads is {threads}; expected 0 (all cores), or 1 to {MOST_THREADS}")


def time_runs(
    sessions: Mapping[str, Session],
    example: Array,
    *,
    batch_size: int,
    warmup: int = WARMUP,
    runs: int = 200,
    max_seconds: float = 10.0,
) -> dict[str, Array]:
    """Seconds of every inference call of every session, on the first sample of `example` repeated `batch_size` times.

    See `time_interleaved`; GPU times are device times, without copies from and to the host.
    """
    batch = np.repeat(example[:1], batch_size, axis=0)
    runners = {name: session.runner(batch) for name, session in sessions.items()}
    return time_interleaved(runners, warmup=warmup, runs=runs, max_seconds=max_seconds)


def time_graph(graph: bytes, shape: tuple[int, ...], provider: str, threads: int) -> float:
    """Seconds of an undisturbed call of a small ONNX model with one input of `shape`, random values; `ResultError`.

    The lower tenth of all calls: what else the machine does only ever adds to them.
    """
    used, _ = _choose(provider)
    model, failure = _create(graph, used, threads or torch.get_num_threads())
    if failure:
        raise ResultError(f"an operator cannot be timed on {used}: {failure}")
    loaded = _session(Path("operator"), model, _placement(model, provider, ""), threads)
    run = loaded.runner(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    return float(np.quantile(time_interleaved({"it": run}, warmup=5, runs=30, max_seconds=0.2)["it"], 0.1))


def device_name(provider: str, threads: int) -> str:
    """What a latency was measured on: the GPU, or the processor and how many threads of it."""
    if _choose(provider)[0] != "cpu":
        return f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'GPU'} {provider}"
    return f"{cpu_name()}, {threads or torch.get_num_threads()} threads"


def _choose(provider: str) -> tuple[str, str]:
    """What to run on, and why it is not what "auto" would rather have taken. Raises as `check_provider` does."""
    check_provider(provider)
    if provider != "auto":
        return provider, ""
    reason = unusable("cuda")
    return ("cpu", f"CUDA cannot be used: {reason}") if reason else ("cuda", "")


@cache
def unusable(provider: str) -> str:
    """Why a provider does not work here; "" when it does. `get_available_providers` only lists what was compiled in."""
    if _NAMES[provider] not in ort.get_available_providers():
        return f"onnxruntime {VERSION} was built without {_NAMES[provider]} (the onnxruntime-gpu package has it)"
    if provider != "cpu":
        if reason := missing_gpu():
            return reason
        with captured():
            ort.preload_dlls()  # CUDA and cuDNN from PyTorch's packages
            if provider == "tensorrt":
                load_tensorrt()
    model, failure = _create(_one_convolution(), provider, threads=1)
    if failure:
        return failure
    try:
        _session(Path("probe"), model, _placement(model, provider, ""), 1).runner(np.zeros((1, 1, 2, 2), np.float32))
    except (InputError, *ORT_ERRORS) as error:
        return one_line(str(error))
    return ""


def _one_convolution() -> bytes:
    """The smallest model that needs cuDNN."""
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
    """A session on `provider`, or why there is none (one line). Raises as `check_threads` does."""
    check_threads(threads)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is in the exception, too
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Idle threads of one session otherwise spin on the cores that another one is timed on (1.7x on 2 cores).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model, failure = None, ""
    with captured() as noise:
        try:
            model = ort.InferenceSession(source, options, providers=_STACKS[provider], enable_fallback=0)
        except ORT_ERRORS as error:
            failure = str(error)
    if model is None:
        return None, one_line(f"{failure}\n{noise()}")
    if model.get_providers()[0] != _NAMES[provider]:
        return None, one_line(noise()) or f"ONNX Runtime gave {model.get_providers()[0]} instead"
    return model, ""


def _placement(model: Any, asked: str, reason: str) -> Placement:
    """Counts the nodes per provider, as ONNX Runtime assigned them (before it fuses nodes)."""
    got = model.get_providers()[0]
    nodes = [
        (part.ep_name, node.op_type) for part in model.get_provider_graph_assignment_info() for node in part.get_nodes()
    ]
    elsewhere = Counter(f"{op} on {provider}" for provider, op in nodes if provider != got)
    if elsewhere and not reason:
        names = ", ".join(f"{count} {name}" for name, count in elsewhere.most_common(5))
        reason = f"{elsewhere.total()} of {len(nodes)} nodes run elsewhere: {names}"
    counts = dict(Counter(provider for provider, _ in nodes if provider != got))
    return Placement(asked, got, len(nodes) - elsewhere.total(), len(nodes), reason, counts)


def _ports(path: Path, model: Any) -> tuple[Port, Port]:
    inputs = model.get_inputs()
    if len(inputs) != 1:
        raise InputError(f"{path} has {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); expected one: images")
    return _port(path, inputs[0]), _port(path, model.get_outputs()[0])


def _port(path: Path, node: Any) -> Port:
    if node.type not in _DTYPES:
        raise InputError(f"{path}: {node.name!r} is a {node.type}; expected one of: {', '.join(_DTYPES)}")
    return Port(node.name, tuple(s if isinstance(s, int) else None for s in node.shape), _DTYPES[node.type])
