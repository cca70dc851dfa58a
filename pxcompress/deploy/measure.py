"""Measures files side by side: latency, in turns, and predictions on samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pxcompress.deploy import runtime, stopwatch
from pxcompress.deploy.export import file_bytes as file_bytes
from pxcompress.deploy.intervals import Seconds
from pxcompress.deploy.predictions import Predictions, predictions
from pxcompress.deploy.session import Array, Session
from pxcompress.errors import DataError, InputError, ResultError
from pxcompress.proof import Latency
from pxcompress.tasks.task import Task
from pxcompress.types import Batches


@dataclass(frozen=True, eq=False)
class FileTiming:
    """The results of one file, measured beside others: seconds of each call with `batch_size` samples, and predictions.

    `inputs` are the samples of a call, as a session takes them.
    """

    session: Session
    seconds: Seconds
    predictions: Predictions
    batch_size: int
    inputs: Array


def latency(seconds: Seconds) -> Latency:
    """Mean and percentiles in milliseconds, from the seconds of each call."""
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 99]) * 1e3)
    spread = tuple(np.round(np.percentile(seconds, range(0, 101, 5)) * 1e3, 6).tolist())
    return Latency(float(seconds.mean() * 1e3), p50, p90, p99, len(seconds), spread)


def time_and_predict(
    paths: Sequence[Path],
    batches: Batches,
    task: Task,
    *,
    batch_size: int = 1,
    provider: str = "auto",
    threads: int = 0,
) -> tuple[FileTiming, ...]:
    """Measure predictions of every file on `batches`, against those of the first file, and the latency of all in turns.

    Agreement is with the second file. Raises `ResultError` if the files run on different providers.
    """
    check_batch_size(batch_size)
    sessions = _open_all({path.name: path for path in paths}, provider, threads)
    example = next((inputs for inputs, _ in batches), None)
    if example is None:
        raise DataError("no samples to measure on; expected at least one")
    results = predictions(sessions, paths[0].name, paths[1].name, batches, task)
    limit, inputs = stopwatch.SECONDS * len(sessions), example.cpu().numpy()
    seconds = runtime.time_runs(sessions, inputs, batch_size=batch_size, max_seconds=limit)
    timed = np.repeat(inputs[:1], batch_size, axis=0)
    return tuple(
        FileTiming(session, seconds[name], results[name], batch_size, timed) for name, session in sessions.items()
    )


def time_and_predict_apart(
    files: Mapping[str, tuple[Path, Batches]],
    task: Task,
    *,
    batch_size: int = 1,
    provider: str = "auto",
    threads: int = 0,
) -> dict[str, FileTiming]:
    """Measure files by name as `time_and_predict` does, but each on batches of its own, such as of smaller images.

    The batches of all files are made of the same samples in the same order.

    The task's metric must not depend on a dense model; agreement is that of each with itself.
    """
    check_batch_size(batch_size)
    sessions = _open_all({name: path for name, (path, _) in files.items()}, provider, threads)
    results, calls, timed = {}, {}, {}
    for name, session in sessions.items():
        batches = files[name][1]
        results[name] = predictions({name: session}, name, name, batches, task)[name]
        timed[name] = np.repeat(next(iter(batches))[0][:1].cpu().numpy(), batch_size, axis=0)
        calls[name] = session.bind(timed[name])
    seconds = stopwatch.time_interleaved(calls, max_seconds=stopwatch.SECONDS * len(calls))
    return {
        name: FileTiming(session, seconds[name], results[name], batch_size, timed[name])
        for name, session in sessions.items()
    }


def _open_all(paths: Mapping[str, Path], provider: str, threads: int) -> dict[str, Session]:
    """Open a session for every file. Raises `ResultError` if they run on different providers."""
    sessions = {name: runtime.open_session(path, provider, threads=threads) for name, path in paths.items()}
    provider_by_name = {name: session.placement.got for name, session in sessions.items()}
    if len(set(provider_by_name.values())) > 1:
        description = " and ".join(f"{name} on {provider_name}" for name, provider_name in provider_by_name.items())
        raise ResultError(f"{description}: their speeds cannot be compared; use provider cpu")
    return sessions


def throughput(timing: FileTiming) -> float:
    """Throughput in samples per second."""
    return float(timing.batch_size / timing.seconds.mean())


def check_batch_size(batch_size: int) -> None:
    """Raise `InputError` for a batch size below 1."""
    if batch_size < 1:
        raise InputError(f"batch size is {batch_size}; expected 1 or more")
