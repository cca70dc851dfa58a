"""What a search found: a table for the terminal and one HTML page, from what search.json holds. Pure functions."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from pxcompress.report.markup import document, node, pairs, section, table
from pxcompress.report.summary import command, percent, wilson

Row = Mapping[str, Any]

_WIDE = 80
"""Columns of a terminal."""

_TOP = 20
"""Trials that the page lists."""

_INK, _BEST, _OTHER = "#77828f", "#1f948b", "#a3aebc"
"""Colours that can be read on a light and on a dark page."""


def quality_text(value: float, *, labels: bool) -> str:
    """Top-1, or the divergence from the dense model where no labels were used."""
    return f"{value:.2%}" if labels else f"KL {-value:.3g}"


def search_table(content: Mapping[str, Any], composite: str) -> str:
    """What `pxcompress search` prints; `composite` is the path of composite.json. No newline at the end."""
    shown = _columns(
        [
            (name, quality_text(row["value"], labels=content["labels"]), f"{row['scorer']}, {row['normalise']}")
            for name, row in _compared(content)
        ]
    )
    if content["pareto"]:
        rows = [(cost, value, f"ratio {row['ratio']:g}, {name}") for cost, value, name, row in _front(content)]
        shown += ["", f"front: {content['pareto']['budget']} left, quality, and the file to --score", *_columns(rows)]
    return "\n".join(
        [*shown, "", _counts(content), *_cautions(content), "", f"next: {next_command(content, composite)}"]
    )


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of three texts each, the first two padded, the last cut where the line would be too long."""
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    found = [f"{name:<{widths[0]}}  {value:>{widths[1]}}  {text}" for name, value, text in lines]
    return [line if len(line) <= _WIDE else f"{line[: _WIDE - 3]}..." for line in found]


def front_file(place: int) -> str:
    """The name of the file with the front's choice at `place`, from 1; it lies beside composite.json."""
    return f"front-{place}.json"


def _front(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Row]]:
    """The front, the cheapest first: cost, quality, its file and the choice."""
    for place, row in enumerate(content["pareto"]["front"], 1):
        yield f"{row['cost']:.1%}", quality_text(row["value"], labels=content["labels"]), front_file(place), row


def next_command(content: Mapping[str, Any], composite: str) -> str:
    """The `pxcompress run` line that prunes with the best choice."""
    best = content["best"]
    return _command(content, {**best, "scorer": f"@{composite}"})


def _command(content: Mapping[str, Any], best: Row) -> str:
    """The line that prunes with a choice."""
    chosen = {name: best[name] for name in ("scorer", "normalise", "repair", "ratio")}
    if content["objective"] == "pxp":  # says nothing about ranking for a budget, nor about repair
        chosen = {"scorer": best["scorer"]}
    return command({**content["recipe"], **chosen})


