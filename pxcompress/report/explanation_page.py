"""explain.html, and the same as a section of another page: pure functions of what was found."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from pxcompress.report.explanation import Alike, Case, Explanation, figures, how, spoken
from pxcompress.report.heatmap_figures import panels, png
from pxcompress.report.markup import Bar, bars, document, node, section, table
from pxcompress.report.summary import percent

_LEGEND = (
    "Red speaks for the class, blue against it, white is nothing; each map is scaled by its own largest relevances. "
)
_IMAGES = "Small images are shown with their pixels."
_LINES = "A line goes on in the one below it; where the data know what makes the class, the input is yellow."


def explanation_page(found: Explanation) -> str:
    """The page: one self-contained HTML document in ASCII, figures embedded."""
    same = found.alike[0]
    header = node(
        "header",
        node("p", f"{found.model}: {found.inputs}"),
        node(
            "h1",
            "What the pruned model looks at",
            node("small", f"explanations agree by a cosine of {same.cosine:.2f} on average over {same.samples} inputs"),
        ),
    )
    title = f"{found.model}: explanations before and after"
    return document(title, [header, *explanation_sections(found)], images=True)


def explanation_sections(found: Explanation) -> Sequence[Element]:
    """Similarity, cases and layers, each as a section."""
    return (_similarity(found), _cases(found.cases), _layers(found))


def _similarity(found: Explanation) -> Element:
    method = how(found)
    return section(
        "How alike on the inputs explained here",
        node("p", f"{method[0].upper()}{method[1:]}."),
        table(
            "Means over inputs, 1 is the same: cosine of the maps, correlation of their ranks, share of the 10 % most "
            "relevant positions in common; Gini index of each model's maps, where more is sparser.",
            ("inputs", "", "n", "cosine", "rank correlation", "top 10 %", "own class", "Gini dense", "Gini pruned"),
            [_alike(row) for row in found.alike],
            "alike",
        ),
        *(node("p", f"{line[0].upper()}{line[1:]}.") for line in (*spoken(found), *found.notes)),
    )


def _alike(row: Alike) -> Sequence[Element | str]:
    bar = bars(f"{row.kind}: cosine {row.cosine:.2f}", [Bar(row.cosine, "pruned")], "thin")
    return row.kind, bar, str(row.samples), *figures(row)


def _cases(cases: Sequence[Case]) -> Element:
    kind = _LINES if any(case.pictures.is_line for case in cases) else _IMAGES
    return section("Cases", node("p", _LEGEND + kind), *(_case(case) for case in cases))


def _case(case: Case) -> Element:
    shown = [
        node("figure", node("img", src=_data(png(picture)), alt=_alternative(place)), node("figcaption", title))
        for place, (title, picture) in enumerate(panels(case))
    ]
    label = "" if case.label is None else f" It is of class {case.label}."
    told = (
        f"Dense: {case.dense.name} ({case.dense.probability:.0%}). Pruned: {case.pruned.name} "
        f"({case.pruned.probability:.0%}).{label} Cosine of the first two maps {case.similarity['cosine']:.2f}, rank "
        f"correlation {case.similarity['rank_correlation']:.2f}, top 10 % in common "
        f"{case.similarity['top_overlap']:.0%}."
    )
    units = table(
        "Units that carried the dense model's decision: relevance over the logit, and what became of them",
        ("layer", "unit", "relevance", "now"),
        [
            (unit.layer, f"{unit.kind} {unit.unit}", f"{unit.relevance:+.0%}", "kept" if unit.kept else "removed")
            for unit in case.units
        ],
        "numbers",
    )
    heading = node("h3", f"{case.kind[0].upper()}{case.kind[1:]}: {case.sample}")
    return node(
        "article",
        heading,
        node("p", told),
        node("div", *shown, class_="maps lines" if case.pictures.is_line else "maps"),
        units,
    )


def _alternative(place: int) -> str:
    """What a picture is, for those who do not see it; the caption says of which class."""
    said = ("the input", "heatmap of the dense model", "heatmap of the pruned model, same class")
    return said[place] if place < len(said) else "heatmap of the pruned model, its own class"


def _data(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def _layers(found: Explanation) -> Element:
    body = [
        (
            row.name,
            bars(f"{row.name}: removed units carried {percent(row.removed)}", [Bar(row.removed, "pruned")], "thin"),
            f"{row.units} \N{RIGHTWARDS ARROW} {row.kept}",
            percent(row.removed),
        )
        for row in found.layers
    ]
    return section(
        "What the removed units carried",
        table(
            "Share of the size of each layer's relevance in the dense model, over all inputs; before repair, which "
            "folds what the other units predict into them",
            ("layer", "", "units", "carried"),
            body,
            "compare",
        ),
    )
