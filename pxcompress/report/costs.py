"""Parts of reports about where work and time go: calls, blocks of layers, types of operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pxcompress.proof import Latency
from pxcompress.report.pages import Bar, Bars, Row, Strip
from pxcompress.report.record import Report
from pxcompress.report.summary import describe_change, format_count, format_milliseconds, typeset_factors

_ROWS = 24
"""Most blocks that the page shows.

A block is all layers whose names begin with the same parts, with as many parts as this number of blocks allows.
"""

_LEAST = 0.01
"""Types of operators with a smaller share of the time are not shown."""


def view_latency(report: Report) -> Mapping[str, Any]:
    """The page's values on the distribution of both models' call times, on one scale."""
    models = {"dense": report.dense.latency_ms, "pruned": report.pruned.latency_ms}
    end = max(_get_percentile(of, 95) for of in models.values())
    strips = [(name, _strip(name, of, end), format_milliseconds(of.p50), str(of.runs)) for name, of in models.items()]
    return {"latency_end": format_milliseconds(end), "latency_strips": strips}


def _strip(name: str, of: Latency, end: float) -> Strip:
    low, first, middle, third, high = (_get_percentile(of, share) for share in (5, 25, 50, 75, 95))
    words = ", ".join(
        f"{share} % within {format_milliseconds(_get_percentile(of, share))}" for share in (5, 25, 50, 75, 95)
    )
    return Strip(f"{name}: {words}", (low / end, first / end, middle / end, third / end, high / end), name)


def _get_percentile(of: Latency, share: int) -> float:
    return of.quantiles[share // 5]


def list_blocks(report: Report) -> Sequence[Row]:
    """Table rows with the multiply-accumulates of each block of layers."""
    costs = _sum_by_block(report)
    largest = max((dense for _, dense, _ in costs), default=0)
    if not largest:
        return []
    return [_make_row(name, (dense, pruned), largest, format_count, "fewer") for name, dense, pruned in costs]


def _sum_by_block(report: Report) -> list[tuple[str, int, int]]:
    """Name, dense MACs and pruned MACs of each block, which is all layers with the same start of their names."""
    costs: dict[str, tuple[int, int]] = {}
    for depth in (4, 3, 2, 1):
        costs = {}
        for layer in report.layers:
            name = ".".join(layer.name.split(".")[:depth]) or "elsewhere"
            dense, pruned = costs.get(name, (0, 0))
            costs[name] = dense + layer.dense, pruned + layer.pruned
        if len(costs) <= _ROWS:
            break
    return [(name, *macs) for name, macs in costs.items()]


def list_operators(report: Report) -> Sequence[Row]:
    """Table rows with the time of each type of operator: its share of the profile times the model's p50.

    Only shares are taken from profiles, since profiling slows every operator down.
    """
    dense, pruned = report.dense.latency_ms.p50, report.pruned.latency_ms.p50
    times = [(of.name, dense * of.dense, pruned * of.pruned) for of in report.operators]
    largest = max((max(pair) for _, *pair in times), default=0.0)
    if not largest:
        return []
    return [
        _make_row(name, (dense_ms, pruned_ms), largest, format_milliseconds, "less")
        for name, dense_ms, pruned_ms in times
        if max(dense_ms, pruned_ms) >= _LEAST * max(dense, pruned)
    ]


def _make_row(name: str, pair: tuple[float, float], largest: float, text: Callable[[float], str], less: str) -> Row:
    """One table row: a name, bars and texts for the dense and the pruned cost, and how it changed."""
    dense, pruned = pair
    bars = Bars(f"{name}: pruned against dense", (Bar(dense / largest, "dense"), Bar(pruned / largest, "pruned")))
    return name, bars, text(dense), text(pruned), typeset_factors(describe_change(dense, pruned, less, "more"))
