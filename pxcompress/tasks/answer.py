"""A model's answer for one sample: words for a reader, and boxes or regions to draw on its image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

MOST_PARTS = 6
"""Most parts of an answer that are listed."""


@dataclass(frozen=True, eq=False)
class Answer:
    """A model's answer for one sample in `words`; a class has its `probability`.

    `boxes` (k, 4) are corners in pixels of the input, with a class and a name each; `regions` (height, width) has the
    class of every pixel.
    """

    words: str
    probability: float | None = None
    boxes: Tensor | None = None
    classes: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    regions: Tensor | None = None


def list_parts(parts: Iterable[str], otherwise: str) -> str:
    """The first `MOST_PARTS` parts of an answer, and how many more there are; `otherwise` if there are none."""
    texts = [*parts]
    more = [f"{len(texts) - MOST_PARTS} more"] if len(texts) > MOST_PARTS else []
    return ", ".join([*texts[:MOST_PARTS], *more]) or otherwise


def name_class(classes: Sequence[str], number: int) -> str:
    """The name of a class, or its number where it has none."""
    return classes[number] if number < len(classes) else str(number)
