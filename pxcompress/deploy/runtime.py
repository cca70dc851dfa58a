"""The only door to ONNX Runtime: sessions whose execution provider is proven, and a stop-watch.

Asked for a GPU that it cannot use, ONNX Runtime writes to stderr and hands out a CPU session. Here a provider is tried
on a one-node model before any work starts, and every session knows which nodes run where.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import platform
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
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

from pxcompress.deploy.stopwatch import time_interleaved
from pxcompress.errors import InputError, ResultError
from pxcompress.proof import Placement

VERSION: str = ort.__version__
CUDA_VERSION: str = getattr(build_and_package_info, "cuda_version", "")
"""What this ONNX Runtime was built for; "" for none."""
Array = npt.NDArray[Any]

_CPU = "CPUExecutionProvider"
_NAMES = {"cpu": _CPU, "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
PROVIDERS = ("auto", *_NAMES)

_CUDA_OPTIONS = ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "EXHAUSTIVE"})  # DEFAULT is 4 to 50 times slower
_STACKS: Mapping[str, list[Any]] = {
    "cpu": [_CPU],
    "cuda": [_CUDA_OPTIONS, _CPU],
    "tensorrt": ["TensorrtExecutionProvider", _CUDA_OPTIONS, _CPU],
}
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
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
        """What the file says ("int8", "fp16"), else "fp16" where its input is, "tf32" or "fp32".

        cuDNN uses TF32 whatever ONNX Runtime is told, unless NVIDIA_TF32_OVERRIDE=0.
        """
        if said := self.metadata.get("precision"):
            return said
        if self.input.dtype == np.float16:
            return "fp16"
        tf32 = self.device == "cuda" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
        return "tf32" if tf32 else "fp32"

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says about itself: its metadata_props."""
        return dict(self._model.get_modelmeta().custom_metadata_map)

    def predict(self, inputs: Array | Tensor) -> Array:
        """First output for a batch of inputs (n, ...), from and to host memory; `InputError` where it cannot run."""
        array = self._array(inputs)
        try:
            (logits,) = self._model.run([self.output.name], {self.input.name: array})
        except ORT_ERRORS as error:
            reason = _one_line(str(error))
            raise InputError(f"{self.path.name} does not run on inputs of shape {array.shape}: {reason}") from error
        return np.asarray(logits)

    def runner(self, inputs: Array | Tensor) -> Callable[[], None]:
        """One inference call on buffers bound once, on the device; returns when the result is there.

        On a GPU this is device time: copies from and to the host are not part of it.
        """
        array = self._array(inputs)
        logits = self.predict(array)  # its shape is needed to bind the output
        source = ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
        target = ort.OrtValue.ortvalue_from_shape_and_type(logits.shape, logits.dtype.type, self.device, 0)
        binding = self._model.io_binding()
        binding.bind_ortvalue_input(self.input.name, source)
        binding.bind_ortvalue_output(self.output.name, target)
        return _Bound(self._model, binding, source, target)

    def _array(self, inputs: Array | Tensor) -> Array:
        array = inputs.detach().cpu().numpy() if isinstance(inputs, Tensor) else inputs
        expected = self.input.shape
        fits = len(expected) == array.ndim and all(a in (None, b) for a, b in zip(expected, array.shape, strict=True))
        if not fits:
            raise InputError(f"{self.path.name} expects inputs of shape {self.input}; given {array.shape}")
        return np.ascontiguousarray(array, dtype=self.input.dtype)


@dataclass(frozen=True, eq=False)
class _Bound:
    """A call on bound buffers. It holds the buffers because a binding on the CPU only points at their memory."""

    model: Any
    binding: Any
    source: Any
    target: Any

    def __call__(self) -> None:
        self.model.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()


