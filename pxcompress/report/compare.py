"""Several runs on one page, and as one table for the terminal."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from pxcompress.proof import Report
from pxcompress.report.figures import Named, picture, tradeoff
from pxcompress.report.markup import document, node, section, table
from pxcompress.report.summary import (
    command,
    conditions,
    count,
    drop_interval,
    hardware,
    is_faster,
    milliseconds,
    percent,
    points,
    size,
    speed_words,
    wilson,
)
from pxcompress.report.table import aligned

HEAD = (
    "run",
    "top-1",
    "95 % interval",
    "points lost",
    "of it, 95 %",
    "MACs",
    "parameters",
    "file size",
    "latency p50",
    "faster",
)

_UNDER = (2, 4)
"""Columns that the page puts under the one before."""


def comparison_rows(reports: Named) -> list[tuple[str, ...]]:
    """One line for every run under `HEAD`; before the runs of a dense model that model's own."""
    rows: list[tuple[str, ...]] = []
    seen: set[tuple[object, ...]] = set()
    for name, report in reports.items():
        dense = (report.recipe.get("model"), report.sha256.get("dense.onnx"), report.dense.top1)
        if dense not in seen:
            rows.append(_row(f"{report.recipe.get('model')}, dense", report, dense=True))
            seen.add(dense)
        rows.append(_row(name, report))
    return rows


def _row(name: str, report: Report, *, dense: bool = False) -> tuple[str, ...]:
    of = report.dense if dense else report.pruned
    interval, lost = wilson(of.top1, of.samples), drop_interval(report)
    speed = f"{report.ratios.speedup_p50:.2f}x"
    return (
        name,
        percent(of.top1),
        f"{percent(interval.low)} to {percent(interval.high)}",
        "" if dense else points(report.ratios.top1_drop),
        "" if dense else f"{points(lost.low)} to {points(lost.high)}",
        count(of.macs),
        count(of.params),
        size(of.onnx_bytes),
        milliseconds(of.latency_ms.p50),
        "reference" if dense else speed if is_faster(report) else f"{speed}, {speed_words(report)}",
    )


def _stacked(row: Sequence[str]) -> list[Element | str]:
    """A row whose intervals stand under what they are of."""
    return [
        node("span", cell, node("small", row[place + 1])) if place + 1 in _UNDER else cell
        for place, cell in enumerate(row)
        if place not in _UNDER
    ]


def differences(reports: Named) -> tuple[str, ...]:
    """Why figures of these runs cannot be set side by side; nothing where they can."""
    settings = {_setting(report) for report in reports.values()}
    data = {(report.data.name, report.data.test, len(report.data.classes)) for report in reports.values()}
    told = [f"{name}, {test} samples of {classes} classes" for name, test, classes in sorted(data)]
    found = {"LATENCIES": sorted(settings), "ACCURACIES": told}
    return tuple(f"{what} CANNOT BE COMPARED: {'; '.join(of)}" for what, of in found.items() if len(of) > 1)


def _setting(report: Report) -> str:
    """What latency depends on beside the model."""
    threads, batch = report.environment.get("threads"), report.pruned.batch_size
    return f"{hardware(report)}, {report.provider.got}, {threads} CPU threads, batch {batch}"


def to_comparison_table(reports: Named) -> str:
    """The same for the terminal. No newline at the end."""
    notes = [f"note: {note}" for note in differences(reports)]
    return "\n".join([*aligned([HEAD, *comparison_rows(reports)]), *notes])


def to_comparison(reports: Named) -> str:
    """The page: table, figure, conditions and how to make every run again. One self-contained file in ASCII."""
    image = b64encode(picture(tradeoff(reports), "svg")).decode("ascii")
    words = "Accuracy against latency and against file size, dense (grey) and pruned; the table has every value."
    title = f"{len(reports)} runs side by side" if len(reports) > 1 else next(iter(reports))
    sections = (
        node("header", node("p", "pxcompress"), node("h1", title)),
        *_notes(differences(reports)),
        section(
            "Figures",
            table(
                "Every figure is of the exported file, through ONNX Runtime. Points lost: against the run's own dense "
                "model, 95 % interval. Faster: ratio of p50 to the dense model timed in turns with it.",
                [name for place, name in enumerate(HEAD) if place not in _UNDER],
                [_stacked(row) for row in comparison_rows(reports)],
                "numbers",
            ),
        ),
        section(
            "Accuracy against cost",
            node("img", src=f"data:image/svg+xml;base64,{image}", alt=words, class_="plot"),
            node("p", f"{words} Lines are 95 % intervals; both costs are on a logarithmic scale."),
        ),
        section("Conditions", node("ul", *(node("li", f"{name}: {conditions(of)}") for name, of in reports.items()))),
        section(
            "Reproduce",
            *(node("pre", node("code", command(report.recipe))) for report in reports.values()),
        ),
    )
    return document(title, sections, images=True)


def _notes(notes: Sequence[str]) -> Sequence[Element]:
    return [node("div", node("ul", *(node("li", note) for note in notes)), class_="notes")] if notes else []
