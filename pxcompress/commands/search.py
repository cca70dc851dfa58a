"""`pxcompress search`: the attribution, its ranking and its repair that suit the model which ships."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from pxcompress.commands.options import AsJson, Quiet, takes_recipe
from pxcompress.commands.terminal import notes
from pxcompress.recipe import GOALS, Recipe

UNUSED_IN_SEARCH = (
    "rounds",
    "class_scores",
    "temperature_scaling",
    "targets",
    "against",
    *(goal for goal in GOALS if goal != "ratio"),
    "guarantee",
    "bench",
)
"""Fields of a recipe that have no effect in a search, and so get no option."""


@takes_recipe(without=UNUSED_IN_SEARCH)
def search(
    recipe: Recipe,
    objective: Annotated[
        str,
        typer.Option(
            help="What is maximised on the select split: operating-point (top-1 of the pruned and repaired model at "
            "--ratio), or pxp (mean top-1 over 0 to 95 % of all units masked, without repair)."
        ),
    ] = "operating-point",
    sampler: Annotated[str, typer.Option(help="Optuna's sampler: tpe, gp or random.")] = "tpe",
    trials: Annotated[int, typer.Option(help="Trials in all, over all workers.")] = 50,
    storage: Annotated[
        str,
        typer.Option(
            help="Database in which workers started by the same command share trials: postgresql+psycopg://..., "
            "mysql+pymysql://... or sqlite:///FILE.  [default: a file in --out]"
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the search.  [default: exported/MODEL-BUDGET-RATIO-search]")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Search the scores, ranking and repairs that suit a model best.

    A search that was stopped goes on when the same command is given again. The folder gets search.json, search.html and
    composite.json, for `run --score @FOLDER/composite.json`. Nothing is measured on the test or certify split.
    """
    from pxcompress.columns import align
    from pxcompress.report.summary import format_command
    from pxcompress.search import SearchPlan
    from pxcompress.search import search as run_search
    from pxcompress.search.run import COMPOSITE, HEAD

    place = out or Path("exported") / f"{recipe.label}-search"
    result = run_search(recipe, SearchPlan(objective, sampler, trials, storage), place, notes(quiet))
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=1))
        return
    print("\n".join([*align([HEAD, *result.rows(5)]), "", *result.notes]))
    ships = format_command(recipe.but(scorer=Recipe.scorer, normalise=result.best.normalise))
    print(f"next: {ships} --score {shlex.quote(f'@{place / COMPOSITE}')}")
