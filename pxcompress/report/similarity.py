"""Parts of reports about whether the pruned model looks at the same things as the dense one."""

from __future__ import annotations

from collections.abc import Sequence

from pxcompress.proof import ExplanationSimilarity
from pxcompress.report.pages import Bar, Bars, Row
from pxcompress.report.record import Report

_MEASURES = {"cosine": "cosine", "rank_correlation": "rank correlation", "top_overlap": "top 10 % in common"}


def describe_similarity(report: Report) -> str:
    """One line on how similar the heatmaps are; "" if they were not compared."""
    similarity = report.explanations
    if similarity is None:
        return ""
    return (
        f"explanations, dense and pruned: cosine {similarity.cosine:.2f}, "
        f"rank correlation {similarity.rank_correlation:.2f}, "
        f"top 10 % in common {similarity.top_overlap:.0%} ({_describe_samples(similarity)})"
    )


def list_similarities(report: Report) -> Sequence[Row]:
    """Table rows with the similarities of the heatmaps as bars; empty if they were not compared."""
    similarity = report.explanations
    return (
        [] if similarity is None else [_make_row(text, getattr(similarity, name)) for name, text in _MEASURES.items()]
    )


def _make_row(text: str, value: float) -> Row:
    return text, Bars(f"{text}: {value:.2f}", (Bar(value, "pruned"),), "thin"), f"{value:.2f}"


def describe_heatmap_samples(report: Report) -> str:
    """Words on the LRP rules and the number of samples for heatmaps; "" if they were not compared."""
    return "" if report.explanations is None else _describe_samples(report.explanations)


def _describe_samples(similarity: ExplanationSimilarity) -> str:
    return f"LRP with rules {similarity.composite}, {similarity.samples} samples of the select split"
