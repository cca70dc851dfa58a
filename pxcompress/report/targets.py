"""How reports show the exported precisions, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from pxcompress.proof import Report
from pxcompress.report.markup import node, section, table
from pxcompress.report.summary import milliseconds, nodes, percent, size, times

HEAD = ("file", "top-1", "same top-1", "size", "p50", "faster than dense", "nodes")


def target_rows(report: Report) -> list[tuple[str, ...]]:
    """One line for every file, under `HEAD`; none where float32 alone was asked for."""
    return [
        (
            of.file,
            percent(of.top1),
            percent(of.agreement),
            size(of.onnx_bytes),
            milliseconds(of.latency_ms.p50),
            times(of.speedup) if of is not report.targets[0] else "reference",
            nodes(of.provider),
        )
        for of in report.targets
    ]


def targets_section(report: Report) -> Sequence[Element]:
    """All files side by side; nothing where float32 alone was asked for."""
    if not report.targets:
        return ()
    words = (
        "Every figure is of the file itself, through ONNX Runtime; latency of all was measured in turns. int8 was "
        f"calibrated on {report.data.repair} images of the repair split."
    )
    return (
        section(
            "Precisions",
            node("p", words),
            table(
                "same top-1: share of the test samples on which a file decides as model.onnx; intervals are 95 %",
                HEAD,
                target_rows(report),
                "numbers",
            ),
        ),
    )
