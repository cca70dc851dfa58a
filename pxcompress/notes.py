"""Messages about progress: who wants them takes lines of text."""

from __future__ import annotations

from collections.abc import Callable

Note = Callable[[str], None]

LIVE = "\r"
"""Prefix of transient progress messages, which the next one overwrites; only a terminal shows them."""


def silent(message: str) -> None:
    """Progress that nobody reads."""
