"""Formats results for a terminal: plain ASCII tables of at most 80 columns, verdict and next step last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pxcompress.certify.record import CertificateRecord
from pxcompress.columns import align
from pxcompress.deploy.intervals import NOISE_LIMIT, disagrees_with_mean, mean_speedup
from pxcompress.report.against import COLUMNS, describe_choice, list_contenders
from pxcompress.report.certificates import describe_labels, describe_part, list_path_rows, make_badge
from pxcompress.report.classes import describe_class_changes, describe_class_relevance
from pxcompress.report.next_step import next_step
from pxcompress.report.probabilities import describe_calibration
from pxcompress.report.record import Report
from pxcompress.report.similarity import describe_similarity
from pxcompress.report.summary import (
    compare_figures,
    describe_agreement,
    describe_conditions,
    describe_nodes,
    describe_removal,
    describe_share,
    describe_speedup,
    format_bytes,
    format_change_span,
    format_milliseconds,
    format_percent,
    format_rate,
    format_span,
)
from pxcompress.report.targets import AGREE, list_columns, list_targets

if TYPE_CHECKING:
    from pxcompress.deploy.bench import BenchRow
    from pxcompress.deploy.convert import ConvertedModel

_Line = tuple[str, ...]


def to_table(report: Report) -> str:
    """The output of `pxcompress run`: both models' figures, conditions, notes, verdict, next step. No final newline."""
    lines: list[_Line] = [("", "dense", "pruned", "ratio")]
    lines += _list_accuracy(report)
    lines += [
        (row.label, row.dense_text, row.pruned_text, f"{row.ratio:.3f} ({row.change})")
        for row in compare_figures(report)
    ]
    notes = [f"note: {note.text}" for note in report.notes if note.code != "spent"]  # the certificate's table says that
    targets: list[str] = []
    if report.targets:
        targets = [
            "",
            *align([row[:-1] for row in (list_columns(report), *list_targets(report))]),
            AGREE,
            f"nodes: {'; '.join(f'{of.file} {describe_nodes(of.provider)}' for of in report.targets)}",
        ]
    if report.contenders:
        rows = [(row[0], *row[2:4], row[5]) for row in (COLUMNS, *list_contenders(report))]
        targets += ["", *align(rows), "*: nothing measured is both as fast and as good"]
    findings = [
        line
        for line in (
            describe_removal(report),
            describe_share(report),
            describe_class_changes(report),
            describe_class_relevance(report),
            describe_agreement(report),
            describe_calibration(report),
            describe_similarity(report),
        )
        if line
    ]
    certificate = [] if report.certificate is None else ["", format_certificate(report.certificate), ""]
    ending = [f"next: {step}"] if (step := next_step(report)) else []
    return "\n".join(
        [
            *align(lines),
            *targets,
            "",
            describe_conditions(report),
            *findings,
            *notes,
            *certificate,
            report.verdict,
            *filter(None, [describe_choice(report)]),
            *ending,
        ]
    )


def format_certificate(record: CertificateRecord) -> str:
    """A certificate as text: its path, model by model, and what it promises. It has no newline at the end."""
    budget_text = record.budget.words if record.budget else ""
    notes = [
        f"note: {note}" for note in (describe_part(record), describe_labels(record), budget_text, record.spent) if note
    ]
    outcome = make_badge(record)
    return "\n".join([*align(list_path_rows(record)), *notes, f"{outcome.title}: {outcome.text}"])


def _list_accuracy(report: Report) -> list[_Line]:
    """Table rows with the quality of both models and, below, the 95 % intervals."""
    metric, change = report.metric, report.change
    unit = f" {metric.change_unit}" if metric.change_unit else ""
    return [
        (
            metric.name,
            metric.format(report.dense.quality.value),
            metric.format(report.pruned.quality.value),
            f"{metric.format_change(change.value)}{unit}",
        ),
        (
            "  95 % interval",
            format_span(report.dense.quality.low, report.dense.quality.high, metric),
            format_span(report.pruned.quality.low, report.pruned.quality.high, metric),
            f"{format_change_span(change, metric)}{unit}",
        ),
    ]


