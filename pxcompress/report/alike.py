"""How reports show whether the pruned model looks at what the dense one looks at."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from pxcompress.proof import ExplanationSimilarity
from pxcompress.report.markup import Bar, bars, node, section, table
from pxcompress.report.record import Report

_MEASURES = {"cosine": "cosine", "rank_correlation": "rank correlation", "top_overlap": "top 10 % in common"}


def alike_line(report: Report) -> str:
    """How alike the heatmaps are, in one line; empty where they were not compared."""
    found = report.explanations
    if found is None:
        return ""
    return (
        f"explanations, dense and pruned: cosine {found.cosine:.2f}, rank correlation {found.rank_correlation:.2f}, "
        f"top 10 % in common {found.top_overlap:.0%} ({_of(found)})"
    )


def alike_section(report: Report, *, alone: bool) -> Sequence[Element]:
    """The same with bars, and `alone` where to see more; nothing where the heatmaps were not compared."""
    found = report.explanations
    if found is None:
        return ()
    caption = f"Heatmaps of both models for the class that the dense one predicts; 1 is the same: {_of(found)}"
    body = [_row(text, getattr(found, name)) for name, text in _MEASURES.items()]
    return (
        section(
            "Explanations before and after",
            table(caption, ("measure", "", "mean"), body, "stages"),
            *([node("p", "pxcompress explain FOLDER adds cases side by side to this page.")] if alone else []),
        ),
    )


def _row(text: str, value: float) -> Sequence[Element | str]:
    return text, bars(f"{text}: {value:.2f}", [Bar(value, "pruned")], "thin"), f"{value:.2f}"


def _of(found: ExplanationSimilarity) -> str:
    return f"LRP with rules {found.composite}, {found.samples} samples of the select split"
