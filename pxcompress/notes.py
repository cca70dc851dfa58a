"""Messages about progress: who wants them takes lines of text."""

from __future__ import annotations

from collections.abc import Callable

Note = Callable[[str], None]

LIVE = "\r"
"""What a message begins with that is worth nothing once the next one is there: only a terminal shows it."""


def silent(message: str) -> None:
    """Progress that nobody reads."""
