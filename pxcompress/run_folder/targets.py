"""Makes and measures the slim model in other precisions, converted from model.onnx."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pxcompress.deploy.export import onnx_files, read_metadata
from pxcompress.deploy.int8 import Judge
from pxcompress.deploy.intervals import estimate_speedup
from pxcompress.deploy.measure import FileTiming, file_bytes, latency, throughput
from pxcompress.deploy.precision import convert
from pxcompress.errors import ModelError
from pxcompress.proof import Target, Warning
from pxcompress.types import Batches

LOSS_WITHOUT_WARNING = 0.01
"""Loss of a precision against float32 that needs no warning: a share of the samples, or of a number's value."""


@dataclass(frozen=True)
class ConvertedFiles:
    """Files in other precisions, warnings on those that could not be made, and remarks on how int8 was made."""

    files: tuple[Path, ...] = ()
    failures: tuple[Warning, ...] = ()
    remarks: tuple[Warning, ...] = ()


@dataclass(frozen=True)
class Targets:
    """Measurements of the files in all precisions, dense.onnx and model.onnx first, and notes for the report."""

    rows: tuple[Target, ...] = ()
    notes: tuple[Warning, ...] = ()


def make_targets(
    source: Path, precisions: Sequence[str], batches: Batches, judge: Judge | None = None
) -> ConvertedFiles:
    """Convert `source` (float32) to each of `precisions`, beside it: model.onnx to model.int8.onnx and so on.

    `batches` are for calibration; a `judge` says what int8 may lose.
    """
    files, failures, remarks = [], [], []
    for name in precisions:
        path = source.with_suffix(f".{name}.onnx")
        try:
            files.append(convert(source, path, name, batches, judge).path)
        except ModelError as error:
            failures.append(Warning("precision", f"NO {path.name}: {error}"))
        else:
            if how := read_metadata(path).get("quantisation"):
                remarks.append(Warning("remark", f"{path.name}: {how}"))
    return ConvertedFiles(tuple(files), tuple(failures), tuple(remarks))


def rate_targets(timings: Sequence[FileTiming]) -> Targets:
    """Measurements of dense.onnx, model.onnx, and the files converted from it, in this order.

    A file whose outputs are not finite is removed. Notes name such files, and files that lose more than
    `LOSS_WITHOUT_WARNING` or are not shown to be faster than model.onnx.
    """
    dense, source, *converted_timings = timings
    notes, timings_kept = [], [dense, source]
    for each in converted_timings:
        results, path = each.predictions, each.session.path
        if results.broken:
            reason = f"its outputs are not finite on {results.broken} of {results.samples} test samples"
            notes.append(Warning("precision", f"NO {path.name}: {reason}"))
            for file in onnx_files(path):
                file.unlink()
            continue
        timings_kept.append(each)
        notes += _warnings(each, source)
    return Targets(tuple(_row(each, dense, source) for each in timings_kept), tuple(notes))


def _row(timing: FileTiming, dense: FileTiming, source: FileTiming) -> Target:
    session, results = timing.session, timing.predictions
    return Target(
        file=session.path.name,
        precision=session.precision,
        onnx_bytes=file_bytes(session.path),
        quality=results.quality,
        samples=results.samples,
        agreement=float(results.agreement.mean()),
        max_abs=results.max_abs,
        latency_ms=latency(timing.seconds),
        throughput=throughput(timing),
        speedup=estimate_speedup(dense.seconds, timing.seconds),
        provider=session.placement,
        change=results.change(dense.predictions),
    )


def _warnings(timing: FileTiming, source: FileTiming) -> list[Warning]:
    """Warnings against shipping a file instead of the float32 one."""
    name, than = timing.session.path.name, source.session.path.name
    metric, quality_before = timing.predictions.task.metric, source.predictions.quality.value
    quality_loss = -metric.gain(timing.predictions.quality.value - quality_before)
    notes = []
    if quality_loss > LOSS_WITHOUT_WARNING * (1 if metric.unit == "share" else abs(quality_before)):
        amount = (
            f"{100 * quality_loss:.1f} POINTS of {metric.name}"
            if metric.unit == "share"
            else f"{quality_loss:.3g} of {metric.name}"
        )
        notes.append(Warning("precision", f"{name} LOSES {amount} against {than}"))
    change = estimate_speedup(source.seconds, timing.seconds)
    if change.low <= 1:
        provider = timing.session.placement.got.removesuffix("ExecutionProvider")
        outcome = "slower" if change.high < 1 else "not shown to be faster"
        measurement = f"{change.ratio:.2f}x on {provider}, 95 % interval {change.interval}"
        notes.append(Warning("precision", f"{name} is {outcome} than {than} here ({measurement})"))
    return notes
