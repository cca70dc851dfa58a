"""Parts of reports about what each class lost: right answers, and relevance of the removed units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pxcompress.deploy.intervals import newcombe_interval
from pxcompress.errors import list_some
from pxcompress.proof import ClassChange
from pxcompress.report.pages import Bar, Bars, Row, TwoLineCell
from pxcompress.report.record import Report
from pxcompress.report.summary import capitalise, format_percent, format_points

_MOST = 20
"""Most classes that the page shows; report.json has all."""


def describe_class_changes(report: Report) -> str:
    """One line on how many classes lost and gained right answers, and which lost most; "" without classes."""
    changes = _sort_by_loss(report)
    if not changes:
        return ""
    losers, winners = (sum(sign * (of.dense - of.pruned) > 0 for of in changes) for sign in (1, -1))
    worst = changes[0]
    worst_text = (
        f"; most: {worst.name!r}, {worst.dense} -> {worst.pruned} of {worst.samples} samples right" if losers else ""
    )
    return f"{losers} of {len(changes)} classes lost answers, {winners} gained some{worst_text}"


def describe_class_relevance(report: Report) -> str:
    """One line on the class whose relevance shrank most, and the mean over classes; "" without class scores."""
    worst = _sort_by_removed(report)
    if not worst:
        return ""
    mean = sum(share for _, share, _ in worst) / len(worst)
    name, largest_share, _ = worst[0]
    unknown = len(report.class_shares) - len(worst)
    left_out = f"; {unknown} without samples in the score split left out" if unknown else ""
    return (
        f"class relevance that the removed units carried: {format_percent(mean)} on average, "
        f"{format_percent(largest_share)} for {name!r}, the most of {len(worst)} classes, before repair{left_out}"
    )


def view_classes(report: Report) -> Mapping[str, Any]:
    """The page's values about classes, the largest losses first."""
    changes, worst = _sort_by_loss(report), _sort_by_removed(report)
    line, relevance = describe_class_changes(report), describe_class_relevance(report)
    names_without_samples = [row.name for row in report.class_shares if row.removed is None]
    return {
        "changes_line": capitalise(line),
        "changes": [_view_change(of) for of in changes[:_MOST]],
        "more_changes": max(0, len(changes) - _MOST),
        "class_line": capitalise(relevance),
        "class_shares": [_view_share(*of) for of in worst[:_MOST]],
        "more_class_shares": max(0, len(worst) - _MOST),
        "classes_without_samples": list_some(names_without_samples, _MOST),
    }


def _sort_by_loss(report: Report) -> list[ClassChange]:
    """Classes sorted by the share of their test samples that was lost, largest first."""
    return sorted(report.class_changes, key=lambda of: (of.pruned - of.dense) / of.samples)


def _view_change(of: ClassChange) -> Row:
    dense, pruned = of.dense / of.samples, of.pruned / of.samples
    words = f"{of.name}: dense {format_percent(dense)}, pruned {format_percent(pruned)}"
    loss = newcombe_interval(of.dense, of.pruned, of.both, of.samples)
    change = TwoLineCell(format_points(pruned - dense), f"{format_points(-loss.high)} to {format_points(-loss.low)}")
    drawing = Bars(words, (Bar(dense, "dense"), Bar(pruned, "pruned")))
    return TwoLineCell(of.name, f"{of.samples} samples"), drawing, format_percent(dense), format_percent(pruned), change


def _sort_by_removed(report: Report) -> list[tuple[str, float, int]]:
    """Name, removed share of relevance, and samples of every scored class, the largest share first."""
    shares = [(row.name, row.removed, row.samples) for row in report.class_shares if row.removed is not None]
    return sorted(shares, key=lambda row: -row[1])


def _view_share(name: str, share: float, samples: int) -> Row:
    drawing = Bars(f"{name}: {format_percent(share)} removed", (Bar(share, "pruned"),), "thin")
    return name, drawing, format_percent(share), str(samples)
