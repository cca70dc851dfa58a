"""How reports show what each class lost: answers of the shipped file, and relevance of the removed units."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from pxcompress.deploy.intervals import paired
from pxcompress.proof import ClassChange
from pxcompress.report.markup import Bar, bars, node, section, table
from pxcompress.report.record import Report
from pxcompress.report.summary import percent, points, spread

_MOST = 20
"""Classes that the page shows; report.json has all."""

_CAPTION = (
    "Share of a class's relevance (LRP-epsilon from its logit, mean over its samples of the score split) that the "
    "removed units carried, mean over all groups; before repair, which folds what the other units predict into them."
)


def changes_line(report: Report) -> str:
    """How many classes lost and gained answers, and the one that lost most."""
    changes = _most_lost_first(report)
    lost, gained = (sum(sign * (of.dense - of.pruned) > 0 for of in changes) for sign in (1, -1))
    worst = changes[0]
    most = f"; most: {worst.name!r}, {worst.dense} -> {worst.pruned} of {worst.samples} samples right" if lost else ""
    return f"{lost} of {len(changes)} classes lost answers, {gained} gained some{most}"


def changes_section(report: Report) -> Element:
    """Accuracy of every class in both models, the largest loss first."""
    changes, line = _most_lost_first(report), changes_line(report)
    more = [node("p", f"{len(changes) - _MOST} more in report.json.")] if len(changes) > _MOST else []
    return section(
        "Every class before and after",
        node("p", f"{line[0].upper()}{line[1:]}."),
        table(
            "Share of a class's test samples that the exported files are right on, and the change in points with "
            "its 95 % interval. The interval is of one class: the worst of many looks worse than it is",
            ("class", "", "dense", "pruned", "points"),
            [_changed(of) for of in changes[:_MOST]],
            "compare",
        ),
        *more,
    )


def _most_lost_first(report: Report) -> list[ClassChange]:
    """Classes by the share of their test samples that was lost."""
    return sorted(report.class_changes, key=lambda of: (of.pruned - of.dense) / of.samples)


def _changed(of: ClassChange) -> Sequence[Element | str]:
    before, after = of.dense / of.samples, of.pruned / of.samples
    figure = bars(
        f"{of.name}: dense {percent(before)}, pruned {percent(after)}", [Bar(before, "dense"), Bar(after, "pruned")]
    )
    interval = node("small", spread(paired(of.dense, of.pruned, of.both, of.samples)))
    name = node("span", of.name, node("small", f"{of.samples} samples"))
    return name, figure, percent(before), percent(after), node("span", points(after - before), interval)


def class_line(report: Report) -> str:
    """The class that lost most and the mean over classes, in one line; empty where no class scores were asked for."""
    worst = _worst_first(report)
    if not worst:
        return ""
    mean = sum(share for _, share, _ in worst) / len(worst)
    name, most, _ = worst[0]
    unknown = len(report.class_shares) - len(worst)
    left_out = f"; {unknown} without samples in the score split left out" if unknown else ""
    return (
        f"class relevance that the removed units carried: {percent(mean)} on average, {percent(most)} for {name!r}, "
        f"the most of {len(worst)} classes, before repair{left_out}"
    )


def class_section(report: Report) -> Sequence[Element]:
    """The classes that lost most, worst first; nothing where no class scores were asked for."""
    worst = _worst_first(report)
    if not worst:
        return ()
    line = class_line(report)
    body = [
        (name, bars(f"{name}: {percent(share)} removed", [Bar(share, "pruned")], "thin"), percent(share), str(samples))
        for name, share, samples in worst[:_MOST]
    ]
    more = [f"{len(worst) - _MOST} more in report.json."] if len(worst) > _MOST else []
    return (
        section(
            "What the removed units carried for each class",
            node("p", f"{line[0].upper()}{line[1:]}."),
            table(_CAPTION, ("class", "", "removed", "samples"), body, "compare"),
            *(node("p", text) for text in more),
            *_unknown(report),
        ),
    )


def _worst_first(report: Report) -> list[tuple[str, float, int]]:
    """Name, removed share and samples of every class that was scored, the largest share first."""
    scored = [(row.name, row.removed, row.samples) for row in report.class_shares if row.removed is not None]
    return sorted(scored, key=lambda row: -row[1])


def _unknown(report: Report) -> Sequence[Element]:
    """The classes of which nothing is known."""
    names = [row.name for row in report.class_shares if row.removed is None]
    listed = ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")
    return [node("p", f"No sample in the score split: {listed}.")] if names else []
