"""The slim model in other precisions: made from model.onnx, and measured on the files themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pxcompress.deploy import runtime
from pxcompress.deploy.export import onnx_files
from pxcompress.deploy.measure import Seconds, file_bytes, latency, speedup
from pxcompress.deploy.precision import convert
from pxcompress.deploy.runtime import Array, Session
from pxcompress.errors import ModelError
from pxcompress.proof import Target
from pxcompress.recipe import Bench
from pxcompress.types import Batches

LOSS = 0.01
"""Share of top-1 that a precision may lose against float32 without a warning."""


@dataclass(frozen=True)
class Targets:
    """What became of the asked precisions: dense.onnx, model.onnx and the files beside them; and what to know."""

    rows: tuple[Target, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Run:
    """One file: its session, its logits on the test samples (n, classes), its seconds per call."""

    session: Session
    logits: Array
    seconds: Seconds

    def right(self, labels: Array) -> float:
        """Top-1 share."""
        return float((self.logits.argmax(1) == labels).mean())


def make_targets(source: Path, precisions: Sequence[str], batches: Batches) -> tuple[dict[str, Path], list[str]]:
    """Write `source` (float32) beside itself in each of `precisions`, model.onnx as model.int8.onnx.

    `batches` are calibrated on. Returns the files by precision, and why one could not be made.
    """
    made, failures = {}, []
    for name in precisions:
        path = source.with_suffix(f".{name}.onnx")
        try:
            made[name] = convert(source, path, name, batches).path
        except ModelError as error:
            failures.append(f"NO {path.name}: {error}")
    return made, failures


def measure_targets(dense: Path, source: Path, made: Mapping[str, Path], batches: Batches, bench: Bench) -> Targets:
    """Accuracy on `batches` and latency of the files `made` of `source`, beside it and `dense`, timed in turns.

    A file whose logits are not finite is removed. Notes name it, and a file that loses more than `LOSS` of the top-1 or
    is not faster than `source`.
    """
    paths = {"dense": dense, "fp32": source, **made}
    sessions = {name: runtime.session(path, bench.provider, threads=bench.threads) for name, path in paths.items()}
    logits = {name: np.concatenate([session.predict(x) for x, _ in batches]) for name, session in sessions.items()}
    labels = np.concatenate([each.cpu().numpy() for _, each in batches])
    notes = []
    for name in made:
        if broken := int((~np.isfinite(logits[name]).all(1)).sum()):
            notes.append(f"NO {paths[name].name}: its logits are not finite on {broken} of {len(labels)} test samples")
            del sessions[name]
            for file in onnx_files(paths[name]):
                file.unlink()
    example = next(x for x, _ in batches).cpu().numpy()
    seconds = runtime.time_runs(sessions, example, batch_size=bench.batch_size)
    runs = {name: _Run(session, logits[name], seconds[name]) for name, session in sessions.items()}
    for name in made.keys() & runs.keys():
        notes += _warnings(runs[name], runs["fp32"], labels)
    return Targets(tuple(_row(run, runs, labels, bench.batch_size) for run in runs.values()), tuple(notes))


def _row(run: _Run, runs: Mapping[str, _Run], labels: Array, batch_size: int) -> Target:
    session, reference = run.session, runs["fp32"].logits
    return Target(
        file=session.path.name,
        precision=session.precision,
        onnx_bytes=file_bytes(session.path),
        top1=run.right(labels),
        samples=len(labels),
        agreement=float((run.logits.argmax(1) == reference.argmax(1)).mean()),
        max_abs=float(np.abs(run.logits - reference).max()),
        latency_ms=latency(run.seconds),
        throughput=float(batch_size / run.seconds.mean()),
        speedup=speedup(runs["dense"].seconds, run.seconds),
        provider=session.placement,
    )


def _warnings(run: _Run, source: _Run, labels: Array) -> list[str]:
    """What speaks against shipping a file instead of the float32 one."""
    name, before, after = run.session.path.name, source.right(labels), run.right(labels)
    notes = []
    if before - after > LOSS:
        notes.append(f"{name} LOSES {100 * (before - after):.1f} POINTS of top-1 against {source.session.path.name}")
    change = speedup(source.seconds, run.seconds)
    if change.low <= 1:
        provider = run.session.placement.got.removesuffix("ExecutionProvider")
        said = "slower" if change.high < 1 else "not faster"
        notes.append(
            f"{name} is {said} than {source.session.path.name} here ({change.ratio:.2f}x on {provider}, "
            f"95 % interval {change.low:.2f} to {change.high:.2f})"
        )
    return notes