def _compared(content: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    """Best, default and baselines, all with all repairs, the best first."""
    yield "best found", content["best"]
    if content["default"] is not None:
        yield "default", content["default"]
    names = {row["scorer"] for row in content["baselines"]}
    found = [row for row in content["finals"] if row["scorer"] in names]
    for row in sorted(found, key=lambda row: -row["value"]):
        yield row["scorer"].partition(":")[0], row


def _choice(row: Row) -> str:
    share = [] if row["cost"] is None else [f"ratio {row['ratio']:g}"]
    return ", ".join([*share, row["scorer"], f"normalise {row['normalise']}", *row["repair"]])


def _counts(content: Mapping[str, Any]) -> str:
    """What was done, in one sentence."""
    states = [row["state"] for row in content["trials"]]
    parts = [f"{states.count('complete')} trials measured to the end", f"{states.count('pruned')} ended early"]
    parts += [f"{states.count('fail')} failed"] if "fail" in states else []
    dense = f"; dense {percent(content['dense'])}" if content["labels"] else ""
    said = f"{content['objective']}: {', '.join(parts)}, on {content['samples']['select']} images of select{dense}"
    if content["trial_repair"] == content["recipe"]["repair"]:
        return said
    return f"{said}; trials are repaired by {', '.join(content['trial_repair']) or 'nothing'}, what is compared by all"


def _cautions(content: Mapping[str, Any]) -> list[str]:
    """How much the gain is worth."""
    best, default = content["best"], content["default"]
    found = ["note: the best of many trials looks better on select than it is; `run` measures it on test"]
    if default is not None and best["value"] <= default["value"]:
        return ["note: nothing was found that is better than the default"]
    if best["scorer"] in {row["scorer"] for row in content["baselines"]}:
        found.append(f"note: the best is a baseline: no rules that were tried are better than {best['scorer']}")
    if default is not None and content["labels"]:
        gain = best["value"] - default["value"]
        share = max(0.0, default["value"])  # of `explained` it may be negative
        if gain < wilson(share, content["samples"]["select"]).high - share:
            found.append(f"note: {100 * gain:.2f} points over the default lie within the noise of select")
    return found


def search_page(content: Mapping[str, Any], composite: str) -> str:
    """The search as one self-contained HTML document: inline style and SVG, no script, nothing to load."""
    best = content["best"]
    title = f"{content['recipe']['model']}: {quality_text(best['value'], labels=content['labels'])}"
    aim = content["objective_help"]
    aim = aim if content["labels"] else aim.replace("top-1", "KL to the dense model")
    header = node(
        "header",
        node("p", f"search on {content['recipe']['data']}: {aim}"),
        node("h1", title, node("small", _choice(best))),
    )
    cautions = node("div", node("ul", *(node("li", text) for text in [_counts(content), *_cautions(content)])))
    cautions.set("class", "notes")
    sections = (
        section("Best, default and baselines", _comparison(content), *_curves(content)),
        *([section("Front", *_front_part(content, composite))] if content["pareto"] else []),
        section("How the search went", _history(content)),
        section("What matters", _importances(content)),
        section("Next", node("pre", next_command(content, composite))),
        section("Trials", _trials(content)),
        section("Settings", pairs("What was searched", {**content["recipe"], "study": content["study"]})),
    )
    return document(title, [header, cautions, *sections])


def _front_part(content: Mapping[str, Any], composite: str) -> list[Element]:
    """All measured trials by cost and quality, and what no other one beats in both, with the commands for it."""
    rows, budget = content["pareto"]["front"], content["pareto"]["budget"]
    done = [row for row in content["trials"] if row["state"] == "complete"]

    def draw(axes: Any) -> None:
        costs, values = zip(*((row["cost"], row["value"]) for row in done), strict=True)
        axes.scatter(costs, values, s=9, color=_OTHER, label="trials")
        costs, values = zip(*((row["cost"], row["value"]) for row in rows), strict=True)
        axes.plot(costs, values, color=_BEST, marker="o", markersize=4, label="front")
        axes.set(xlabel=f"{budget} left, share", ylabel=_unit(content))
        axes.legend(fontsize=7, frameon=False, labelcolor=_INK)

    found = list(_front(content))
    shown = [(cost, value, node("span", name, node("small", _choice(row)))) for cost, value, name, row in found]
    lines = table("What no other choice beats in both", (f"{budget} left", "quality", "choice"), shown, "choices")
    files = [Path(composite).with_name(name) for _, _, name, _ in found]
    said = [_command(content, {**row, "scorer": f"@{path}"}) for row, path in zip(rows, files, strict=True)]
    commands = node("pre", "\n\n".join(said))
    return [_picture("Quality and cost of every trial, and the front", 2.8, draw), lines, commands]


def _trials(content: Mapping[str, Any]) -> Element:
    done = sorted((row for row in content["trials"] if row["state"] == "complete"), key=lambda row: -row["value"])
    rows = [
        (str(row["job"] + 1), quality_text(row["value"], labels=content["labels"]), _choice(row)) for row in done[:_TOP]
    ]
    return table(
        f"The best {len(rows)} of those that were measured to the end", ("trial", "value", "choice"), rows, "choices"
    )


def _comparison(content: Mapping[str, Any]) -> Element:
    names = [name for name, _ in _compared(content)]
    values = [row["value"] for _, row in _compared(content)]

    def draw(axes: Any) -> None:
        _bars(axes, names, values)
        axes.set_xlabel(_unit(content))
        if content["labels"]:
            axes.set_xlim(min(0.0, 1.08 * min(values)), 1.08 * max([*values, content["dense"]]))
            axes.axvline(content["dense"], color=_INK, linewidth=1, linestyle="--")

    title = "Best, default and baselines; a dashed line is the dense model"
    return _picture(title, 0.6 + 0.26 * len(names), draw)


def _curves(content: Mapping[str, Any]) -> list[Element]:
    def draw(axes: Any) -> None:
        for place, (name, row) in enumerate(list(_compared(content))[:8]):
            ratios, values = zip(*row["points"], strict=True)
            colour, width = (f"C{place - 1}", 1.0) if place else (_BEST, 2.2)
            axes.plot(ratios, values, label=name, color=colour, linewidth=width, marker="o", markersize=2)
        axes.set(xlabel="share removed", ylabel=_unit(content))
        axes.legend(fontsize=7, frameon=False, labelcolor=_INK)

    return [_picture("Quality at every ratio", 2.8, draw)] if len(content["best"]["points"]) > 1 else []


def _history(content: Mapping[str, Any]) -> Element:
    done = [(row["job"] + 1, row["value"]) for row in content["trials"] if row["state"] == "complete"]
    if not done:
        return node("p", "No trial was measured to the end.")
    ended = [row["job"] + 1 for row in content["trials"] if row["state"] == "pruned"]
    places, values = zip(*done, strict=True)
    best = [max(values[: place + 1]) for place in range(len(values))]

    def draw(axes: Any) -> None:
        axes.step(places, best, where="post", color=_BEST, label="best so far")
        axes.scatter(places, values, s=9, color=_OTHER, label="measured")
        if ended:
            axes.scatter(ended, [min(values)] * len(ended), s=9, marker="|", color=_INK, label="ended early")
        axes.set(xlabel="trial", ylabel=_unit(content))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=7, frameon=False, labelcolor=_INK)

    return _picture("Value of every trial, and the best so far", 2.6, draw)


