"""Renders HTML pages from templates, each self-contained and in ASCII; names from users are escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pxcompress.deploy.intervals import Interval

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Bar:
    """A horizontal bar from 0 to `share` of the width, with its interval if given; `style` is a CSS class."""

    share: float
    style: str
    interval: Interval | None = None


@dataclass(frozen=True)
class Bars:
    """Horizontal bars below each other, as wide as their container; `title` describes them in words."""

    title: str
    items: tuple[Bar, ...]
    style: str = "bars"


@dataclass(frozen=True)
class Strip:
    """A distribution drawn by its 5, 25, 50, 75 and 95 % points, as shares of the width; `title` says it in words."""

    title: str
    marks: tuple[float, float, float, float, float]
    style: str


@dataclass(frozen=True)
class TwoLineCell:
    """A table cell with a text and a smaller text below it."""

    text: str
    under: str


Cell = str | Bars | Strip | TwoLineCell
"""The kinds of cells in a page's tables."""

Row = tuple[Cell, ...]


@dataclass(frozen=True)
class Picture:
    """An image embedded in the page, and a description of it."""

    source: str
    description: str
    title: str = ""

    @classmethod
    def of(cls, file: bytes, kind: str, description: str, title: str = "") -> Picture:
        """Embed the image in `file`, of a kind such as "png" or "svg+xml"."""
        return cls(f"data:image/{kind};base64,{b64encode(file).decode('ascii')}", description, title)


def render(template: str, **view: object) -> str:
    """Render the page `template` with the values in `view`, as ASCII.

    Other characters become references, so that no encoding breaks them.
    """
    text = _TEMPLATES.get_template(template).render(**view)
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _format_share(share: float) -> str:
    """A share as a coordinate in a drawing that is 100 wide."""
    return f"{100 * min(max(share, 0.0), 1.0):.2f}"


def _flatten(facts: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values for a table; nested mappings become "outer.inner"."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{key}", "none" if value is None else str(value)


def _make_breakable(name: str) -> Markup:
    """A dotted name as markup that may be broken after dots, and is copied without breaks."""
    return Markup(".<wbr>").join(name.split("."))


_TEMPLATES = Environment(
    loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.filters.update(across=_format_share, flat=_flatten, breakable=_make_breakable)
_TEMPLATES.globals["css"] = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
