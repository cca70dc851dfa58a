"""Progress messages: lines of text that also say what kind of progress they are, for display on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Note = Callable[[str], None]


class Message(str):
    """A line about progress: that something begins or ends, or that `done` of `total` batches are done."""

    kind: Literal["begin", "end", "count"]
    done: int
    total: int

    def __new__(cls, text: str, kind: Literal["begin", "end", "count"], done: int = 0, total: int = 0) -> Message:
        """Make a message from a line of text, its kind and its counts."""
        message = super().__new__(cls, text)
        message.kind, message.done, message.total = kind, done, total
        return message


def begin(text: str) -> Message:
    """A message that a longer step begins."""
    return Message(f"{text} ...", "begin")


def silent(message: str) -> None:
    """Ignore a progress message."""
