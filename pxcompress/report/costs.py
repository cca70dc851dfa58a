"""How reports show where the work and the time went: calls, blocks of layers, types of operators."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree.ElementTree import Element

from pxcompress.proof import Latency
from pxcompress.report.markup import Bar, bars, section, strip, table
from pxcompress.report.record import Report
from pxcompress.report.summary import change, count, milliseconds, percent, pretty

_ROWS = 24
"""Blocks that the page shows; layers are put together by the longest names that give no more."""

_LEAST = 0.01
"""Share of the time below which a type of operator is not shown."""


def latency_strips(report: Report) -> Element:
    """How the calls of both models are distributed, on one scale."""
    models = {"dense": report.dense.latency_ms, "pruned": report.pruned.latency_ms}
    end = max(_percentile(of, 95) for of in models.values())
    body = [(name, _strip(name, of, end), f"{milliseconds(of.p50)}", str(of.runs)) for name, of in models.items()]
    caption = f"From 0 to {milliseconds(end)}: pale are 5 to 95 % of the calls, dark the middle half, the line is p50"
    return table(caption, ("model", "", "p50", "runs"), body, "compare")


def _strip(name: str, of: Latency, end: float) -> Element:
    at = {share: _percentile(of, share) for share in (5, 25, 50, 75, 95)}
    words = ", ".join(f"{share} % within {milliseconds(value)}" for share, value in at.items())
    return strip(f"{name}: {words}", [value / end for value in at.values()], name)


def _percentile(of: Latency, share: int) -> float:
    return of.quantiles[share // 5]


def costs_section(report: Report) -> Element:
    """Multiply-accumulates by block, and time by type of operator."""
    return section("Where the MACs and the milliseconds went", *_blocks(report), *_operators(report))


def _blocks(report: Report) -> Iterator[Element]:
    costs = _by_block(report)
    largest = max((dense for _, dense, _ in costs), default=0)
    if not largest:
        return
    body = [
        (
            name,
            _pair(name, (dense / largest, pruned / largest)),
            count(dense),
            count(pruned),
            pretty(change(dense, pruned, "fewer", "more")),
        )
        for name, dense, pruned in costs
    ]
    head = ("layers", "", "dense", "pruned", "change")
    yield table("Multiply-accumulates of one sample, in the order of the model", head, body, "compare")


def _by_block(report: Report) -> list[tuple[str, int, int]]:
    """Name, dense and pruned MACs of the layers that share the first parts of their names."""
    found: dict[str, tuple[int, int]] = {}
    for depth in (4, 3, 2, 1):
        found = {}
        for layer in report.layers:
            name = ".".join(layer.name.split(".")[:depth]) or "elsewhere"
            dense, pruned = found.get(name, (0, 0))
            found[name] = dense + layer.dense, pruned + layer.pruned
        if len(found) <= _ROWS:
            break
    return [(name, *costs) for name, costs in found.items()]


def _operators(report: Report) -> Iterator[Element]:
    """Shares of either model's profile times its p50: profiling slows all operators down."""
    dense, pruned = report.dense.latency_ms.p50, report.pruned.latency_ms.p50
    times = [(of.name, dense * of.dense, pruned * of.pruned) for of in report.operators]
    largest = max((max(pair) for _, *pair in times), default=0.0)
    shown = [of for of in times if max(of[1:]) >= _LEAST * max(dense, pruned)]
    if not largest or not shown:
        return
    body = [
        (
            name,
            _pair(name, (before / largest, after / largest)),
            milliseconds(before),
            milliseconds(after),
            pretty(change(before, after, "less", "more")),
        )
        for name, before, after in shown
    ]
    caption = (
        "Milliseconds of one call by type of operator: its share in ONNX Runtime's profile of the file, times p50. "
        f"Types below {percent(_LEAST)} are left out"
    )
    yield table(caption, ("operator", "", "dense", "pruned", "change"), body, "compare")


def _pair(name: str, shares: tuple[float, float]) -> Element:
    words = f"{name}: pruned against dense"
    return bars(words, [Bar(shares[0], "dense"), Bar(shares[1], "pruned")])
