"""The command line, put together. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done; 2 the input is wrong; 3 the result failed its own check, or a stage failed; 130 interrupted;
143 terminated.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
import warnings
from typing import Annotated

import typer

from pxcompress import __version__
from pxcompress.commands.bench import bench
from pxcompress.commands.certify import certify
from pxcompress.commands.convert import convert
from pxcompress.commands.doctor import doctor
from pxcompress.commands.explain import explain
from pxcompress.commands.inspect import inspect
from pxcompress.commands.methods import methods
from pxcompress.commands.panels import PanelCommand
from pxcompress.commands.report import report
from pxcompress.commands.run import run
from pxcompress.commands.search import search
from pxcompress.commands.sweep import sweep
from pxcompress.commands.verify import verify
from pxcompress.errors import PxError, StageError
from pxcompress.guard import interrupt, name_failures, terminate

COMMANDS = (run, sweep, search, certify, verify, explain, inspect, bench, convert, report, methods, doctor)

ENDED_BY_SIGNAL = {130: "interrupted", 128 + signal.SIGTERM: "terminated"}
"""Exit codes after signals, Ctrl-C's the same as Typer's, and what is said."""

app = typer.Typer(
    name="pxcompress",
    help="Make trained vision models physically smaller: attribution, structured pruning, repair, ONNX, proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in COMMANDS:
    app.command(cls=PanelCommand)(command)


def _show_version(is_asked_for: bool) -> None:
    if is_asked_for:
        print(f"pxcompress {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the full trace of a failure.")] = False,
) -> None:
    """Options that come before the command."""


def main() -> None:
    """Run the command line and exit; one line on stderr for every error, with `--debug` its trace before it."""
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)
    _open_closed_streams()
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")  # Pillow's, of large images
    debug = "--debug" in sys.argv[1:]
    if debug:  # also behind the command, where it is added to what has just failed
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    try:
        with name_failures("the command"):
            app()
    except (PxError, OSError) as error:
        if debug:
            traceback.print_exception(error)
        message, code = _describe_error(error)
        hint = "" if debug or not isinstance(error, StageError) else " (--debug shows where)"
        print(f"pxcompress: {message}{hint}", file=sys.stderr)
        sys.exit(code)
    except SystemExit as stop:
        if stop.code in ENDED_BY_SIGNAL:
            words = "no result was written; trials of a search and steps of a training are kept for the next time"
            print(f"pxcompress: {ENDED_BY_SIGNAL[stop.code]}; {words}", file=sys.stderr)
        raise


def _open_closed_streams() -> None:
    """Let what is printed go nowhere where the shell has closed stdout or stderr (`>&-`), which Python sets to None.

    A character that the terminal's encoding lacks is printed as "?", instead of ending the command.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _describe_error(error: PxError | OSError) -> tuple[str, int]:
    """The one line that the user reads about an error, and the exit code."""
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename or 'while writing'}; nothing was written", 2
    if isinstance(error.__cause__, (MemoryError, RuntimeError)):
        from pxcompress.passes.memory import is_out_of_memory, out_of_memory

        if is_out_of_memory(error.__cause__) and isinstance(error, StageError):
            error = out_of_memory("this command", error.__cause__)
    return str(error), error.exit_code
