"""Time any ONNX image classifiers side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pxcompress.deploy import hardware, runtime, stopwatch
from pxcompress.deploy.intervals import Seconds, noise, speedup
from pxcompress.deploy.measure import check_batch_size, file_bytes, latency
from pxcompress.deploy.runtime import Session
from pxcompress.errors import InputError
from pxcompress.proof import Latency, Placement, Speedup

_CHANNELS = (1, 3, 4)
"""Of images: grey, colour, with transparency."""


@dataclass(frozen=True)
class BenchRow:
    """One ONNX file on one provider at one batch size. Throughput is samples/s; `threads` are CPU threads.

    `affinity` says on which cores they may run. `speedup` is against the first row of the same batch, None for that
    one. `cold_start_ms` is what opening the file and its first call took; `noise` is how far the middle half of the
    runs goes from p50, as a share of it. `device_bytes` is by how much the memory in use on the GPU grew for this file,
    up to this batch size: its peak, weights and what the libraries take for it; 0 on the CPU.
    """

    path: str
    input_shape: tuple[int, ...]
    batch_size: int
    latency_ms: Latency
    throughput: float
    onnx_bytes: int
    precision: str
    threads: int
    affinity: str
    placement: Placement
    cold_start_ms: float
    noise: float
    speedup: Speedup | None = None
    device_bytes: int = 0


@dataclass(frozen=True)
class Where:
    """On what to time; with `strict` no node may run on another provider than asked. Threads as `runtime.session`."""

    providers: tuple[str, ...] = ("auto",)
    threads: int = 0
    strict: bool = False


@dataclass(eq=False)
class _Opened:
    """A session, what its images are like, seconds until its first answer, and bytes it has taken on the GPU."""

    session: Session
    shape: tuple[int, ...]
    cold: float = 0.0
    device_bytes: int = 0

    @property
    def default(self) -> tuple[int]:
        """The batch size where none is asked for."""
        return (self.session.input.shape[0] or 1,)

    def runner(self, batch_size: int) -> Callable[[], None]:
        """A call on random images; the memory that it takes is counted."""
        before = hardware.memory_in_use()
        run = self.session.runner(_images(batch_size, self.shape, self.session.input.dtype))
        self.device_bytes += max(hardware.memory_in_use() - before, 0)
        return run


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
    batch_sizes: Sequence[int] = (),
    *,
    where: Where | None = None,
    input_size: tuple[int, int, int] | None = None,
    runs: int = 200,
) -> tuple[BenchRow, ...]:
    """Time ONNX image classifiers on every provider of `where`, all taking turns at every batch size; random inputs.

    Without batch sizes it is the one that the first file is fixed to, or 1. `input_size` (channels, height, width)
    fills the dimensions that a file leaves open, only those. Raises `InputError` where one stays open, for a fixed
    batch of another size, and for what `runtime.session` refuses, and `ResultError` where that is strict.
    """
    where = where or Where()
    for batch_size in batch_sizes:
        check_batch_size(batch_size)
    for provider in where.providers:
        runtime.check_provider(provider)  # loads the libraries, which is no part of a cold start
    opened = []
    for provider in where.providers:
        for path in dict.fromkeys(map(str, paths)):
            opened.append(_opened(path, provider, where, input_size, batch_sizes))
    rows: list[BenchRow] = []
    for batch_size in batch_sizes or opened[0].default:
        runners = {place: each.runner(batch_size) for place, each in _numbered(opened)}
        seconds = stopwatch.time_interleaved(runners, runs=runs, max_seconds=stopwatch.SECONDS * len(runners))
        for place, each in _numbered(opened):
            change = None if place == "0" else speedup(seconds["0"], seconds[place])
            rows.append(_row(each, batch_size, seconds[place], change))
    return tuple(rows)


def _numbered(opened: Sequence[_Opened]) -> list[tuple[str, _Opened]]:
    return [(str(place), each) for place, each in enumerate(opened)]


def _opened(
    path: str, provider: str, where: Where, input_size: tuple[int, int, int] | None, batch_sizes: Sequence[int]
) -> _Opened:
    """The file, opened, checked and called once."""
    before, start = hardware.memory_in_use(), time.perf_counter()
    session = runtime.session(path, provider, threads=where.threads, strict=where.strict)
    for batch_size in batch_sizes:
        _check_fixed_batch(session, batch_size)
    found = _Opened(session, image_shape(session, input_size))
    session.predict(_images((batch_sizes or found.default)[0], found.shape, session.input.dtype))
    found.cold = time.perf_counter() - start
    found.device_bytes = max(hardware.memory_in_use() - before, 0)
    return found


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
        affinity=hardware.affinity(),
        placement=each.session.placement,
        cold_start_ms=1e3 * each.cold,
        noise=noise(seconds),
        speedup=change,
        device_bytes=each.device_bytes if each.session.device == "cuda" else 0,
    )


def _images(batch_size: int, shape: tuple[int, ...], kind: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Random numbers (batch, ...): around 0, whole ones as bytes of an image are."""
    rng, size = np.random.default_rng(0), (batch_size, *shape)
    if np.issubdtype(kind, np.integer):
        return rng.integers(0, 128, size).astype(kind)
    return rng.standard_normal(size, dtype=np.float32)


def _check_fixed_batch(session: Session, batch_size: int) -> None:
    fixed = session.input.shape[0]
    if fixed not in (None, batch_size):
        raise InputError(f"{session.path} has a fixed batch of {fixed}; given batch size {batch_size}; ask for {fixed}")


def image_shape(session: Session, input_size: tuple[int, int, int] | None) -> tuple[int, ...]:
    """Of one input, such as channels, height and width: what the file says, else what was asked.

    A file whose last axis alone is as short as channels are takes height, width, channels.
    """
    port = session.input
    if None not in port.shape[1:]:
        return tuple(int(size or 0) for size in port.shape[1:])
    if len(port.shape) != 4:
        raise InputError(f"{session.path} takes inputs {port}; expected images (batch, channels, height, width)")
    if input_size is None or min(input_size) < 1:
        raise InputError(f"{session.path} takes images of any size {port}; say which: --input-size 224")
    last = port.shape[1] is None and port.shape[3] in _CHANNELS
    wanted = (*input_size[1:], input_size[0]) if last else input_size
    return tuple(int(fixed or asked) for fixed, asked in zip(port.shape[1:], wanted, strict=True))
