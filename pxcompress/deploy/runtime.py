"""Opens models on the backend of the requested provider, and times them; it knows no runtime in particular."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from pxcompress.deploy.backends import BACKENDS, Backend, CannotOpen
from pxcompress.deploy.hardware import get_cpu_name
from pxcompress.deploy.session import Array, Session
from pxcompress.deploy.stopwatch import WARMUP, time_interleaved
from pxcompress.errors import InputError, ResultError, suggest_path

AUTO = "auto"
"""Name of the provider that means CUDA if it works, else the CPU."""

MOST_THREADS = 1024
"""Largest number of CPU threads that is accepted."""


def open_session(path: Path | str, provider: str = AUTO, *, threads: int = 0, strict: bool = False) -> Session:
    """Open an ONNX file for inference.

    `provider`: one of `list_providers`, or your own backend's "package.module:Class"; "auto" takes CUDA where it works,
    else the CPU, and says why in
    `placement.fallback_reason`. `threads`: CPU threads; 0 takes PyTorch's number (the physical cores on x86, or
    OMP_NUM_THREADS). Raises `InputError` for a file that is missing or no model and for an asked provider that cannot
    be used; with `strict` `ResultError` when any node runs elsewhere.
    """
    path = Path(path)
    check_provider(provider)
    if not path.is_file():
        raise InputError(f"no ONNX file at {str(path)!r}{suggest_path(path) or '; check the path'}")
    check_threads(threads)
    threads = threads or torch.get_num_threads()
    place, reason = _choose(provider)
    session, failure = _load(path, place, threads)
    if failure and place != "cpu" and provider == AUTO:
        place, reason = "cpu", f"{place} failed on this model: {failure}"
        session, failure = _load(path, place, threads)
    if session is None:
        raise InputError(f"{path} cannot be loaded by {find_backend(place).title} on {place}: {failure}")
    reason = reason or session.placement.fallback_reason
    if strict and reason:
        raise ResultError(f"{path.name} does not run on {provider} alone: {reason}")
    return replace(session, placement=replace(session.placement, asked=provider, fallback_reason=reason))


def list_providers() -> tuple[str, ...]:
    """Names that `--provider` accepts: "auto", and those of all backends."""
    return (AUTO, *BACKENDS)


def find_backend(provider: str) -> Backend:
    """The backend of a provider; for "auto" that of the provider chosen on this machine."""
    return BACKENDS.build(_choose(provider)[0])


def get_device(provider: str) -> str:
    """Device of a provider, "cpu" or "cuda"; for "auto" that of the provider chosen on this machine."""
    return find_backend(provider).get_device(_choose(provider)[0])


def check_name(provider: str) -> None:
    """Raise `InputError` unless `provider` is one of `list_providers`, or a backend of the user's own."""
    if provider in list_providers():
        return
    if ":" not in provider:
        raise InputError(f"unknown provider {provider!r}; expected one of: {', '.join(list_providers())}")
    BACKENDS.build(provider)


def check_provider(name: str) -> None:
    """Raise `InputError` if the provider `name` is unknown or does not work here; "auto" and "cpu" always do."""
    check_name(name)
    reason = "" if name == AUTO else explain_failure(name)
    if reason:
        raise InputError(f"provider {name!r} cannot be used: {reason}; use auto or cpu")


@cache
def explain_failure(provider: str) -> str:
    """Why a provider does not work on this machine, found by trying it; "" if it works."""
    return BACKENDS.build(provider).explain_failure(provider)


def check_threads(threads: int) -> None:
    """Raise `InputError` for a number of CPU threads outside of 0 to `MOST_THREADS`."""
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
    """Seconds of every inference call of every session, on a batch of `batch_size` copies of the first sample.

    See `time_interleaved`; GPU times are device times, without copies from and to the host.
    """
    batch = np.repeat(example[:1], batch_size, axis=0)
    calls = {name: session.bind(batch) for name, session in sessions.items()}
    return time_interleaved(calls, warmup=warmup, runs=runs, max_seconds=max_seconds)


def time_graph(graph: bytes, shape: tuple[int, ...], provider: str, threads: int) -> float:
    """Seconds of an undisturbed call of a small ONNX model on random inputs of `shape`. Raises `ResultError`.

    It is the tenth percentile of all calls: other programs on the machine only ever add time.
    """
    check_threads(threads)
    place, _ = _choose(provider)
    session, failure = _load(graph, place, threads or torch.get_num_threads())
    if session is None:
        raise ResultError(f"an operator cannot be timed on {place}: {failure}")
    call = session.bind(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    return float(np.quantile(time_interleaved({"operator": call}, warmup=5, runs=30, max_seconds=0.2)["operator"], 0.1))


def describe_device(provider: str, threads: int) -> str:
    """Text on what a latency was measured on: the GPU, or processor and threads, and the runtime's version.

    Stored times have it as their key.
    """
    backend = find_backend(provider)
    if get_device(provider) == "cpu":
        return f"{get_cpu_name()}, {threads or torch.get_num_threads()} threads-{backend.version}"
    return f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'GPU'} {provider}-{backend.version}"


def _load(source: Path | bytes, provider: str, threads: int) -> tuple[Session | None, str]:
    """A session of the provider's backend and "", or None and the reason why it does not accept the model."""
    try:
        session = find_backend(provider).open(source, provider, threads)
    except CannotOpen as error:
        return None, str(error)
    return replace(session, placement=replace(session.placement, device=get_device(provider))), ""


def _choose(provider: str) -> tuple[str, str]:
    """The provider to run on, and, for "auto" without CUDA, the reason. Raises as `check_provider` does."""
    check_provider(provider)
    if provider != AUTO:
        return provider, ""
    reason = explain_failure("cuda")
    return ("cpu", f"CUDA cannot be used: {reason}") if reason else ("cuda", "")
