"""Finds a plan for budgets that only an exported file shows: plan, prune, export, measure, correct, until it fits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pxcompress.deploy.export import ANY_BATCH, export_onnx
from pxcompress.errors import BudgetError
from pxcompress.graph import prune, restore_layer_norms
from pxcompress.types import Attempt, FileBudget, OpenAxes, Plan, ScoredModel

ATTEMPTS = 4
AIM = 0.98
CLOSE_ENOUGH = 0.93
"""An attempt that costs at least this share of the allowed cost is accepted; below it, more units could stay."""


def fit_to_file(
    scored: ScoredModel,
    plan_of: Callable[[float], Plan],
    budget: FileBudget,
    limit: float | None = None,
    axes: OpenAxes = ANY_BATCH,
) -> tuple[Plan, tuple[Attempt, ...]]:
    """The plan whose exported file costs just less than allowed, and all attempts.

    `plan_of` gives the plan that removes a share of the dense cost; it is called with `scored.ratio` first. The file
    may cost `limit`, in the budget's unit, or if there is none the dense file's own cost less the same share. For a
    later attempt the predicted cost is multiplied by measured / predicted of the attempt before. Nothing is repaired:
    what a file costs does not depend on the values of its weights. Files have open `axes`. Raises `BudgetError` where
    no attempt fits.
    """
    ratio, factor = scored.ratio, 1.0
    attempts: list[Attempt] = []
    plans: list[Plan] = []
    with tempfile.TemporaryDirectory() as folder:
        dense = _measure_exported(scored, Plan({}, "", "", 0.0, 0.0, 0.0), Path(folder) / "dense.onnx", axes)
        while len(attempts) < ATTEMPTS and ratio < 1:
            try:
                plan = plan_of(ratio)
            except BudgetError:
                if not attempts:
                    raise
                break
            if plan.removed in [earlier.removed for earlier in plans]:
                break
            slim = _measure_exported(scored, plan, Path(folder) / f"{len(attempts)}.onnx", axes)
            of_dense, cost = budget.measure_files([dense, slim], scored.example)
            allowed_cost = (1 - scored.ratio) * of_dense if limit is None else limit
            plans.append(plan)
            attempts.append(Attempt(factor * plan.cost_planned, cost, allowed_cost))
            if CLOSE_ENOUGH * allowed_cost <= cost <= allowed_cost * (1 + budget.tolerance):
                break
            factor = cost / plan.cost_planned
            ratio = max(1 - AIM * allowed_cost / (factor * plan.cost_dense), ratio / 3)
    place = choose_attempt(attempts, budget.tolerance)
    if place is None:
        raise BudgetError(_describe_miss(attempts, budget.unit))
    return plans[place], tuple(attempts)


def choose_attempt(attempts: Sequence[Attempt], tolerance: float) -> int | None:
    """Index of the costliest attempt that fits; cost up to `tolerance` (a share) above the limit counts.

    None if no attempt fits.
    """
    fitting_places = [place for place, each in enumerate(attempts) if each.measured <= each.allowed * (1 + tolerance)]
    return max(fitting_places, key=lambda place: attempts[place].measured / attempts[place].allowed, default=None)


def _measure_exported(scored: ScoredModel, plan: Plan, path: Path, axes: OpenAxes) -> Path:
    slim = restore_layer_norms(prune(scored.model, scored.structure.groups, plan))
    export_onnx(slim.model, scored.example, path, {}, axes=axes)
    return path


def _describe_miss(attempts: Sequence[Attempt], unit: str) -> str:
    costs = ", ".join(f"{attempt.measured:.4g}" for attempt in attempts)
    return f"no file fits: {attempts[-1].allowed:.4g} {unit} are allowed, measured were {costs}; ask for a little more"
