"""From the trials of a search to the rows of search.json. Pure functions of what the storage holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from pxcompress.recipe import Recipe
from pxcompress.search.study import ERROR, JOB

Row = Mapping[str, Any]

CHOICE = ("scorer", "normalise", "repair", "ratio")
"""Fields of a recipe that a search chooses."""

RECIPE, POINTS, SAME = "recipe", "points", "same_as"
"""Under which a trial says them, what it measured, and whose measurement it took over."""

LEAST_FOR_IMPORTANCES = 8
"""Finished trials."""


def choice_of(recipe: Recipe) -> dict[str, Any]:
    """What a search chooses of a recipe, as JSON holds it."""
    return {name: list(value) if isinstance(value := getattr(recipe, name), tuple) else value for name in CHOICE}


def recipe_of(choice: Row, recipe: Recipe) -> Recipe:
    """`recipe` with a choice that `choice_of` made; other keys do not count."""
    return recipe.but(**{name: tuple(v) if isinstance(v := choice[name], list) else v for name in CHOICE})


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were measured to the end."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def rows_of(study: optuna.Study) -> list[dict[str, Any]]:
    """One row a job, by job; of a job that was begun several times the last one. `cost` is None without a front."""
    rows = {}
    for trial in study.get_trials(deepcopy=False):
        known = trial.user_attrs
        if JOB not in known or RECIPE not in known:
            continue
        value, cost = (*(trial.values or ()), None, None)[:2]
        row = {"job": known[JOB], "state": trial.state.name.lower(), **known[RECIPE]}
        row |= {"value": value, "cost": cost, "points": known.get(POINTS, [])}
        row |= {"seconds": trial.duration.total_seconds() if trial.duration else None, "error": known.get(ERROR, "")}
        rows[known[JOB]] = row | {"same_as": known.get(SAME), "parameters": dict(trial.params)}
    return [rows[job] for job in sorted(rows)]


def leaders(rows: Sequence[Row], count: int) -> Iterator[Row]:
    """The best `count` of different choices that were measured to the end."""
    seen: list[Any] = []
    for row in sorted((row for row in rows if row["state"] == "complete"), key=lambda row: -row["value"]):
        choice = [row[name] for name in CHOICE]
        if choice not in seen and len(seen) < count:
            seen.append(choice)
            yield row


def front(rows: Sequence[Row]) -> list[Row]:
    """Those that no other one beats in both value and cost (Pareto), the cheapest first."""
    found: list[Row] = []
    priced = [row for row in rows if row["value"] is not None and row["cost"] is not None]
    for row in sorted(priced, key=lambda row: (row["cost"], -row["value"])):
        if not found or row["value"] > found[-1]["value"]:
            found.append(row)
    return found


def importances(study: optuna.Study) -> dict[str, float]:
    """How much each parameter matters (PED-ANOVA), the greatest first; nothing where trials are few or all alike."""
    known = finished(study)
    if len(known) < LEAST_FOR_IMPORTANCES or len({trial.values[0] for trial in known}) < 2:
        return {}
    alone = optuna.create_study(direction="maximize")
    for each in known:  # of a front's two values the first, which is the one to explain
        alone.add_trial(create_trial(params=each.params, distributions=each.distributions, value=each.values[0]))
    found = optuna.importance.get_param_importances(alone)
    return {name: float(value) for name, value in found.items()}
