"""Makes report.html: the result first, then everything needed to check it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pxcompress.inspection.survey import by_reason
from pxcompress.proof import Estimate, GroupWidth
from pxcompress.report.against import COLUMNS, describe_choice, list_contenders
from pxcompress.report.build import to_json
from pxcompress.report.certificates import describe_part, list_path_rows, make_badge
from pxcompress.report.classes import view_classes
from pxcompress.report.costs import list_blocks, list_operators, view_latency
from pxcompress.report.explanation import Explanation
from pxcompress.report.explanation_page import view_explanation
from pxcompress.report.figures import draw_contenders, render_figure
from pxcompress.report.pages import Bar, Bars, Picture, Row, TwoLineCell, render
from pxcompress.report.probabilities import list_calibration
from pxcompress.report.record import Report
from pxcompress.report.similarity import describe_heatmap_samples, list_similarities
from pxcompress.report.summary import (
    Figure,
    Interval,
    capitalise,
    compare_figures,
    describe_accuracy_briefly,
    describe_agreement,
    describe_conditions,
    describe_goal,
    describe_share,
    describe_size_change,
    describe_speed_briefly,
    format_bytes,
    format_change_span,
    format_command,
    format_milliseconds,
    format_percent,
    format_seconds,
    format_span,
    is_faster,
    loss_is_shown,
    typeset_factors,
    wilson_interval,
    write_headline,
)
from pxcompress.report.targets import list_columns, list_targets

_MINUS = "\N{MINUS SIGN}"
_HYPHEN = "\N{NON-BREAKING HYPHEN}"
_ARROW = " \N{RIGHTWARDS ARROW} "

_ROLES = {
    "score": "says which units matter",
    "repair": "feeds the repairs",
    "select": "accuracy after each stage",
    "certify": "kept apart for certificates",
    "test": "accuracy of the exported files, parity, latency; seen by no earlier stage",
}


@dataclass(frozen=True)
class Tile:
    """One of the large figures at the top of the page; `colour` is "good", "bad" or ""."""

    label: str
    value: str
    detail: str
    colour: str


def to_html(report: Report, explanation: Explanation | None = None) -> str:
    """The report as one self-contained HTML document in ASCII: inline style and SVG, no script, nothing to load.

    An `explanation` adds its sections to the page.
    """
    return render(
        "report.html",
        title=f"{report.recipe.model}: {write_headline(report)}",
        images=explanation is not None or bool(report.contenders),
        report=report,
        explanation=explanation and view_explanation(explanation),
        **_view_top(report),
        **_view_measurements(report),
        **view_classes(report),
        **_view_certificate(report),
        **_view_widths(report.groups),
        **_view_provenance(report),
    )


def _view_top(report: Report) -> Mapping[str, Any]:
    """Values for the top of the page: goal, headline, verdict, and four figures."""
    result = f"{describe_speed_briefly(report)}, {describe_size_change(report)}, {describe_accuracy_briefly(report)}"
    goal = describe_share(report) or describe_goal(report.recipe, report.plan.unit)
    return {
        "lead": f"{report.recipe.model} on {report.data.name}: {goal}",
        "headline": typeset_factors(capitalise(result)).replace("top-1", f"top{_HYPHEN}1"),
        "intervals": _describe_intervals(report),
        "badge": report.certificate and make_badge(report.certificate),
        "faster": is_faster(report),
        "verdict": report.verdict.replace(" -> ", _ARROW),
        "tiles": _view_tiles(report),
    }


def _view_tiles(report: Report) -> Sequence[Tile]:
    by_label = {figure.label: figure for figure in compare_figures(report)}
    latency = by_label["latency p50"]
    metric = report.metric
    values = _ARROW.join(metric.format(of.quality.value) for of in (report.dense, report.pruned))
    qualities = f"{values}, {report.pruned.samples} samples"
    speed = "good" if is_faster(report) else "bad"
    return (
        Tile(latency.label, typeset_factors(describe_speed_briefly(report)), _format_before_after(latency), speed),
        *(_view_tile(by_label[label]) for label in ("file size", "MACs")),
        Tile(
            metric.name,
            describe_accuracy_briefly(report, with_metric=False),
            qualities,
            "bad" if loss_is_shown(report) else "",
        ),
    )


def _view_tile(figure: Figure) -> Tile:
    colour = "" if figure.change == "same" else "good" if figure.ratio < 1 else "bad"
    return Tile(figure.label, typeset_factors(figure.change), _format_before_after(figure), colour)


def _format_before_after(figure: Figure) -> str:
    return f"{figure.dense_text}{_ARROW}{figure.pruned_text}"


def _describe_intervals(report: Report) -> str:
    """The 95 % intervals of speed-up and change of quality, as a line below the headline."""
    metric, speedup = report.metric, report.speedup
    value, span = metric.format_change(report.change.value), format_change_span(report.change, metric)
    change = f"{metric.name} {value} ({span}) {metric.change_unit}".replace("-", _MINUS).rstrip()
    change = change.replace(metric.name.replace("-", _MINUS), metric.name, 1)
    faster = f"{typeset_factors(f'{speedup.ratio:.2f}x')} ({speedup.interval}) the speed"
    return f"{faster}, {change}; 95\N{NO-BREAK SPACE}% intervals"


def _view_measurements(report: Report) -> Mapping[str, Any]:
    """Values for the measurements: bars of both models, latency in full, and where the work goes."""
    latencies = {"dense": report.dense.latency_ms, "pruned": report.pruned.latency_ms}
    front = f"{report.metric.name} against latency"
    return {
        "conditions": describe_conditions(report),
        "agreement": capitalise(describe_agreement(report)),
        "figures": [_view_accuracy(report), *map(_view_figure, compare_figures(report))],
        **view_latency(report),
        "latencies": [
            (name, *(format_milliseconds(value) for value in (of.mean, of.p50, of.p90, of.p99)), str(of.runs))
            for name, of in latencies.items()
        ],
        "targets_head": list_columns(report),
        "targets": list_targets(report),
        "choice": describe_choice(report),
        "contenders_head": COLUMNS,
        "contenders": list_contenders(report),
        "front": report.contenders and Picture.of(render_figure(draw_contenders(report), "svg"), "svg+xml", front),
        "blocks": list_blocks(report),
        "operators": list_operators(report),
        "stage_accuracies": _view_stage_accuracies(report),
        "calibration": list_calibration(report),
        "similarity": list_similarities(report),
        "similarity_of": describe_heatmap_samples(report),
    }


def _view_accuracy(report: Report) -> Row:
    metric, qualities = report.metric, (report.dense.quality, report.pruned.quality)
    texts = [metric.format(of.value) for of in qualities]
    drawing = Bars(
        f"{metric.name}: dense {texts[0]}, pruned {texts[1]}",
        tuple(_make_quality_bar(of, name, report) for of, name in zip(qualities, ("dense", "pruned"), strict=True)),
    )
    cells = [
        TwoLineCell(text, format_span(of.low, of.high, metric).replace("%", ""))
        for text, of in zip(texts, qualities, strict=True)
    ]
    span = format_change_span(report.change, metric).replace("-", _MINUS)
    return metric.name, drawing, *cells, TwoLineCell(describe_accuracy_briefly(report, with_metric=False), span)


def _make_quality_bar(of: Estimate, name: str, report: Report) -> Bar:
    """A bar for a quality: shares as they are, numbers relative to the largest one on the page."""
    largest = 1.0
    if report.metric.unit == "number":
        largest = max(abs(each.quality.high) for each in (report.dense, report.pruned)) or 1.0
    return Bar(of.value / largest, name, Interval(of.low / largest, of.high / largest))


def _view_figure(figure: Figure) -> Row:
    largest = max(figure.dense, figure.pruned) or 1
    drawing = Bars(
        f"{figure.label}: dense {figure.dense_text}, pruned {figure.pruned_text}",
        (Bar(figure.dense / largest, "dense"), Bar(figure.pruned / largest, "pruned")),
    )
    return figure.label, drawing, figure.dense_text, figure.pruned_text, typeset_factors(figure.change)


def _view_stage_accuracies(report: Report) -> Sequence[Row]:
    """Table rows on how quality fell with the removal and rose with the repairs."""
    metric = report.metric
    rows: list[Row] = []
    for stage in report.stages:
        if (value := stage.quality_after) is not None:
            interval = wilson_interval(value, report.data.select) if metric.binary else Interval(value, value)
            bar = _make_quality_bar(Estimate(value, interval.low, interval.high), "pruned" if rows else "dense", report)
            title = f"{metric.name} after {stage.name}: {metric.format(value)}"
            rows.append((stage.name, Bars(title, (bar,)), metric.format(value)))
    return rows


def _view_certificate(report: Report) -> Mapping[str, Any]:
    """Values for the certificate: the path of models that was tested, and the samples that count."""
    record = report.certificate
    if record is None:
        return {}
    return {
        "part": capitalise(describe_part(record)),
        "confidence": f"{1 - record.delta:g}",
        "path": list_path_rows(record),
    }


def _view_widths(groups: Sequence[GroupWidth]) -> Mapping[str, Any]:
    """Values for one bar a group: the share of its units that remain."""
    totals = []
    for kind in dict.fromkeys(group.kind for group in groups):
        groups_of_kind = [group for group in groups if group.kind == kind]
        units, kept_units = sum(group.units for group in groups_of_kind), sum(group.kept for group in groups_of_kind)
        ending = "" if len(groups_of_kind) == 1 else "s"
        totals.append(f"{kind}s: {units:,}{_ARROW}{kept_units:,} in {len(groups_of_kind)} group{ending}")
    bars = [
        Bars(
            f"{group.name}: {group.kept} of {group.units} {group.kind}s kept",
            (Bar(group.kept / group.units, "pruned"),),
            "thin",
        )
        for group in groups
    ]
    return {"widths_line": "; ".join(totals) or "none", "widths": list(zip(groups, bars, strict=True))}


def _view_provenance(report: Report) -> Mapping[str, Any]:
    """Values for the part of the page that shows how to check the result and make it again."""
    parity, provider = report.parity, report.provider
    return {
        "fixed": [
            (reason, str(len(layers)), ", ".join(f"{layer.name} ({layer.units})" for layer in layers))
            for reason, layers in by_reason(report.fixed).items()
        ],
        "parity": {
            "passed": "yes" if parity.passed else "NO",
            "samples": parity.samples,
            "largest difference": f"{parity.max_abs:.2e}",
            "agreement": format_percent(parity.agreement),
        },
        "provider": {
            "asked": provider.asked,
            "got": provider.got,
            "nodes on it": f"{provider.nodes_on_provider} of {provider.nodes_total}",
            "why not the asked one": provider.fallback_reason or "not needed",
        },
        "total_seconds": format_seconds(sum(stage.seconds for stage in report.stages)),
        "stage_costs": _view_stage_costs(report),
        "splits": [(role, str(getattr(report.data, role)), text) for role, text in _ROLES.items()],
        "record_sha256": hashlib.sha256(to_json(report).encode()).hexdigest(),
        "recipe": asdict(report.recipe),
        "plan": {**asdict(report.plan), "schema version": report.schema_version},
        "environment": asdict(report.environment),
        "command": format_command(report.recipe),
    }


def _view_stage_costs(report: Report) -> Sequence[Row]:
    longest = max((stage.seconds for stage in report.stages), default=0) or 1
    return [
        (
            stage.name,
            Bars(f"{stage.name}: {format_seconds(stage.seconds)}", (Bar(stage.seconds / longest, "dense"),), "thin"),
            format_seconds(stage.seconds),
            format_bytes(stage.peak_rss_bytes),
        )
        for stage in report.stages
    ]
