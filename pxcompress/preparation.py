"""What comes before all scores, once for a run, a sweep or a search: model -> groups -> prices -> rotated streams."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from pxcompress.cost.count import list_uncounted
from pxcompress.directions import rotate_streams_
from pxcompress.errors import BudgetError
from pxcompress.graph import make_prunable, own_all_norms
from pxcompress.passes.memory import in_smaller_batches
from pxcompress.planning.plan import check_reachable
from pxcompress.recipe import Goal
from pxcompress.run import Run
from pxcompress.state import seeded
from pxcompress.types import Price, ScoredModel, Structure

REASONS = 3
"""Most reasons that a message lists for a model without removable units."""


def prepare(model: nn.Module, example: Tensor, run: Run) -> tuple[ScoredModel, Run]:
    """All work before scoring: groups, what their units cost, and rotated streams. Raises `BudgetError`.

    The model that comes back, a copy where streams are rotated, has no scores yet. The run that comes back caches its
    moments.
    """
    recipe, clock = run.recipe, run.clock
    with clock.stage("find groups"):
        model, structure = _find_structure(model, example, recipe)
        _check_removable(structure)
    with clock.stage(f"price ({recipe.budget})"):
        price = Price(recipe.budget, run.budget.unit, run.budget.meter(model, structure.groups, example))
        ratio = 0.0
        if recipe.relevance_share is None:
            ratio = recipe.share(price({}))
            check_reachable(structure.groups, price, ratio, recipe.limits)
        for operator, modules in list_uncounted(model, example).items():
            remainder = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
            clock.add_note(
                f"{operator}, in {modules[0]}{remainder}, counts as 0 MACs: nothing is known of what it multiplies"
            )
    if any(group.kind == "direction" for group in structure.groups):
        with clock.stage("rotate streams"), seeded(recipe.seed):
            in_smaller_batches(partial(rotate_streams_, model, structure.groups), run.parts["score"], clock.say)
    return ScoredModel(model, example, structure, {}, price, ratio), run.with_moment_caches(model)


def _find_structure(model: nn.Module, example: Tensor, goal: Goal) -> tuple[nn.Module, Structure]:
    """A copy of `model` in which streams that may lose directions are rotated, and all groups that may be pruned."""
    rotated, structure = make_prunable(model, example)
    structure = goal.selection.of(structure, rotated)
    streams = {group.name: group for group in structure.groups if group.kind == "direction"}
    if own_all_norms(rotated, streams.values()):
        return rotated, structure
    chosen = {group.name for group in structure.groups}
    rotated, again = make_prunable(model, example, streams, prove=False)
    return rotated, replace(structure, groups=tuple(group for group in again.groups if group.name in chosen))


def _check_removable(structure: Structure) -> None:
    """Raise `BudgetError`, with reasons, if nothing can be removed."""
    if structure.groups:
        return
    reasons = {layer.reason: layer.name for layer in reversed(structure.fixed)}
    reasons_text = "; ".join(f"{name}: {reason}" for reason, name in list(reversed(reasons.items()))[:REASONS])
    raise BudgetError(
        f"the model has no removable units: {reasons_text or 'no convolution or linear layer runs'}; see inspect"
    )