def session(path: Path | str, provider: str = "auto", *, threads: int = 0, strict: bool = False) -> Session:
    """Load an ONNX file.

    `provider`: "cpu", "cuda", "tensorrt", or "auto" (CUDA where it works, else the CPU; the reason stands in
    `placement.fallback_reason`). `threads`: CPU threads; 0 takes PyTorch's number (the physical cores on x86, or
    OMP_NUM_THREADS). Raises `InputError` for a file that is missing or no model and for an asked provider that cannot
    be used; with `strict` `ResultError` when any node runs elsewhere.
    """
    path = Path(path)
    check_provider(provider)
    if threads < 0:
        raise InputError(f"threads is {threads}; expected a positive number, or 0 for as many as PyTorch uses")
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
    source, target = _ports(path, model)
    return Session(path, placement, tuple(model.get_providers()), source, target, threads, model)


def check_provider(name: str) -> None:
    """Raise `InputError` if a provider of this name is unknown or cannot be used here; "auto" and "cpu" always can."""
    if name not in PROVIDERS:
        raise InputError(f"unknown provider {name!r}; expected one of: {', '.join(PROVIDERS)}")
    reason = "" if name == "auto" else unusable(name)
    if reason:
        raise InputError(f"provider {name!r} cannot be used: {reason}; use auto or cpu")


def time_runs(
    sessions: Mapping[str, Session],
    example: Array,
    *,
    batch_size: int,
    warmup: int = 50,
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
    (source, target), path = _ports(Path("operator"), model), Path("operator")
    loaded = Session(path, _placement(model, provider, ""), (), source, target, threads, model)
    run = loaded.runner(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    return float(np.quantile(time_interleaved({"it": run}, warmup=5, runs=30, max_seconds=0.2)["it"], 0.1))


def device_name(provider: str, threads: int) -> str:
    """What a latency was measured on: the GPU, or the processor and how many threads of it."""
    if _choose(provider)[0] != "cpu":
        return f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'GPU'} {provider}"
    return f"{cpu_name()}, {threads or torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's model name, as Linux gives it; elsewhere what Python knows."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _choose(provider: str) -> tuple[str, str]:
    """What to run on, and why it is not what "auto" would rather have taken."""
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
        if reason := _missing_gpu():
            return reason
        with _captured():
            ort.preload_dlls()  # CUDA and cuDNN from PyTorch's packages
    model, failure = _create(_one_convolution(), provider, threads=1)
    if failure:
        return failure
    try:
        model.run(None, {"x": np.zeros((1, 1, 2, 2), np.float32)})
    except ORT_ERRORS as error:
        return _one_line(str(error))
    return ""


def _missing_gpu() -> str:
    """Asks the driver itself: neither PyTorch nor ONNX Runtime need be built for its version."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver ({library} is not there)"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver sees no GPU (nvidia-smi and CUDA_VISIBLE_DEVICES show which)"
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
    """A session on `provider`, or why there is none (one line)."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is in the exception, too
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Idle threads of one session otherwise spin on the cores that another one is timed on (1.7x on 2 cores).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model, failure = None, ""
    with _captured() as noise:
        try:
            model = ort.InferenceSession(source, options, providers=_STACKS[provider], enable_fallback=0)
        except ORT_ERRORS as error:
            failure = str(error)
    if model is None:
        return None, _one_line(f"{failure}\n{noise()}")
    if model.get_providers()[0] != _NAMES[provider]:
        return None, _one_line(noise()) or f"ONNX Runtime gave {model.get_providers()[0]} instead"
    return model, ""


@contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """Keeps stdout and stderr quiet, also of C++ (by redirecting file descriptor 2); yields a reader of the latter."""
    sys.stderr.flush()
    saved = os.dup(2)
    text = ""
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
                yield lambda: text
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            text = file.read().decode(errors="replace")


def _one_line(message: str) -> str:
    """What matters of an ONNX Runtime message: the library that could not be loaded, else the text after the codes."""
    message = re.sub(r"\x1b\[[0-9;]*m", "", message).strip()
    if cause := re.search(r"with error: (.+)", message):
        return cause[1].strip()
    message = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message)
    return message.splitlines()[0][:300] if message else ""


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
