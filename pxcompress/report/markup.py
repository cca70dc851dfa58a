"""HTML elements, tables and bars. Text goes through the standard library's serialiser, which escapes all of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, tostring

from pxcompress.report.style import CSS

Content = Element | str


def node(tag: str, *children: Content, **attributes: str) -> Element:
    """An element with text and elements in order; `class_` stands for class, `_` inside a name for "-".

    The user's text goes into children only: the serialiser leaves "<" in attributes as it is.
    """
    element = Element(tag, {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()})
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            element.append(child)
            last = child
        elif last is None:
            element.text = (element.text or "") + child
        else:
            last.tail = (last.tail or "") + child
    return element


def page(root: Element) -> str:
    """The document as ASCII text; other characters are references, so that no encoding can break it."""
    return "<!DOCTYPE html>\n" + tostring(root, encoding="us-ascii", method="html").decode("ascii") + "\n"


def document(title: str, content: Iterable[Content], *, images: bool = False) -> str:
    """A whole page with its style inside; `images` allows those that stand in the page itself."""
    # the browser itself then refuses whatever a later change would load
    policy = "default-src 'none'; style-src 'unsafe-inline'" + ("; img-src data:" if images else "")
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("meta", http_equiv="Content-Security-Policy", content=policy),
        node("title", title),
        node("style", CSS),
    )
    return page(node("html", head, node("body", node("main", *content)), lang="en"))


def section(title: str, *children: Content) -> Element:
    """A section under a heading."""
    return node("section", node("h2", title), *children)


def table(caption: str, head: Sequence[str], body: Iterable[Sequence[Content]], class_: str = "") -> Element:
    """A table whose first column heads its rows; `caption` says what it holds, for those who do not see it."""
    return node(
        "div",
        node(
            "table",
            node("caption", caption),
            node("thead", node("tr", *(node("th", name, scope="col") for name in head))),
            node("tbody", *(_row(cells) for cells in body)),
            class_=class_,
        ),
        class_="scroll",
        **(_SCROLLS if class_ in _WIDE else {}),
    )


_WIDE = ("numbers", "choices")
"""Tables whose cells do not wrap: where the page is narrow they scroll, which takes a key's focus."""

_SCROLLS = {"tabindex": "0", "role": "group", "aria_label": "table, scrolls sideways where it does not fit"}


def _row(cells: Sequence[Content]) -> Element:
    first, *others = cells
    return node("tr", node("th", first, scope="row"), *(node("td", cell) for cell in others))


def pairs(caption: str, facts: Mapping[str, object]) -> Element:
    """A table of names and values; mappings inside are flattened to "outer.inner"."""
    return table(caption, ("name", "value"), list(_flat(facts)), "facts")


def _flat(facts: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{key}", "none" if value is None else str(value)


@dataclass(frozen=True)
class Bar:
    """A horizontal bar from 0 to `share` of the width, and where given its interval; `style` is a CSS class."""

    share: float
    style: str
    low: float | None = None
    high: float | None = None


def bars(title: str, items: Sequence[Bar], style: str = "bars") -> Element:
    """Bars under each other as inline SVG, stretched to the width of what holds it; `title` says the same in words."""
    height = 10 * len(items)
    shapes = [shape for place, item in enumerate(items) for shape in _shapes(item, 10 * place)]
    return node(
        "svg",
        node("title", title),
        *shapes,
        class_=f"{style} of{len(items)}",
        viewBox=f"0 0 100 {height}",
        preserveAspectRatio="none",
        role="img",
    )


def strip(title: str, marks: Sequence[float], style: str) -> Element:
    """A distribution as inline SVG: 5, 25, 50, 75 and 95 % of it, as shares of the width; `title` says the same."""
    low, first, middle, third, high = map(_percent, marks)
    return node(
        "svg",
        node("title", title),
        node("rect", class_="track", x="0", width="100", y="1", height="8"),
        node("rect", class_=f"{style} pale", x=low, width=f"{float(high) - float(low):.2f}", y="1", height="8"),
        node("rect", class_=style, x=first, width=f"{float(third) - float(first):.2f}", y="1", height="8"),
        node("path", class_="interval", d=f"M{middle} 0v10"),
        class_="bars of1",
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        role="img",
    )


def _shapes(bar: Bar, top: float) -> Iterable[Element]:
    size = {"y": f"{top + 1}", "height": "8"}
    yield node("rect", class_="track", x="0", width="100", **size)
    yield node("rect", class_=bar.style, x="0", width=_percent(bar.share), **size)
    if bar.low is not None and bar.high is not None:
        low, high = _percent(bar.low), _percent(bar.high)
        yield node("path", class_="interval", d=f"M{low} {top + 5}H{high}M{low} {top + 3}v4M{high} {top + 3}v4")


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}"
