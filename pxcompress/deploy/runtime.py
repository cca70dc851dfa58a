"""The only door to ONNX Runtime: sessions whose execution provider is proven, and a stop-watch.

Asked for a GPU that it cannot use, ONNX Runtime writes to stderr and hands out a CPU session. Here a provider is tried
on a one-node model before any work starts, and every session knows which nodes run where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.capi import build_and_package_info

from pxcompress.choices import PROVIDERS as PROVIDERS
from pxcompress.deploy.hardware import cpu_name, load_tensorrt, missing_gpu
from pxcompress.deploy.quiet import capture_output, shorten_message
from pxcompress.deploy.session import CPU, ORT_ERRORS, Array, Session
from pxcompress.deploy.stopwatch import WARMUP, time_interleaved
from pxcompress.errors import InputError, ResultError
from pxcompress.proof import Placement

VERSION: str = ort.__version__
CUDA_VERSION: str = getattr(build_and_package_info, "cuda_version", "")
"""What this ONNX Runtime was built for; "" for none."""

_CUDA = "CUDAExecutionProvider"
_NAMES = {"cpu": CPU, "cuda": _CUDA, "cuda-graph": _CUDA, "tensorrt": "TensorrtExecutionProvider"}
MOST_THREADS = 1024

_CUDA_OPTIONS = {"cudnn_conv_algo_search": "EXHAUSTIVE"}  # DEFAULT is 4 to 50 times slower
_STACKS: Mapping[str, list[Any]] = {
    "cpu": [CPU],
    "cuda": [(_CUDA, _CUDA_OPTIONS), CPU],
    "cuda-graph": [(_CUDA, {**_CUDA_OPTIONS, "enable_cuda_graph": "1"}), CPU],
    "tensorrt": ["TensorrtExecutionProvider", (_CUDA, _CUDA_OPTIONS), CPU],
}
"""What a session is asked for, by our names. "cuda-graph" records the kernels of a call once and replays them."""


def open_session(path: Path | str, provider: str = "auto", *, threads: int = 0, strict: bool = False) -> Session:
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
    place, reason = _choose(provider)
    model, failure = _create(path, place, threads)
    if failure and place != "cpu" and provider == "auto":
        place, reason = "cpu", f"{place} failed on this model: {failure}"
        model, failure = _create(path, place, threads)
    if failure:
        raise InputError(f"{path} cannot be loaded by ONNX Runtime on {place}: {failure}")
    placement = _placement(model, provider, reason)
    if strict and placement.fallback_reason:
        raise ResultError(f"{path.name} does not run on {provider} alone: {placement.fallback_reason}")
    return Session.of(path, model, placement, threads)


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
    place, _ = _choose(provider)
    model, failure = _create(graph, place, threads or torch.get_num_threads())
    if failure:
        raise ResultError(f"an operator cannot be timed on {place}: {failure}")
    operator = Session.of(Path("operator"), model, _placement(model, provider, ""), threads)
    call = operator.runner(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    return float(np.quantile(time_interleaved({"it": call}, warmup=5, runs=30, max_seconds=0.2)["it"], 0.1))


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
        with capture_output():
            ort.preload_dlls()  # CUDA and cuDNN from PyTorch's packages
            if provider == "tensorrt":
                load_tensorrt()
    model, failure = _create(_one_convolution(), provider, threads=1)
    if failure:
        return failure
    try:
        Session.of(Path("probe"), model, _placement(model, provider, ""), 1).runner(np.zeros((1, 1, 2, 2), np.float32))
    except (InputError, *ORT_ERRORS) as error:
        return shorten_message(str(error))
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
    with capture_output() as noise:
        try:
            model = ort.InferenceSession(source, options, providers=_STACKS[provider], enable_fallback=0)
        except ORT_ERRORS as error:
            failure = str(error)
    if model is None:
        return None, shorten_message(f"{failure}\n{noise()}")
    if model.get_providers()[0] != _NAMES[provider]:
        return None, shorten_message(noise()) or f"ONNX Runtime gave {model.get_providers()[0]} instead"
    return model, ""


def _placement(model: Any, provider_name: str, reason: str) -> Placement:
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
    return Placement(provider_name, got, len(nodes) - elsewhere.total(), len(nodes), reason, counts)
