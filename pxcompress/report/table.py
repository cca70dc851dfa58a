"""The result for a terminal: plain ASCII, tables of at most 80 columns, verdict and next step last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pxcompress.certify.record import CertificateRecord
from pxcompress.deploy.intervals import BUSY, disagree, mean_speedup
from pxcompress.proof import Measurement
from pxcompress.report.alike import alike_line
from pxcompress.report.classes import changes_line, class_line
from pxcompress.report.next_step import next_step
from pxcompress.report.record import Report
from pxcompress.report.summary import (
    agreement_line,
    badge,
    conditions,
    describe_labels,
    describe_part,
    describe_removal,
    describe_share,
    drop_interval,
    figures,
    milliseconds,
    nodes,
    path_rows,
    per_second,
    percent,
    points,
    size,
    times,
    wilson,
)
from pxcompress.report.targets import AGREE, HEAD, placed, target_rows

if TYPE_CHECKING:
    from pxcompress.deploy.bench import BenchRow

_Line = tuple[str, ...]


def to_table(report: Report) -> str:
    """What `pxcompress run` prints: figures of both models, conditions, notes, verdict, next step. No newline."""
    lines: list[_Line] = [("", "dense", "pruned", "ratio")]
    lines += _accuracy(report)
    lines += [
        (row.label, row.dense_text, row.pruned_text, f"{row.ratio:.3f} ({row.change})") for row in figures(report)
    ]
    notes = [f"note: {note.text}" for note in report.notes if note.code != "spent"]  # the certificate's table says that
    targets: list[str] = []
    if report.targets:
        targets = ["", *aligned([row[:-1] for row in (HEAD, *target_rows(report))]), AGREE, placed(report)]
    findings = [
        line
        for line in (
            describe_removal(report),
            describe_share(report),
            changes_line(report),
            class_line(report),
            agreement_line(report),
            alike_line(report),
        )
        if line
    ]
    certificate = [] if report.certificate is None else ["", certificate_table(report.certificate), ""]
    ending = [f"next: {step}"] if (step := next_step(report)) else []
    return "\n".join(
        [*aligned(lines), *targets, "", conditions(report), *findings, *notes, *certificate, report.verdict, *ending]
    )


def certificate_table(record: CertificateRecord) -> str:
    """The path of a certificate, model by model, and what it promises. No newline at the end."""
    lines: list[_Line] = [("model", "size", "errors", "p-value", "outcome"), *path_rows(record)]
    left = record.budget.words if record.budget else ""
    notes = [f"note: {note}" for note in (describe_part(record), describe_labels(record), left, record.spent) if note]
    outcome = badge(record)
    return "\n".join([*aligned(lines), *notes, f"{outcome.title}: {outcome.text}"])


def _accuracy(report: Report) -> list[_Line]:
    """Top-1, and under it the 95 % intervals of both shares and of their difference."""
    drop = drop_interval(report)
    return [
        (
            "top-1",
            percent(report.dense.top1),
            percent(report.pruned.top1),
            f"{points(report.pruned.top1 - report.dense.top1)} points",
        ),
        (
            "  95 % interval",
            _interval(report.dense),
            _interval(report.pruned),
            f"{points(-drop.high)} to {points(-drop.low)} points",
        ),
    ]


def _interval(measurement: Measurement) -> str:
    interval = wilson(measurement.top1, measurement.samples)
    return f"{percent(interval.low)} to {percent(interval.high)}"


def bench_table(rows: Sequence[BenchRow]) -> str:
    """What `pxcompress bench` prints; `speed` is against the first line at the same batch. No newline at the end."""
    folders = {str(Path(row.path).parent) for row in rows}
    names = [(Path(row.path).name if len(folders) == 1 else row.path, str(row.batch_size)) for row in rows]
    calls: list[_Line] = [("file", "batch", "mean", "p50", "p90", "p99", "throughput")]
    files: list[_Line] = [("file", "batch", "size", "cold", "speed")]
    where: list[str] = []
    for name, row in zip(names, rows, strict=True):
        of = row.latency_ms
        calls.append(
            (*name, *(milliseconds(value) for value in (of.mean, of.p50, of.p90, of.p99)), per_second(row.throughput))
        )
        change = times(row.speedup) if row.speedup else "reference"
        files.append((*name, size(row.onnx_bytes), milliseconds(row.cold_start_ms), change))
        where.append(f"{name[0]}: {row.precision}, {nodes(row.placement)}{_on_device(row)}{_several_inputs(row)}")
    reasons = dict.fromkeys(row.placement.fallback_reason for row in rows if row.placement.fallback_reason)
    broken = dict.fromkeys(name[0] for name, row in zip(names, rows, strict=True) if not row.finite)
    reasons |= dict.fromkeys(_disagreements(names, rows))
    reasons |= {f"{name} RETURNS NaN OR INFINITY for random inputs: time a file that works": None for name in broken}
    notes = (f"note: {reason}" for reason in reasons)
    return "\n".join(
        [*aligned(calls), "", *aligned(files), "", *dict.fromkeys(where), "", *_bench_conditions(rows), *notes]
    )


def _disagreements(names: Sequence[tuple[str, str]], rows: Sequence[BenchRow]) -> Iterator[str]:
    """Files of which p50 and the mean say the opposite."""
    first: dict[int, BenchRow] = {}
    for (name, batch), row in zip(names, rows, strict=True):
        reference = first.setdefault(row.batch_size, row)
        if row.speedup and disagree(row.speedup, reference.latency_ms, row.latency_ms):
            mean = mean_speedup(reference.latency_ms, row.latency_ms)
            yield (
                f"SPEED UNCLEAR: {name} at batch {batch} is {row.speedup.ratio:.2f}x as fast by p50, but {mean:.2f}x "
                "on average, since a few calls took very long: repeat on a quiet machine"
            )


def _on_device(row: BenchRow) -> str:
    return f", {size(row.device_bytes)} of GPU memory" if row.device_bytes else ""


def _several_inputs(row: BenchRow) -> str:
    """Names and shapes of inputs, where a file has more than one."""
    shapes = [f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in row.inputs.items()]
    return f", inputs {', '.join(shapes)}" if len(shapes) > 1 else ""


def _bench_conditions(rows: Sequence[BenchRow]) -> tuple[str, ...]:
    """How it was measured, and how steady the machine was."""
    runs, threads, affinity = (
        ", ".join(sorted({str(value) for value in values}))
        for values in zip(*((row.latency_ms.runs, row.threads, row.affinity) for row in rows), strict=True)
    )
    noise = max(row.noise for row in rows)
    busy = "; THE MACHINE IS BUSY, repeat on a quiet one" if noise > BUSY else ""
    on_gpu = any(row.placement.got != "CPUExecutionProvider" for row in rows)
    words = "GPU: time on the device, without copies; memory: by how much its use grew for the file, at most"
    return (
        f"{runs} runs of each file, in turns; CPU threads: {threads}, {affinity}; random inputs",
        f"noise: half of the calls are within {percent(noise)} of p50{busy}",
        "speed: ratio of p50 with its 95 % bootstrap interval; cold: opening the file and the first call, libraries "
        "already loaded",
        *((words,) if on_gpu else ()),
    )


def aligned(lines: Sequence[_Line]) -> list[str]:
    """The first and the last column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<", *[">"] * (len(widths) - 2), "<"]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    ]
