"""How reports show what each class lost with the removed units."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from pxcompress.proof import Report
from pxcompress.report.markup import Bar, bars, node, section, table
from pxcompress.report.summary import percent

_MOST = 20
"""Classes that the page shows; report.json has all."""

_CAPTION = (
    "Share of a class's relevance (LRP-epsilon from its logit, mean over its samples of the score split) that the "
    "removed units carried, mean over all groups; before repair, which folds what the other units predict into them."
)


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
            "What each class lost",
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
