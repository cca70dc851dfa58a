"""Makes a page to label images in a browser; answers are saved as CSV, and nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pxcompress.report.pages import Picture, render


@dataclass(frozen=True)
class LabelCase:
    """One image to label: its name, the models' columns in its CSV line, and the different answers as `choices`.

    The choices are in an order that does not tell which model gave them.
    """

    image: str
    dense: str
    pruned: str
    choices: tuple[str, ...]
    picture: Picture


def to_labelling_page(cases: Sequence[LabelCase], images: int, command: str) -> str:
    """The page for `cases`, the images (of `images` in all) on which models disagree; `command` is what to run then."""
    title = f"What do these {len(cases)} images show?"
    return render("labelling.html", title=title, cases=cases, total=images, command=command)
