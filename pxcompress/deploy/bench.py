"""Time any ONNX image classifiers side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pxcompress.deploy import runtime, stopwatch
from pxcompress.deploy.intervals import Seconds, noise, speedup
from pxcompress.deploy.measure import check_batch_size, file_bytes, latency
from pxcompress.deploy.runtime import Session
from pxcompress.errors import InputError
from pxcompress.proof import Latency, Placement, Speedup


@dataclass(frozen=True)
class BenchRow:
    """One ONNX file on one provider at one batch size. Throughput is samples/s; `threads` are CPU threads.

    The process may use `cores` of the `all_cores` of the machine; threads are not bound to single ones.
    `speedup` is against the first row of the same batch, None for that one. `cold_start_ms` is what opening the file
    and its first call took; `noise` is half the range of the middle half of the runs, as a share of p50.
    """

    path: str
    input_shape: tuple[int, ...]
    batch_size: int
    latency_ms: Latency
    throughput: float
    onnx_bytes: int
    precision: str
    threads: int
    cores: int
    placement: Placement
    cold_start_ms: float
    noise: float
    speedup: Speedup | None = None
    all_cores: int = 0


@dataclass(frozen=True)
class Where:
    """On what to time; with `strict` no node may run on another provider than asked. Threads as `runtime.session`."""

    providers: tuple[str, ...] = ("auto",)
    threads: int = 0
    strict: bool = False


@dataclass(frozen=True, eq=False)
class _Opened:
    """A session, what its images are like, and seconds until its first answer."""

    session: Session
    shape: tuple[int, ...]
    cold: float


def usable(providers: Sequence[str], *, strict: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which of `providers` work here, and why the others do not, one line each.

    Raises `InputError` for an unknown one, where none works, and with `strict` where one does not.
    """
    for name in providers:
        if name not in runtime.PROVIDERS or strict:
            runtime.check_provider(name)
    reasons = {name: "" if name == "auto" else runtime.unusable(name) for name in dict.fromkeys(providers)}
    working = tuple(name for name, reason in reasons.items() if not reason)
    if not working:
        runtime.check_provider(providers[0])
    return working, tuple(f"provider {name} is left out: {reason}" for name, reason in reasons.items() if reason)


def bench(
    paths: Sequence[Path | str],
    batch_sizes: Sequence[int] = (1,),
    *,
    where: Where | None = None,
    input_size: tuple[int, int, int] | None = None,
    runs: int = 200,
) -> tuple[BenchRow, ...]:
    """Time ONNX image classifiers on every provider of `where`, all taking turns at every batch size; random inputs.

    `input_size` (channels, height, width) fills the dimensions that a file leaves open, only those. Raises
    `InputError` where one stays open, for a fixed batch of another size, and for what `runtime.session` refuses, and
    `ResultError` where that is strict.
    """
    where = where or Where()
    for batch_size in batch_sizes:
        check_batch_size(batch_size)
    for provider in where.providers:
        runtime.check_provider(provider)  # loads the libraries, which is no part of a cold start
    opened = []
    for provider in where.providers:
        for path in dict.fromkeys(map(str, paths)):
            start = time.perf_counter()
            session = runtime.session(path, provider, threads=where.threads, strict=where.strict)
            opened.append(_opened(session, input_size, batch_sizes, start))
    rows: list[BenchRow] = []
    for batch_size in batch_sizes:
        runners = {place: each.session.runner(_images(batch_size, each.shape)) for place, each in _numbered(opened)}
        seconds = stopwatch.time_interleaved(runners, runs=runs, max_seconds=stopwatch.SECONDS * len(runners))
        for place, each in _numbered(opened):
            change = None if place == "0" else speedup(seconds["0"], seconds[place])
            rows.append(_row(each, batch_size, seconds[place], change))
    return tuple(rows)


def _numbered(opened: Sequence[_Opened]) -> list[tuple[str, _Opened]]:
    return [(str(place), each) for place, each in enumerate(opened)]


def _opened(
    session: Session, input_size: tuple[int, int, int] | None, batch_sizes: Sequence[int], start: float
) -> _Opened:
    """`session`, checked and called once; it was begun at `start`."""
    for batch_size in batch_sizes:
        _check_fixed_batch(session, batch_size)
    shape = image_shape(session, input_size)
    session.predict(_images(batch_sizes[0], shape))
    return _Opened(session, shape, time.perf_counter() - start)


def _row(each: _Opened, batch_size: int, seconds: Seconds, change: Speedup | None) -> BenchRow:
    return BenchRow(
        path=str(each.session.path),
        input_shape=(batch_size, *each.shape),
        batch_size=batch_size,
        latency_ms=latency(seconds),
        throughput=float(batch_size / seconds.mean()),
        onnx_bytes=file_bytes(each.session.path),
        precision=each.session.precision,
        threads=each.session.threads,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        placement=each.session.placement,
        cold_start_ms=1e3 * each.cold,
        noise=noise(seconds),
        speedup=change,
        all_cores=os.cpu_count() or 1,
    )


def _images(batch_size: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((batch_size, *shape), dtype=np.float32)


def _check_fixed_batch(session: Session, batch_size: int) -> None:
    fixed = session.input.shape[0]
    if fixed not in (None, batch_size):
        raise InputError(f"{session.path} has a fixed batch of {fixed}; given batch size {batch_size}; ask for {fixed}")


def image_shape(session: Session, input_size: tuple[int, int, int] | None) -> tuple[int, ...]:
    """Of one input, such as channels, height and width: what the file says, else what was asked."""
    port = session.input
    if None not in port.shape[1:]:
        return tuple(int(size or 0) for size in port.shape[1:])
    if len(port.shape) != 4:
        raise InputError(f"{session.path} takes inputs {port}; expected images (batch, channels, height, width)")
    if input_size is None:
        raise InputError(f"{session.path} takes images of any size {port}; say which: --input-size 224")
    pairs = zip(port.shape[1:], input_size, strict=True)
    return tuple(int(fixed or wanted or 0) for fixed, wanted in pairs)
