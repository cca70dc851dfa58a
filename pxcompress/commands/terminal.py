"""Where results and progress go."""

from __future__ import annotations

import atexit
import sys

from pxcompress.notes import Message, Note, silent


def show(result: str) -> None:
    """Print a result; on a terminal, long lines are wrapped between words."""
    if not sys.stdout.isatty():
        print(result)
        return
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False).print(Text(result))


def notes(quiet: bool) -> Note:
    """The function that receives progress messages: it drops them if `quiet`, else shows a live line or writes a
    log.
    """
    if quiet:
        return silent
    return _make_live_line() if sys.stderr.isatty() else _log


def _make_live_line() -> Note:
    """A function that shows progress in a line with a bar at the bottom of the terminal, and other messages above
    it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    text, console = TextColumn("{task.description}", markup=False), Console(stderr=True, highlight=False)
    columns = SpinnerColumn(), text, BarColumn(20), TimeRemainingColumn(compact=True)
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task("")
    atexit.register(progress.stop)  # it hides the cursor

    def note(message: str) -> None:
        kind = message.kind if isinstance(message, Message) else ""
        if kind == "begin":
            progress.reset(task, total=None, description=message)
            progress.start()
        elif isinstance(message, Message) and kind == "count":
            progress.update(task, completed=message.done, total=message.total)
        else:
            if kind == "end":
                progress.stop()
            console.print(message, style="dim", markup=False)

    return note


def _log(message: str) -> None:
    """Write a message as a line of the log; progress counts, meant for a terminal only, are left out."""
    if not (isinstance(message, Message) and message.kind == "count"):
        print(message, file=sys.stderr, flush=True)