def format_bench(rows: Sequence[BenchRow]) -> str:
    """The output of `pxcompress bench`; speed is relative to the first line with the same batch.

    It has no newline at the end.
    """
    names = _name_rows(rows)
    calls: list[_Line] = [("file", "batch", "mean", "p50", "p90", "p99", "throughput")]
    files: list[_Line] = [("file", "batch", "size", "cold", "speed")]
    placements: list[str] = []
    for name, row in zip(names, rows, strict=True):
        of = row.latency_ms
        calls.append(
            (
                *name,
                *(format_milliseconds(value) for value in (of.mean, of.p50, of.p90, of.p99)),
                format_rate(row.throughput),
            )
        )
        change = describe_speedup(row.speedup) if row.speedup else "reference"
        files.append((*name, format_bytes(row.onnx_bytes), format_milliseconds(row.cold_start_ms), change))
        placements.append(f"{name[0]}: {row.precision}, {describe_nodes(row.placement)}{_describe_needs(row)}")
    reasons = dict.fromkeys(row.placement.fallback_reason for row in rows if row.placement.fallback_reason)
    broken_files = dict.fromkeys(name[0] for name, row in zip(names, rows, strict=True) if not row.finite)
    reasons |= dict.fromkeys(_list_disagreements(names, rows))
    reasons |= {
        f"{name} RETURNS NaN OR INFINITY for random inputs: time a file that works": None for name in broken_files
    }
    notes = (f"note: {reason}" for reason in reasons)
    return "\n".join(
        [
            *align(calls),
            "",
            *align(files),
            "",
            *dict.fromkeys(placements),
            "",
            *_describe_bench_conditions(rows),
            *notes,
        ]
    )


def format_conversion(converted: ConvertedModel) -> str:
    """Text on a converted file, and how close it is to PyTorch. It has no newline at the end."""
    parity = converted.parity
    inputs = [f"{name} {'x'.join(map(str, kind.shape))} {kind.dtype}" for name, kind in converted.inputs.items()]
    lines = [
        ("file", str(converted.path)),
        ("size", format_bytes(converted.bytes)),
        ("inputs", ", ".join(inputs)),
        (
            "parity",
            "not compared: its runtime does not run on this machine"
            if parity is None
            else f"at most {parity.max_abs:.2e} from PyTorch on {parity.samples} random inputs",
        ),
    ]
    return "\n".join(align(lines))


def _name_rows(rows: Sequence[BenchRow]) -> list[tuple[str, str]]:
    """File and batch size of each row; without the folder if all share it, with the provider if there are several."""
    folders, providers = {Path(row.path).parent for row in rows}, {row.placement.asked for row in rows}
    names = [Path(row.path).name if len(folders) == 1 else row.path for row in rows]
    if len(providers) > 1:
        names = [f"{name} on {row.placement.asked}" for name, row in zip(names, rows, strict=True)]
    return [(name, str(row.batch_size)) for name, row in zip(names, rows, strict=True)]


def _list_disagreements(names: Sequence[tuple[str, str]], rows: Sequence[BenchRow]) -> Iterator[str]:
    """Sentences on files for which p50 and the mean contradict each other."""
    reference_of_batch: dict[int, BenchRow] = {}
    for (name, batch), row in zip(names, rows, strict=True):
        reference = reference_of_batch.setdefault(row.batch_size, row)
        if row.speedup and disagrees_with_mean(row.speedup, reference.latency_ms, row.latency_ms):
            mean = mean_speedup(reference.latency_ms, row.latency_ms)
            yield (
                f"SPEED UNCLEAR: {name} at batch {batch} is {row.speedup.ratio:.2f}x as fast by p50, but {mean:.2f}x "
                "on average, since a few calls took very long: repeat on a quiet machine"
            )


def _describe_needs(row: BenchRow) -> str:
    """Text on a file's GPU memory, and on its inputs if it has several."""
    memory = f", {format_bytes(row.device_bytes)} of GPU memory" if row.device_bytes else ""
    shapes = [f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in row.inputs.items()]
    return f"{memory}, inputs {', '.join(shapes)}" if len(shapes) > 1 else memory


def _describe_bench_conditions(rows: Sequence[BenchRow]) -> tuple[str, ...]:
    """Lines on how it was measured, and how steady the machine was."""
    runs, threads, affinity = (
        ", ".join(sorted({str(value) for value in values}))
        for values in zip(*((row.latency_ms.runs, row.threads, row.affinity) for row in rows), strict=True)
    )
    noise = max(row.noise for row in rows)
    warning = "; THE MACHINE IS BUSY, repeat on a quiet one" if noise > NOISE_LIMIT else ""
    on_gpu = any(row.placement.device != "cpu" for row in rows)
    words = "GPU: time on the device, without copies; memory: by how much its use grew for the file, at most"
    return (
        f"{runs} runs of each file, in turns; CPU threads: {threads}, {affinity}; random inputs",
        f"noise: half of the calls are within {format_percent(noise)} of p50{warning}",
        "speed: ratio of p50 with its 95 % bootstrap interval; cold: opening the file and the first call, libraries "
        "already loaded",
        *((words,) if on_gpu else ()),
    )
