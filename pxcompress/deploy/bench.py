"""Time any ONNX files side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pxcompress.deploy import hardware, runtime, stopwatch
from pxcompress.deploy.feeds import Sizes, get_sample_shape, make_feed
from pxcompress.deploy.intervals import Seconds, estimate_speedup, measure_noise
from pxcompress.deploy.measure import check_batch_size, latency
from pxcompress.deploy.session import Array, Session
from pxcompress.errors import InputError
from pxcompress.proof import Latency, Placement, Speedup


@dataclass(frozen=True)
class BenchRow:
    """One ONNX file on one provider at one batch size. Throughput is samples/s; `threads` are CPU threads.

    `affinity` says on which cores they may run. `speedup` is against the first row of the same batch, None for that
    one. `cold_start_ms` is what opening the file and its first call took; `noise` is how far the middle half of the
    runs goes from p50, as a share of it. `device_bytes` is by how much the memory in use on the GPU grew for this file,
    up to this batch size: its peak, weights and what the libraries take for it; 0 on the CPU. `input_shape` is that of
    the first input, `inputs` has them all by name; `finite` is false where random inputs gave NaN or infinity.
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
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    finite: bool = True


@dataclass(frozen=True)
class BenchConditions:
    """Providers and number of CPU threads to time on; with `strict` no node may run on another provider."""

    providers: tuple[str, ...] = ("auto",)
    threads: int = 0
    strict: bool = False


@dataclass(eq=False)
class _OpenFile:
    """An open session, sample shapes of its inputs, seconds from opening to the first answer, and bytes used on the
    GPU.
    """

    session: Session
    shapes: Mapping[str, tuple[int, ...]]
    cold: float = 0.0
    device_bytes: int = 0
    finite: bool = True

    @property
    def default(self) -> tuple[int]:
        """The batch sizes to time if none are given: the one that the file is fixed to, or 1."""
        return (_get_fixed_batch(self.session) or 1,)

    def feed(self, batch_size: int) -> dict[str, Array]:
        """Random inputs of this batch size."""
        return make_feed(self.session, self.shapes, batch_size)

    def runner(self, batch_size: int) -> Callable[[], None]:
        """A function for one call on random inputs; GPU memory that binding them takes is added to `device_bytes`."""
        bytes_before = hardware.measure_memory()
        call = self.session.bind(self.feed(batch_size))
        self.device_bytes += max(hardware.measure_memory() - bytes_before, 0)
        return call


def choose_providers(providers: Sequence[str], *, strict: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Which of `providers` work here, and why the others do not, one line each.

    Raises `InputError` for an unknown one, where none works, and with `strict` where one does not.
    """
    for name in providers:
        if name not in runtime.list_providers() or strict:
            runtime.check_provider(name)
    reasons = {name: "" if name == "auto" else runtime.explain_failure(name) for name in dict.fromkeys(providers)}
    working = tuple(name for name, reason in reasons.items() if not reason)
    if not working:
        runtime.check_provider(providers[0])
    return working, tuple(f"provider {name} is left out: {reason}" for name, reason in reasons.items() if reason)


def bench(
    paths: Sequence[Path | str],
    batch_sizes: Sequence[int] = (),
    *,
    conditions: BenchConditions | None = None,
    sizes: Sizes | None = None,
    runs: int = 200,
) -> tuple[BenchRow, ...]:
    """Time ONNX files on random inputs, on every provider of `conditions`; at each batch size all take turns.

    Without batch sizes it is the one that the first file is fixed to, or 1. `sizes` fill the dimensions that a file
    leaves open, only those. Raises `InputError` where one stays open, for a fixed batch of another size, and for what
    `runtime.open_session` refuses, and `ResultError` where a node runs on another provider in spite of `strict`.
    """
    conditions, sizes = conditions or BenchConditions(), sizes or Sizes()
    for batch_size in batch_sizes:
        check_batch_size(batch_size)
    for provider in conditions.providers:
        runtime.check_provider(provider)  # loads the libraries, which is no part of a cold start
    files = []
    for provider in conditions.providers:
        for path in dict.fromkeys(map(str, paths)):
            files.append(_open_file(path, provider, conditions, sizes, batch_sizes))
    sizes.check_used([each.session for each in files])
    rows: list[BenchRow] = []
    for batch_size in batch_sizes or files[0].default:
        for each in files:
            _check_fixed_batch(each.session, batch_size)
        runners = {place: each.runner(batch_size) for place, each in _number(files)}
        seconds = stopwatch.time_interleaved(runners, runs=runs, max_seconds=stopwatch.SECONDS * len(runners))
        for place, each in _number(files):
            change = None if place == "0" else estimate_speedup(seconds["0"], seconds[place])
            rows.append(_make_row(each, batch_size, seconds[place], change))
    return tuple(rows)


def _number(files: Sequence[_OpenFile]) -> list[tuple[str, _OpenFile]]:
    return [(str(place), each) for place, each in enumerate(files)]


def _open_file(
    path: str, provider: str, conditions: BenchConditions, sizes: Sizes, batch_sizes: Sequence[int]
) -> _OpenFile:
    """Open a file, check its batch size, and call it once."""
    bytes_before, start = hardware.measure_memory(), time.perf_counter()
    session = runtime.open_session(path, provider, threads=conditions.threads, strict=conditions.strict)
    for batch_size in batch_sizes:
        _check_fixed_batch(session, batch_size)
    shapes = {port.name: get_sample_shape(session, port, sizes) for port in session.inputs}
    file = _OpenFile(session, shapes)
    outputs = session.predict(file.feed((batch_sizes or file.default)[0]))
    file.cold = time.perf_counter() - start
    file.device_bytes = max(hardware.measure_memory() - bytes_before, 0)
    file.finite = bool(np.isfinite(outputs).all())
    return file


def _make_row(each: _OpenFile, batch_size: int, seconds: Seconds, change: Speedup | None) -> BenchRow:
    shapes = {name: array.shape for name, array in each.feed(batch_size).items()}
    return BenchRow(
        path=str(each.session.path),
        input_shape=next(iter(shapes.values()), ()),
        batch_size=batch_size,
        latency_ms=latency(seconds),
        throughput=float(batch_size / seconds.mean()),
        onnx_bytes=runtime.find_backend(each.session.placement.asked).size(each.session.path),
        precision=each.session.precision,
        threads=each.session.threads,
        affinity=hardware.describe_affinity(),
        placement=each.session.placement,
        cold_start_ms=1e3 * each.cold,
        noise=measure_noise(seconds),
        speedup=change,
        device_bytes=each.device_bytes if each.session.device == "cuda" else 0,
        inputs=shapes,
        finite=each.finite,
    )


def _get_fixed_batch(session: Session) -> int | None:
    """The batch size that the first input is fixed to; None if any is accepted."""
    shape = session.inputs[0].shape if session.inputs else ()
    return shape[0] if shape else None


def _check_fixed_batch(session: Session, batch_size: int) -> None:
    file_batch = _get_fixed_batch(session)
    if file_batch not in (None, batch_size):
        raise InputError(
            f"{session.path} has a fixed batch of {file_batch}; given batch size {batch_size}; ask for {file_batch}"
        )
