"""report.html: one page that needs no network and no script. The result first, then everything needed to check it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from xml.etree.ElementTree import Element

from pxcompress.inspection.survey import by_reason
from pxcompress.proof import GroupWidth
from pxcompress.report.alike import alike_section
from pxcompress.report.certificate import badge_box, certificate_section
from pxcompress.report.classes import changes_section, class_section
from pxcompress.report.costs import costs_section, latency_strips
from pxcompress.report.markup import Bar, bars, document, node, pairs, section, table
from pxcompress.report.record import Report
from pxcompress.report.summary import (
    Interval,
    Row,
    accuracy_words,
    agreement_line,
    command,
    conditions,
    describe_goal,
    describe_share,
    drop_interval,
    headline,
    is_faster,
    milliseconds,
    percent,
    points,
    pretty,
    rows,
    seconds,
    size,
    smaller,
    speed_words,
    wilson,
)
from pxcompress.report.targets import targets_section
from pxcompress.types import Fixed

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


def to_html(report: Report, explanation: Sequence[Element] = ()) -> str:
    """The report as one self-contained HTML document in ASCII: inline style and SVG, no script, nothing to load.

    `explanation` are sections that `pxcompress explain` adds.
    """
    title = f"{report.recipe.model}: {headline(report)}"
    sections = (
        _comparison(report),
        *targets_section(report),
        *certificate_section(report),
        changes_section(report),
        costs_section(report),
        _stage_accuracy(report),
        *class_section(report),
        *alike_section(report, alone=not explanation),
        *explanation,
        _widths(report.groups),
        _fixed(report.fixed),
        _proof(report),
        _stage_costs(report),
        _data(report),
        _settings(report),
        _reproduce(report),
    )
    return document(title, (*_top(report), *sections), images=bool(explanation))


def _top(report: Report) -> Sequence[Element]:
    """What was asked, the headline, the verdict, four figures, notes."""
    recipe, plan = report.recipe, report.plan
    result = f"{speed_words(report)}, {smaller(report)}, {accuracy_words(report)}"
    header = node(
        "header",
        node(
            "p",
            f"{recipe.model} on {report.data.name}: {describe_share(report) or describe_goal(recipe, plan.unit)}",
        ),
        node(
            "h1",
            pretty(result[0].upper() + result[1:]).replace("top-1", f"top{_HYPHEN}1"),
            node("small", _intervals(report)),
        ),
    )
    words = node("p", node("strong", "Verdict: "), report.verdict.replace(" -> ", _ARROW))
    verdict = node("div", words, class_="verdict" if is_faster(report) else "verdict caution")
    notes = (
        [node("div", node("ul", *(node("li", note.text) for note in report.notes)), class_="notes")]
        if report.notes
        else []
    )
    return header, *badge_box(report), verdict, _tiles(report), *notes


def _tiles(report: Report) -> Element:
    by_label = {row.label: row for row in rows(report)}
    latency = by_label["latency p50"]
    accuracies = f"{percent(report.dense.top1)}{_ARROW}{percent(report.pruned.top1)}, {report.pruned.samples} samples"
    tiles = (
        (latency.label, pretty(speed_words(report)), _before_after(latency), "good" if is_faster(report) else "bad"),
        *(_tile(by_label[label]) for label in ("file size", "MACs")),
        (
            "top-1",
            accuracy_words(report, ""),
            accuracies,
            "bad" if drop_interval(report).low > 0 else "",
        ),
    )
    return node("dl", *(_tile_node(*tile) for tile in tiles), class_="tiles")


def _tile(row: Row) -> tuple[str, str, str, str]:
    colour = "good" if row.ratio < 1 else "bad"
    return row.label, pretty(row.change), _before_after(row), "" if row.change == "same" else colour


def _before_after(row: Row) -> str:
    return f"{row.dense_text}{_ARROW}{row.pruned_text}"


def _intervals(report: Report) -> str:
    """What stands behind the headline: speed-up and change of top-1, with their 95 % intervals."""
    drop, speedup = drop_interval(report), report.speedup
    change = f"top-1 {_signed(-report.ratios.top1_drop)} ({_signed(-drop.high)} to {_signed(-drop.low)}) points"
    faster = f"{pretty(f'{speedup.ratio:.2f}x')} ({speedup.interval}) the speed"
    return f"{faster}, {change}; 95\N{NO-BREAK SPACE}% intervals"


def _tile_node(label: str, value: str, detail: str, colour: str) -> Element:
    return node(
        "div",
        node("dt", label),
        node("dd", value, class_=f"value {colour}".strip()),
        node("dd", detail, class_="detail"),
    )


def _signed(share: float) -> str:
    return points(share).replace("-", _MINUS)


def _comparison(report: Report) -> Element:
    """Bars of both models for every figure, and latency in full."""
    latencies = {"dense": report.dense.latency_ms, "pruned": report.pruned.latency_ms}
    return section(
        "Dense and pruned",
        node("p", f"Measured on: {conditions(report)}."),
        *([node("p", f"{line[0].upper()}{line[1:]}.")] if (line := agreement_line(report)) else []),
        _legend(("dense", "dense"), ("pruned", "pruned")),
        table(
            "Accuracy is through ONNX Runtime on the exported files; lines on its bars are 95 % Wilson intervals. "
            "That of the change (Newcombe) knows that both models saw the same samples.",
            ("figure", "", "dense", "pruned", "change"),
            [_accuracy_row(report), *(_figure_row(row) for row in rows(report))],
            "compare",
        ),
        node("h3", "Latency of one call"),
        latency_strips(report),
        table(
            "Wall time, both models timed in turns",
            ("model", "mean", "p50", "p90", "p99", "runs"),
            [
                (name, *(milliseconds(value) for value in (of.mean, of.p50, of.p90, of.p99)), str(of.runs))
                for name, of in latencies.items()
            ],
            "numbers",
        ),
    )


def _legend(*entries: tuple[str, str]) -> Element:
    return node(
        "div", *(node("span", _swatch(style), text) for style, text in entries), class_="legend", aria_hidden="true"
    )


def _swatch(style: str) -> Element:
    return node("svg", node("rect", class_=style, width="12", height="12"), viewBox="0 0 12 12")


def _accuracy_row(report: Report) -> Sequence[Element | str]:
    intervals = [wilson(of.top1, of.samples) for of in (report.dense, report.pruned)]
    texts = [percent(of.top1) for of in (report.dense, report.pruned)]
    figure = bars(
        f"top-1: dense {texts[0]}, pruned {texts[1]}",
        [_bar(report.dense.top1, "dense", intervals[0]), _bar(report.pruned.top1, "pruned", intervals[1])],
    )
    cells = [node("span", text, node("small", _span(of))) for text, of in zip(texts, intervals, strict=True)]
    drop = drop_interval(report)
    spread = node("small", f"{_signed(-drop.high)} to {_signed(-drop.low)}")
    return "top-1", figure, *cells, node("span", accuracy_words(report, ""), spread)


def _bar(share: float, style: str, interval: Interval) -> Bar:
    return Bar(share, style, interval.low, interval.high)


def _span(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _figure_row(row: Row) -> Sequence[Element | str]:
    largest = max(row.dense, row.pruned) or 1
    figure = bars(
        f"{row.label}: dense {row.dense_text}, pruned {row.pruned_text}",
        [Bar(row.dense / largest, "dense"), Bar(row.pruned / largest, "pruned")],
    )
    return row.label, figure, row.dense_text, row.pruned_text, pretty(row.change)


def _stage_accuracy(report: Report) -> Element:
    """How accuracy fell with the removal and came back with the repairs."""
    samples = report.data.select
    body = []
    for place, (stage, top1) in enumerate(
        (of.name, of.top1_after) for of in report.stages if of.top1_after is not None
    ):
        title = f"top-1 after {stage}: {percent(top1)}"
        body.append(
            (stage, bars(title, [_bar(top1, "pruned" if place else "dense", wilson(top1, samples))]), percent(top1))
        )
    return section(
        "Accuracy after each stage",
        table(
            f"Top-1 in PyTorch on the select split, {samples} samples; lines are 95 % intervals",
            ("after", "", "top-1"),
            body,
            "stages",
        ),
    )


def _widths(groups: Sequence[GroupWidth]) -> Element:
    """One bar a group: the share of its units that stayed."""
    kinds = dict.fromkeys(group.kind for group in groups)
    return section(
        "Width of every layer",
        node(
            "p", "; ".join(_total(kind, [group for group in groups if group.kind == kind]) for kind in kinds) or "none"
        ),
        _legend(("pruned", "kept"), ("track", "removed")),
        node("ul", *(node("li", *_width(group)) for group in groups), class_="widths"),
    )


def _total(kind: str, groups: Sequence[GroupWidth]) -> str:
    units, kept = sum(group.units for group in groups), sum(group.kept for group in groups)
    return f"{kind}s: {units:,}{_ARROW}{kept:,} in {len(groups)} group{'' if len(groups) == 1 else 's'}"


def _width(group: GroupWidth) -> Sequence[Element]:
    title = f"{group.name}: {group.kept} of {group.units} {group.kind}s kept"
    figure = bars(title, [Bar(group.kept / group.units, "pruned")], "thin")
    return node("span", *_breakable(group.name)), figure, node("b", f"{group.units}{_ARROW}{group.kept}")


def _breakable(name: str) -> Sequence[Element | str]:
    """A dotted name that may be broken after its dots, and still copies as it is."""
    first, *others = name.split(".")
    return [first, *(part for other in others for part in (".", node("wbr"), other))]


def _fixed(fixed: Sequence[Fixed]) -> Element:
    """Layers that keep their width, by reason."""
    body = [
        (reason, str(len(layers)), ", ".join(f"{layer.name} ({layer.units})" for layer in layers))
        for reason, layers in by_reason(fixed).items()
    ]
    content = table(
        "Layers whose outputs cannot lose units, or were not to (units in brackets)",
        ("why", "layers", "which"),
        body,
        "reasons",
    )
    return section(
        "What stays whole, and why", content if fixed else node("p", "Every layer that was found could be narrowed.")
    )


def _proof(report: Report) -> Element:
    parity, provider = report.parity, report.provider
    return section(
        "Proof",
        node(
            "div",
            pairs(
                "Parity: the exported file against PyTorch on the same inputs",
                {
                    "passed": _passed(parity.passed),
                    "samples": parity.samples,
                    "largest difference": f"{parity.max_abs:.2e}",
                    "same top-1": percent(parity.top1_agreement),
                },
            ),
            pairs(
                "Provider: what ran the graph",
                {
                    "asked": provider.asked,
                    "got": provider.got,
                    "nodes on it": f"{provider.nodes_on_provider} of {provider.nodes_total}",
                    "why not the asked one": provider.fallback_reason or "not needed",
                },
            ),
            class_="two",
        ),
        pairs("sha256 of the files", report.sha256),
    )


def _passed(passed: bool) -> str:
    return "yes" if passed else "NO"


def _stage_costs(report: Report) -> Element:
    longest = max((stage.seconds for stage in report.stages), default=0) or 1
    body = [
        (
            stage.name,
            bars(f"{stage.name}: {seconds(stage.seconds)}", [Bar(stage.seconds / longest, "dense")], "thin"),
            seconds(stage.seconds),
            size(stage.peak_rss_bytes),
        )
        for stage in report.stages
    ]
    total = sum(stage.seconds for stage in report.stages)
    return section(
        "What the run cost",
        table(
            f"{seconds(total)} in all; memory is the peak of the process so far",
            ("stage", "", "time", "memory"),
            body,
            "compare",
        ),
    )


def _data(report: Report) -> Element:
    data = report.data
    splits = [(role, str(getattr(data, role)), text) for role, text in _ROLES.items()]
    lists: list[Element] = [node("h3", f"{len(data.classes)} classes"), _names(data.classes, "classes")]
    if data.skipped:
        lists += [
            node("h3", f"{len(data.skipped)} images left out: they could not be read"),
            _names(data.skipped, "left out"),
        ]
    return section(
        "Data",
        table(f"{data.name}: disjoint splits, checked by sample id", ("split", "samples", "what for"), splits),
        *lists,
    )


def _names(names: Sequence[str], label: str) -> Element:
    return node("div", ", ".join(names), class_="long", tabindex="0", role="group", aria_label=label)


def _settings(report: Report) -> Element:
    plan = {**asdict(report.plan), "schema version": report.schema_version}
    return section(
        "Settings",
        node(
            "div",
            node("div", pairs("Recipe", asdict(report.recipe)), pairs("Plan", plan)),
            pairs("Environment", asdict(report.environment)),
            class_="two",
        ),
    )


def _reproduce(report: Report) -> Element:
    return section(
        "Reproduce",
        node("p", "The same seed on the same machine makes the same plan."),
        node("pre", node("code", command(report.recipe))),
        node("p", f"Run folder: {report.folder}. Everything on this page is in report.json beside it."),
    )
