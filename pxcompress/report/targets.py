"""How reports show the exported precisions, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from pxcompress.proof import Report, Speedup
from pxcompress.report.markup import node, section, table
from pxcompress.report.summary import count, milliseconds, nodes, percent, size

HEAD = ("file", "top-1", "agree", "size", "p50", "faster than dense", "nodes")


def target_rows(report: Report) -> list[tuple[str, ...]]:
    """One line for every file, under `HEAD`; none where float32 alone was asked for."""
    return [
        (
            of.file,
            percent(of.top1),
            percent(of.agreement),
            size(of.onnx_bytes),
            milliseconds(of.latency_ms.p50),
            faster(of.speedup) if of is not report.targets[0] else "reference",
            nodes(of.provider),
        )
        for of in report.targets
    ]


AGREE = "agree: share of the test samples on which a file decides as model.onnx"


def faster(change: Speedup) -> str:
    """ "2.00x (1.90 to 2.10)", or "not shown (0.97 to 1.02)"."""
    shown = "not shown" if change.low <= 1 <= change.high else f"{change.ratio:.2f}x"
    return f"{shown} ({change.interval})"


def placed(report: Report) -> str:
    """Which provider runs how many nodes of every file, in one line."""
    return f"nodes: {'; '.join(f'{of.file} {nodes(of.provider)}' for of in report.targets)}"


RIVALS_HEAD = ("off the shelf", "MACs", "parameters", "size", "p50", "pruned = 1", "top-1")


def rival_rows(report: Report) -> list[tuple[str, ...]]:
    """One line for every off-the-shelf model, under `RIVALS_HEAD`; none where no comparison was asked for."""
    return [
        (
            of.name,
            count(of.macs),
            count(of.params),
            size(of.onnx_bytes),
            milliseconds(of.latency_ms.p50),
            f"{of.speedup.ratio:.2f}x ({of.speedup.interval})",
            "random weights" if of.top1 is None else percent(of.top1),
        )
        for of in report.rivals
    ]


def rivals_section(report: Report) -> Sequence[Element]:
    """Off-the-shelf models beside the pruned one; nothing where no comparison was asked for."""
    if not report.rivals:
        return ()
    words = (
        "Usual models of as many MACs as the pruned one, for the same images and classes, timed in turns with it. "
        "Accuracy stands here only where their own weights know these classes; speed does not depend on weights."
    )
    head = "pruned = 1: how many times as fast as the pruned model, by p50, with 95 % intervals"
    return (section("Off the shelf", node("p", words), table(head, RIVALS_HEAD, rival_rows(report), "numbers")),)


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
                f"{AGREE}; faster: by p50, with 95 % intervals",
                HEAD,
                target_rows(report),
                "numbers",
            ),
        ),
    )
