"""`pxcompress search`: the attribution, its ranking and its repair that suit the model which ships."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from pxcompress.commands.options import AsJson, Quiet, takes_recipe
from pxcompress.commands.terminal import notes
from pxcompress.recipe import Recipe

WITHOUT = (
    "rounds",
    "class_scores",
    "targets",
    "speedup",
    "latency_ms",
    "max_bytes",
    "relevance_share",
    "guarantee",
    "bench",
)
"""Parts of a recipe that a search has no use for."""


@takes_recipe(without=WITHOUT)
def search(
    recipe: Recipe,
    objective: Annotated[
        str,
        typer.Option(
            help="What is maximised on the select split: operating-point (top-1 of the pruned and repaired model at "
            "--ratio), curve (area under top-1 over --ratios), explained (operating-point, less what heatmaps lack of "
            "a cosine of 0.9 to the dense model's), or pxp (mean top-1 over 0 to 95 % of all units masked, without "
            "repair)."
        ),
    ] = "operating-point",
    sampler: Annotated[str, typer.Option(help="tpe, gp, random or grid.")] = "tpe",
    trials: Annotated[int, typer.Option(help="Trials in all, over all workers.")] = 50,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which this worker begins no more trials; the best are still repaired in full and "
            "compared.  [default: no limit]"
        ),
    ] = None,
    storage: Annotated[
        str,
        typer.Option(
            help="Where workers share trials: the same command started several times with one database URL "
            "(postgresql://..., mysql+pymysql://..., sqlite:///...), or journal:PATH.  [default: a file in --out]"
        ),
    ] = "",
    ratios: Annotated[
        str,
        typer.Option(help="Of objective curve, or of --pareto: such as 0.3,0.5,0.7.  [default: four steps to --ratio]"),
    ] = "",
    space: Annotated[
        str,
        typer.Option(help="full, or pxp: four rules by depth and |R| or R.  [default: pxp for its objective]"),
    ] = "",
    pareto: Annotated[
        str,
        typer.Option(
            help="Minimise this beside the objective, over --ratios, and show the front: channels, params, macs, "
            "bytes or latency."
        ),
    ] = "",
    full_trials: Annotated[
        bool,
        typer.Option(
            "--full-trials",
            help="Give every trial all repairs; without it least-squares and finetune are for the best ones.",
        ),
    ] = False,
    no_labels: Annotated[
        bool, typer.Option("--no-labels", help="Judge by the KL divergence from the dense model, not by top-1.")
    ] = False,
    start: Annotated[
        Path | None, typer.Option("--from", help="Begin with the choice in this composite.json, of any model.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the search.  [default: exported/MODEL-BUDGET-RATIO-search]")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Search rules, score, ranking and repair for the model that ships; killed and started again, it goes on.

    The folder gets composite.json (for `run --score @...`; with --pareto front-1.json ... as well), search.json and
    search.html. Nothing is measured on the test or certify split. Started several times with one --storage, the workers
    share the trials.
    """
    from pxcompress.report.search import search_table
    from pxcompress.search import COMPOSITE, SearchPlan, read_start
    from pxcompress.search import search as run_search

    plan = SearchPlan(
        objective=objective,
        sampler=sampler,
        trials=trials,
        timeout=math.inf if timeout is None else timeout,
        storage=storage,
        ratios=ratios,
        space=space,
        labels=not no_labels,
        start={} if start is None else read_start(start),
        pareto=pareto,
        full_trials=full_trials,
    )
    place = out or Path("exported") / f"{recipe.label}-search"
    note = notes(quiet)
    try:
        content = run_search(recipe, plan, place, note)
    except (KeyboardInterrupt, SystemExit):
        note("all finished trials are kept: the same command goes on from there")
        raise
    print(json.dumps(content, indent=1) if as_json else search_table(content, str(place / COMPOSITE)))
