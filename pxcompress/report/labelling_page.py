"""A page on which a person says what images show; it is filled in a browser and saved as CSV. It loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pxcompress.report.pages import Picture, render


@dataclass(frozen=True)
class LabelCase:
    """One image: its name, what its line of the CSV says of the models, and their different answers, `choices`.

    The choices are in an order that does not tell whose they are.
    """

    image: str
    dense: str
    pruned: str
    choices: tuple[str, ...]
    picture: Picture


def to_labelling_page(cases: Sequence[LabelCase], images: int, command: str) -> str:
    """The page for `cases`, the ones among so many `images` on which the models disagree; `command` goes on with it."""
    title = f"What do these {len(cases)} images show?"
    return render("labelling.html", title=title, cases=cases, total=images, command=command)
