"""The slim model in other precisions: made from model.onnx, and measured on the files themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pxcompress.deploy.export import onnx_files
from pxcompress.deploy.intervals import speedup
from pxcompress.deploy.measure import FileTiming, file_bytes, latency, throughput
from pxcompress.deploy.precision import convert
from pxcompress.errors import ModelError
from pxcompress.proof import Target, Warning
from pxcompress.types import Batches

LOSS = 0.01
"""Share of top-1 that a precision may lose against float32 without a warning."""


@dataclass(frozen=True)
class Made:
    """Files in other precisions, and why one could not be made."""

    files: tuple[Path, ...] = ()
    failures: tuple[Warning, ...] = ()


@dataclass(frozen=True)
class Targets:
    """What became of the asked precisions: dense.onnx, model.onnx and the files beside them; and what to know."""

    rows: tuple[Target, ...] = ()
    notes: tuple[Warning, ...] = ()


def make_targets(source: Path, precisions: Sequence[str], batches: Batches) -> Made:
    """Write `source` (float32) beside itself in each of `precisions`, model.onnx as model.int8.onnx.

    `batches` are calibrated on.
    """
    files, failures = [], []
    for name in precisions:
        path = source.with_suffix(f".{name}.onnx")
        try:
            files.append(convert(source, path, name, batches).path)
        except ModelError as error:
            failures.append(Warning("precision", f"NO {path.name}: {error}"))
    return Made(tuple(files), tuple(failures))


def rate_targets(timings: Sequence[FileTiming]) -> Targets:
    """What was measured of dense.onnx, model.onnx, and the files made of it, in this order.

    A file whose logits are not finite is removed. Notes name it, and a file that loses more than `LOSS` of the top-1 or
    is not shown to be faster than model.onnx.
    """
    dense, source, *converted = timings
    notes, whole = [], [dense, source]
    for each in converted:
        answers, path = each.answers, each.session.path
        if answers.broken:
            reason = f"its logits are not finite on {answers.broken} of {answers.samples} test samples"
            notes.append(Warning("precision", f"NO {path.name}: {reason}"))
            for file in onnx_files(path):
                file.unlink()
            continue
        whole.append(each)
        notes += _warnings(each, source)
    return Targets(tuple(_row(each, dense, source) for each in whole), tuple(notes))


def _row(timing: FileTiming, dense: FileTiming, source: FileTiming) -> Target:
    session, answers = timing.session, timing.answers
    return Target(
        file=session.path.name,
        precision=session.precision,
        onnx_bytes=file_bytes(session.path),
        top1=answers.top1,
        samples=answers.samples,
        agreement=answers.agreement(source.answers),
        max_abs=answers.max_abs,
        latency_ms=latency(timing.seconds),
        throughput=throughput(timing),
        speedup=speedup(dense.seconds, timing.seconds),
        provider=session.placement,
        both_right=int((answers.right & dense.answers.right).sum()),
    )


def _warnings(timing: FileTiming, source: FileTiming) -> list[Warning]:
    """What speaks against shipping a file instead of the float32 one."""
    name, than = timing.session.path.name, source.session.path.name
    loss = source.answers.top1 - timing.answers.top1
    notes = []
    if loss > LOSS:
        notes.append(Warning("precision", f"{name} LOSES {100 * loss:.1f} POINTS of top-1 against {than}"))
    change = speedup(source.seconds, timing.seconds)
    if change.low <= 1:
        provider = timing.session.placement.got.removesuffix("ExecutionProvider")
        outcome = "slower" if change.high < 1 else "not shown to be faster"
        measurement = f"{change.ratio:.2f}x on {provider}, 95 % interval {change.interval}"
        notes.append(Warning("precision", f"{name} is {outcome} than {than} here ({measurement})"))
    return notes
