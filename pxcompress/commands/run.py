"""`pxcompress run`: the main command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pxcompress.commands.options import AsJson, Force, Quiet, takes_recipe
from pxcompress.commands.terminal import notes, show
from pxcompress.errors import ResultError
from pxcompress.recipe import Recipe


@takes_recipe()
def run(
    recipe: Recipe,
    out: Annotated[
        Path | None, typer.Option(help="Folder for models and report.  [default: exported/MODEL-BUDGET-RATIO]")
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune, repair, export and measure a model; write a report.

    With --max-drop, models up to --ratio smaller are tested, and the smallest that passes is the result. If none
    passes, the folder holds the dense model, and the exit code is 3.
    """
    from pxcompress.pipeline import compress_in_process
    from pxcompress.processes import join_processes
    from pxcompress.report.build import to_json
    from pxcompress.report.table import to_table

    with join_processes():
        report = compress_in_process(recipe, out, force=force, note=notes(quiet))
    if report is None:  # in a process that is not the first
        return
    if as_json:
        print(to_json(report))
    else:
        show(to_table(report))
    if report.missed:
        raise ResultError(f"the goal is missed: {report.missed}; ask for less speed, or measure on a quiet machine")
    if report.certificate is not None and not report.certificate.chosen:
        raise ResultError(f"not certified: no smaller model passes; the dense one is in {report.folder}")
