"""Parts of reports about the exported precisions, side by side."""

from __future__ import annotations

from pxcompress.proof import Speedup
from pxcompress.report.record import Report
from pxcompress.report.summary import describe_nodes, format_bytes, format_milliseconds, format_percent


def list_columns(report: Report) -> tuple[str, ...]:
    """The names of the columns."""
    return ("file", report.metric.name, "agree", "size", "p50", "faster than dense", "nodes")


def list_targets(report: Report) -> list[tuple[str, ...]]:
    """Table rows, one for each file, under `list_columns`; empty if only float32 was asked for."""
    return [
        (
            of.file,
            report.metric.format(of.quality.value),
            format_percent(of.agreement),
            format_bytes(of.onnx_bytes),
            format_milliseconds(of.latency_ms.p50),
            describe_speed(of.speedup) if of is not report.targets[0] else "reference",
            describe_nodes(of.provider),
        )
        for of in report.targets
    ]


AGREE = "agree: how far a file's decisions on the test samples are those of model.onnx"


def describe_speed(change: Speedup) -> str:
    """A speed-up in words: "2.00x (1.90 to 2.10)", or "not shown (0.97 to 1.02)"."""
    text = "not shown" if change.low <= 1 <= change.high else f"{change.ratio:.2f}x"
    return f"{text} ({change.interval})"
