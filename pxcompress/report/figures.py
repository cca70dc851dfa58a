"""Draws figures of runs by matplotlib, for pages and as files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from pxcompress.cache import whole_file
from pxcompress.checks import make_file_name
from pxcompress.report.against import is_best_at_its_speed
from pxcompress.report.record import Report

_DENSE, _PRUNED = "#808b9a", "#0b7a75"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pxcompress",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_LAYER_INCHES = 0.16
_DECADE = 10
"""Costs whose range exceeds this factor are drawn on a logarithmic scale, others from 0."""

_MARKS = {"fp32": "o", "fp16": "s", "int8": "D"}

Named = Mapping[str, Report]
"""Reports by the name of their run."""


@mpl.rc_context(_STYLE)
def draw_tradeoffs(reports: Named) -> Mapping[str, Figure]:
    """Figures of quality, with 95 % intervals, against each cost, by the cost's name: dense, pruned, other
    precisions.
    """
    return {cost_name: _draw_tradeoff(reports, label, value) for cost_name, label, value in _COSTS}


def _draw_tradeoff(reports: Named, label: str, value: Callable[[float, int], float]) -> Figure:
    figure = Figure(figsize=(4.4, 4), layout="constrained")  # read at 360 pixels, too
    axes = figure.subplots()
    for place, (name, report) in enumerate(reports.items()):
        _draw_points(axes, report, value, (_escape(name), f"C{place % 10}"))
    axes.set(xlabel=label, ylabel=_label_axis(next(iter(reports.values()))))
    low, high = axes.dataLim.intervalx
    if high > _DECADE * low:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=9)
    return figure


def _draw_points(axes: Axes, report: Report, value: Callable[[float, int], float], style: tuple[str, str]) -> None:
    """Draw the models of one run as joined points, from dense to smallest."""
    scale = _scale(report)
    models = [("fp32", of.quality, of.latency_ms.p50, of.onnx_bytes) for of in (report.dense, report.pruned)]
    models += [(of.precision, of.quality, of.latency_ms.p50, of.onnx_bytes) for of in report.targets[2:]]
    across = [value(p50, size) for _, _, p50, size in models]
    axes.plot(across, [scale * of.value for _, of, *_ in models], color=style[1], alpha=0.4, linewidth=1)
    for place, (precision, of, _, _) in enumerate(models):
        bars = [[scale * (of.value - of.low)], [scale * (of.high - of.value)]]
        axes.errorbar(
            across[place],
            scale * of.value,
            yerr=bars,
            fmt=_MARKS.get(precision, "o"),
            color=_DENSE if place == 0 else style[1],
            capsize=3,
            label=style[0] if place == 1 else f"{style[0]}, {precision}" if place else None,
        )


@mpl.rc_context(_STYLE)
def draw_contenders(report: Report) -> Figure:
    """A figure of quality with 95 % interval against latency for all contenders; a line joins the best ones."""
    scale = _scale(report)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(report.contenders, key=lambda each: each.latency_ms.p50)
    for place, each in enumerate(ordered):
        value = scale * each.quality.value
        bars = [[value - scale * each.quality.low], [scale * each.quality.high - value]]
        colour = _PRUNED if each.kind in ("pruned", "pruned-int8") else _DENSE if each.kind != "given" else "C1"
        axes.errorbar(each.latency_ms.p50, value, yerr=bars, fmt="o", color=colour, capsize=3)
        axes.annotate(
            _escape(each.name),
            (each.latency_ms.p50, value),
            xytext=(6, 4 if place % 2 else -11),
            textcoords="offset points",
            fontsize=8,
        )
    best = [each for each in ordered if is_best_at_its_speed(each, report)]
    axes.step(
        [each.latency_ms.p50 for each in best],
        [scale * each.quality.value for each in best],
        where="post",
        color=_PRUNED,
        alpha=0.4,
        linewidth=1,
    )
    axes.set(xlabel="latency p50, ms", ylabel=_label_axis(report))
    axes.set_xlim(0, 1.25 * ordered[-1].latency_ms.p50)
    axes.grid(alpha=0.25)
    return figure


_COSTS: tuple[tuple[str, str, Callable[[float, int], float]], ...] = (
    ("latency", "latency p50, ms", lambda p50, size: p50),
    ("size", "file size, MB", lambda p50, size: size / 1e6),
)
"""Costs to draw quality against: name, axis label, and function of p50 in milliseconds and size in bytes."""


@mpl.rc_context(_STYLE)
def draw_widths(report: Report) -> Figure:
    """A figure of every group's number of units before and after pruning."""
    groups = report.groups[::-1]
    figure = Figure(figsize=(7, max(2.0, 0.8 + _LAYER_INCHES * len(groups))), layout="constrained")
    axes = figure.subplots()
    names = [_escape(group.name) for group in groups]
    axes.barh(names, [group.units for group in groups], color=_DENSE, alpha=0.35, label="dense")
    axes.barh(names, [group.kept for group in groups], color=_PRUNED, label="pruned")
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="units", ylim=(-0.6, max(len(groups), 1) - 0.4))
    axes.legend(frameon=False, fontsize=8)
    return figure


@mpl.rc_context(_STYLE)
def draw_stages(report: Report) -> Figure:
    """A figure of quality on the select split after every stage that changed the model."""
    scale = _scale(report)
    qualities = [
        (_escape(stage.name), scale * stage.quality_after) for stage in report.stages if stage.quality_after is not None
    ]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([name for name, _ in qualities], [value for _, value in qualities], marker="o", color=_PRUNED)
    axes.set_ylabel(f"{_label_axis(report)} of {report.data.select}")
    axes.tick_params(axis="x", labelsize=7, rotation=20)
    axes.grid(alpha=0.25)
    return figure


def render_figure(figure: Figure, form: Literal["svg", "png"]) -> bytes:
    """The content of a file with `figure`; the same figure always gives the same SVG."""
    stream = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(stream, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return stream.getvalue()


def write_figures(reports: Named, folder: Path) -> list[Path]:
    """Write every figure as SVG and PNG to `folder`, which is made; returns the paths."""
    figures = {f"tradeoff-{cost_name}": figure for cost_name, figure in draw_tradeoffs(reports).items()}
    for name, report in reports.items():
        label = make_file_name(name)
        figures |= {f"{label}-widths": draw_widths(report), f"{label}-stages": draw_stages(report)}
    forms: Sequence[Literal["svg", "png"]] = ("svg", "png")
    contents = {
        folder / f"{name}.{form}": render_figure(figure, form) for name, figure in figures.items() for form in forms
    }
    for path, content in contents.items():
        with whole_file(path) as beside:
            beside.write_bytes(content)
    return list(contents)


def _scale(report: Report) -> float:
    """Factor for drawing a quality: 100 for shares, which are drawn in percent, else 1."""
    return 100.0 if report.metric.unit == "share" else 1.0


def _label_axis(report: Report) -> str:
    return f"{report.metric.name}, %" if report.metric.unit == "share" else report.metric.name


def _escape(text: str) -> str:
    """`text` with characters escaped that matplotlib would take for mathematics."""
    return text.replace("$", r"\$")
