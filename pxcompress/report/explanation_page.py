"""The values that HTML pages show of an explanation, as explain.html or as sections of report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pxcompress.report.explanation import (
    Case,
    Explanation,
    KindSimilarity,
    LayerRelevance,
    describe_findings,
    describe_method,
    format_means,
)
from pxcompress.report.heatmap_figures import encode_png, list_panels
from pxcompress.report.pages import Bar, Bars, Picture, Row, render
from pxcompress.report.summary import capitalise, format_percent


@dataclass(frozen=True)
class CaseView:
    """The values that a page shows of one case: heatmaps and the units that carried the decision."""

    heading: str
    description: str
    is_line: bool
    pictures: Sequence[Picture]
    units: Sequence[Row]


@dataclass(frozen=True)
class ExplanationView:
    """The values that a page shows of an explanation: similarity, cases and layers."""

    method: str
    similarity: Sequence[Row]
    lines: Sequence[str]
    has_lines: bool
    cases: Sequence[CaseView]
    layers: Sequence[Row]


def render_explanation(explanation: Explanation) -> str:
    """The page: one self-contained HTML document in ASCII, figures embedded."""
    summary = explanation.similarity[0]
    return render(
        "explanation.html",
        title=f"{explanation.model}: explanations before and after",
        images=True,
        lead=f"{explanation.model}: {explanation.inputs}",
        agreement=f"explanations agree by a cosine of {summary.cosine:.2f} on average over {summary.samples} inputs",
        explanation=view_explanation(explanation),
    )


def view_explanation(explanation: Explanation) -> ExplanationView:
    """An explanation as the values that the page's templates show."""
    return ExplanationView(
        method=capitalise(describe_method(explanation)),
        similarity=[_view_similarity(row) for row in explanation.similarity],
        lines=[capitalise(line) for line in (*describe_findings(explanation), *explanation.notes)],
        has_lines=any(case.pictures.is_line for case in explanation.cases),
        cases=[_view_case(case) for case in explanation.cases],
        layers=[_view_layer(row) for row in explanation.layers],
    )


def _view_similarity(row: KindSimilarity) -> Row:
    bar = Bars(f"{row.kind}: cosine {row.cosine:.2f}", (Bar(row.cosine, "pruned"),), "thin")
    return row.kind, bar, str(row.samples), *format_means(row)


def _view_case(case: Case) -> CaseView:
    agreement = "" if case.dense.probability is not None else f" They agree by {case.agreement:.2f}."
    label = "" if case.label is None else f" By the data: {case.label}."
    description = (
        f"Dense: {case.dense}. Pruned: {case.pruned}.{label}{agreement} Cosine of the two maps of "
        f"{case.subjects[0]} {case.similarity['cosine']:.2f}, rank correlation "
        f"{case.similarity['rank_correlation']:.2f}, top 10 % in common {case.similarity['top_overlap']:.0%}."
    )
    return CaseView(
        heading=f"{capitalise(case.kind)}: {case.sample}",
        description=description,
        is_line=case.pictures.is_line,
        pictures=[
            Picture.of(encode_png(panel.picture), "png", panel.description, panel.title) for panel in list_panels(case)
        ],
        units=[
            (unit.layer, f"{unit.kind} {unit.unit}", f"{unit.relevance:+.0%}", "kept" if unit.kept else "removed")
            for unit in case.units
        ],
    )


def _view_layer(row: LayerRelevance) -> Row:
    words = f"{row.name}: removed units carried {format_percent(row.removed)}"
    units = f"{row.units} \N{RIGHTWARDS ARROW} {row.kept}"
    return row.name, Bars(words, (Bar(row.removed, "pruned"),), "thin"), units, format_percent(row.removed)
