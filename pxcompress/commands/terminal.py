"""Where results and progress go."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable

from pxcompress.notes import LIVE


def show(result: str) -> None:
    """Print a result: on a terminal, lines that are too long go on in the next one between words."""
    if not sys.stdout.isatty():
        print(result)
        return
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False).print(Text(result))


def notes(quiet: bool) -> Callable[[str], None]:
    """Where progress goes: nowhere, to a live line on a terminal, or as plain lines into a log."""
    if quiet:
        return lambda message: None
    if not sys.stderr.isatty():
        return _log
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, highlight=False)
    status, stage = console.status(""), ""
    atexit.register(status.stop)  # it hides the cursor

    def note(message: str) -> None:
        nonlocal stage
        if message.startswith(LIVE):
            status.update(escape(f"{stage} {message.removeprefix(LIVE)}"))
        elif message.endswith(" ..."):
            stage = message
            status.update(escape(message))
            status.start()
        else:
            if message.startswith(f"{stage.removesuffix(' ...')}: "):
                status.stop()
            console.print(message, style="dim", markup=False)

    return note


def _log(message: str) -> None:
    """A line of a log; what only a terminal shows is left out."""
    if not message.startswith(LIVE):
        print(message, file=sys.stderr, flush=True)
