"""`pxcompress sweep`: many ratios at once, to choose one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pxcompress.commands.options import AsJson, Force, Quiet, takes_recipe
from pxcompress.commands.terminal import notes
from pxcompress.errors import InputError
from pxcompress.recipe import GOALS, Recipe

EXPORT = ("max_quant_drop", "fixed_batch", "dynamic_size")
"""Fields of a recipe that only matter for exported files, and so get no option here."""


@takes_recipe(
    without=(
        *GOALS,
        "guarantee",
        "rounds",
        "targets",
        "against",
        "class_scores",
        "temperature_scaling",
        *EXPORT,
    ),
    ratio=0.5,
)
def sweep(
    recipe: Recipe,
    ratios: Annotated[
        str, typer.Option(help="Which shares of the model's cost to remove, with commas; see --budget.")
    ] = ("0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"),
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.  [default: exported/MODEL-BUDGET-sweep]")
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show how good a model stays at many pruning ratios.

    Units are scored once; nothing is exported. --out gets a table, JSON, CSV and a picture.
    """
    from pxcompress.sweep import sweep as measure
    from pxcompress.sweep import to_json, to_table

    try:
        shares = [float(part) for part in ratios.split(",")]
    except ValueError:
        raise InputError(f"ratios is {ratios!r}; expected shares with commas, such as 0.3,0.5,0.7") from None
    result = measure(recipe, shares, out, force=force, note=notes(quiet))
    print(to_json(result) if as_json else to_table(result))
