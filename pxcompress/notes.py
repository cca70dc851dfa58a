"""Messages about progress: who wants them takes lines of text, a terminal also their kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Note = Callable[[str], None]


class Message(str):
    """A line about progress. It begins something that takes a while, ends it, or counts `done` of `total` batches."""

    kind: Literal["begin", "end", "count"]
    done: int
    total: int

    def __new__(cls, text: str, kind: Literal["begin", "end", "count"], done: int = 0, total: int = 0) -> Message:
        """The line `text` with what it says of progress."""
        message = super().__new__(cls, text)
        message.kind, message.done, message.total = kind, done, total
        return message


def begin(text: str) -> Message:
    """The message that something begins which takes a while."""
    return Message(f"{text} ...", "begin")


def silent(message: str) -> None:
    """Progress that nobody reads."""
