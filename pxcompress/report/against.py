"""Which of all measured models to ship: a table, a picture and one sentence, whether or not it is the pruned one."""

from __future__ import annotations

from collections.abc import Sequence

from pxcompress.proof import Contender
from pxcompress.report.record import Report
from pxcompress.report.summary import format_bytes, format_change_span, format_count, format_milliseconds, format_span

LATENCY_TOLERANCE = 0.05
"""Share by which a latency may exceed the requested one, for noise on an idle machine."""

COLUMNS = ("model", "input", "p50", "size", "MACs", "quality", "change to dense")

Cells = tuple[str, ...]


def describe_choice(report: Report) -> str:
    """One sentence on which model to ship for the requested latency, with intervals; "" without other models."""
    if not report.contenders:
        return ""
    limit, words = _find_limit(report)
    metric = report.metric
    fits = [each for each in report.contenders if each.latency_ms.p50 <= limit * (1 + LATENCY_TOLERANCE)]
    if not fits:
        fastest = min(report.contenders, key=lambda each: each.latency_ms.p50)
        return f"Nothing takes at most {words}; the fastest is {fastest.name} ({_format_figures(fastest, report)})"
    best = max(fits, key=lambda each: (metric.gain(each.quality.value), -each.latency_ms.p50))
    others = [each for each in fits if each is not best]
    if best.kind in _OURS:
        rivals = [each for each in others if each.kind not in _OURS]
        ending = "; nothing else that was measured is as fast"
        if rivals:
            second = max(rivals, key=lambda each: metric.gain(each.quality.value))
            figures = f"{_format_figures(second, report)}{_describe_difference(second, report)}"
            ending = f"; the best other one is {second.name} ({figures})"
        return f"For at most {words} ship {best.name} ({_format_figures(best, report)}){ending}"
    return (
        f"For at most {words} ship {best.name}, NOT THE PRUNED MODEL ({_format_figures(best, report)}"
        f"{_describe_difference(best, report)})"
    )


_OURS = ("pruned", "pruned-int8")


def list_contenders(report: Report) -> Sequence[Cells]:
    """Table rows, one a model, fastest first; a star marks models that no other one beats in speed and quality."""
    metric = report.metric
    rows = []
    for each in sorted(report.contenders, key=lambda each: each.latency_ms.p50):
        star = " *" if is_best_at_its_speed(each, report) else ""
        change = f"{metric.format_change(each.change.value)} ({format_change_span(each.change, metric)})"
        rows.append(
            (
                each.name + star,
                "x".join(map(str, each.input_shape)),
                format_milliseconds(each.latency_ms.p50),
                format_bytes(each.onnx_bytes),
                "unknown" if each.macs is None else format_count(each.macs),
                f"{metric.format(each.quality.value)} ({format_span(each.quality.low, each.quality.high, metric)})",
                "reference" if each.kind == "dense" else change,
            )
        )
    return rows


def is_best_at_its_speed(one: Contender, report: Report) -> bool:
    """Whether no other model is at least as good in speed and quality, and better in one of them (Pareto)."""

    def figures(of: Contender) -> tuple[float, float]:
        return -of.latency_ms.p50, report.metric.gain(of.quality.value)

    mine = figures(one)
    return not any(
        all(theirs >= own for theirs, own in zip(figures(other), mine, strict=True)) and figures(other) != mine
        for other in report.contenders
    )


def _find_limit(report: Report) -> tuple[float, str]:
    """The most milliseconds that a call may take, and words on where that limit comes from."""
    dense, pruned = report.contenders[:2]
    if report.recipe.latency_ms is not None:
        return report.recipe.latency_ms, f"{report.recipe.latency_ms:g} ms a call"
    if report.recipe.speedup is not None:
        limit = dense.latency_ms.p50 / report.recipe.speedup
        return limit, f"{format_milliseconds(limit)} a call ({report.recipe.speedup:g}x faster than dense)"
    limit = pruned.latency_ms.p50
    return limit, f"{format_milliseconds(limit)} a call (what the pruned model takes)"


def _format_figures(of: Contender, report: Report) -> str:
    metric = report.metric
    interval = format_span(of.quality.low, of.quality.high, metric)
    return f"{metric.name} {metric.format(of.quality.value)}, {interval}; {format_milliseconds(of.latency_ms.p50)}"


def _describe_difference(of: Contender, report: Report) -> str:
    """Text on how a model's quality compares with the pruned one's on the same samples."""
    metric, change = report.metric, of.beside_pruned
    text = f"{metric.format_change(change.value)} ({format_change_span(change, metric)}) {metric.change_unit}".rstrip()
    return f"; {text} against the pruned model" + ("" if change.is_shown else ", no difference shown")