def _importances(content: Mapping[str, Any]) -> Element:
    found = dict(list(content["importances"].items())[:12])
    if not found:
        return node("p", "Too few trials to say which parameter matters.")
    title = "Importance of each parameter (PED-ANOVA), as a share"
    return _picture(title, 0.6 + 0.24 * len(found), lambda axes: _bars(axes, list(found), list(found.values())))


def _bars(axes: Any, names: Sequence[str], values: Sequence[float]) -> None:
    """Horizontal bars, the first on top and in the colour of the best."""
    drawn = axes.barh(range(len(names)), values, color=[_BEST, *[_OTHER] * (len(names) - 1)])
    axes.bar_label(drawn, fmt="%.3g", padding=3, color=_INK)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()


def _unit(content: Mapping[str, Any]) -> str:
    return "top-1" if content["labels"] else "minus KL to dense"


def _picture(title: str, height: float, draw: Callable[[Any], None]) -> Element:
    """What `draw` puts on matplotlib axes, `height` inches high, as inline SVG that narrow windows scroll."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    text = io.StringIO()
    style: Any = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    style |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 8}
    style |= {"svg.hashsalt": title, "svg.fonttype": "none"}
    with rc_context(style):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return node("div", _plain(ElementTree.fromstring(text.getvalue()), title), class_="scroll")


def _plain(svg: Element, title: str) -> Element:
    """An SVG as HTML holds it: without namespaces, metadata and a size of its own, under a title."""
    for each in svg.iter():
        each.tag = each.tag.rpartition("}")[2]
        for name in [name for name in each.attrib if name.startswith("{")]:
            each.set(name.rpartition("}")[2], each.attrib.pop(name))
    for unwanted in ("metadata", "defs"):
        for each in svg.findall(unwanted):
            if unwanted == "metadata" or each.find("style") is not None:
                svg.remove(each)
    for name in ("width", "height"):
        svg.attrib.pop(name, None)
    svg.insert(0, node("title", title))
    svg.set("role", "img")
    svg.set("class", "wide")
    return svg
