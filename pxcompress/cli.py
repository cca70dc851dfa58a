"""The command line, put together. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done; 1 a defect of ours; 2 the input is wrong; 3 the result failed its own check; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Annotated

import typer

from pxcompress import __version__
from pxcompress.commands.bench import bench
from pxcompress.commands.certify import certify
from pxcompress.commands.doctor import doctor
from pxcompress.commands.explain import explain
from pxcompress.commands.inspect import inspect
from pxcompress.commands.methods import methods
from pxcompress.commands.report import report
from pxcompress.commands.run import run
from pxcompress.commands.search import search
from pxcompress.commands.sweep import sweep
from pxcompress.commands.verify import verify
from pxcompress.errors import PxError
from pxcompress.interrupts import interrupt

COMMANDS = (run, sweep, search, certify, verify, explain, inspect, bench, report, methods, doctor)

INTERRUPTED = 130
"""What Typer exits with after Ctrl-C."""

app = typer.Typer(
    name="pxcompress",
    help="Make trained vision models physically smaller: attribution, structured pruning, repair, ONNX, proof.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in COMMANDS:
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pxcompress {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options that come before the command."""


def main() -> None:
    """Run the command line and exit; one line on stderr for every error that is not ours."""
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")  # Pillow's, of large images
    try:
        app()
    except PxError as error:
        print(f"pxcompress: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("pxcompress: interrupted; no result was written", file=sys.stderr)
        raise
    except (MemoryError, RuntimeError) as error:
        from pxcompress.passes.memory import is_out_of_memory, out_of_memory

        if not is_out_of_memory(error):
            raise
        known = out_of_memory("this command", error)
        print(f"pxcompress: {known}", file=sys.stderr)
        sys.exit(known.exit_code)
    except OSError as error:
        if error.errno is None:
            raise
        print(
            f"pxcompress: {error.strerror}: {error.filename or 'while writing'}; nothing was written", file=sys.stderr
        )
        sys.exit(2)
