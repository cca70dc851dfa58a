"""Model -> groups -> prices -> scores -> plan -> pruned -> repaired: the stages of a run that need no files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from pxcompress.attribution.class_relevance import class_relevance, guarded
from pxcompress.clock import Clock
from pxcompress.deploy.answers import torch_accuracy
from pxcompress.errors import BudgetError, ResultError
from pxcompress.graph import REMOVAL_TOLERANCE, Branches, find_branches, find_groups, prune, removal_error
from pxcompress.models.loading import classifier_names
from pxcompress.passes.memory import in_smaller_batches
from pxcompress.planning.dead_paths import without_dead_paths
from pxcompress.planning.fit import fitted
from pxcompress.planning.limits import Limits
from pxcompress.planning.plan import check_reachable, make_plan
from pxcompress.planning.rounds import after_step, groups_left, prune_further, ratios_of, spread, step_of
from pxcompress.planning.selection import Selection
from pxcompress.planning.stop_rule import plan_by_share
from pxcompress.planning.swaps import divergence, swapped_plan
from pxcompress.processes import from_first, same_weights_
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.state import seeded
from pxcompress.types import (
    Attempt,
    Batches,
    ClassRelevance,
    FileBudget,
    Group,
    Plan,
    Price,
    Pruned,
    Repair,
    Scored,
    Scores,
    Slim,
    Structure,
)

REASONS = 3
"""Reasons that a message names where a model has nothing to remove."""


def shrink(model: nn.Module, example: Tensor, run: Run) -> Slim:
    """Find, score, plan, prune, repair: the part of a run that needs neither files nor ONNX.

    `example` is one input, shape (1, ...). Raises `BudgetError` where no plan reaches the ratio, `ResultError` where
    removal is not what zeroing is.
    """
    return plan_and_cut(score(model, example, run), run)


def plan_and_cut(scored: Scored, run: Run, *, on_file: bool = False) -> Slim:
    """Plan, prune and repair what was scored, in the recipe's rounds.

    With `on_file` a plan for a budget that only files tell is corrected until its exported file fits; it then takes
    one process and one round.
    """
    recipe, clock = run.recipe, run.clock
    first, *later = ratios_of(scored.ratio, recipe.rounds)
    attempts: tuple[Attempt, ...] = ()
    with clock.stage("plan"):
        if on_file and isinstance(run.budget, FileBudget) and recipe.relevance_share is None:
            plans = partial(plan_at, scored, recipe=recipe)
            plan, attempts = fitted(scored, plans, run.budget, recipe.limit, recipe.onnx_batch)
        else:
            plan = from_first(plan_at(scored, first, recipe))
    if recipe.drop_branches:
        gone = [
            group.name for group in scored.structure.groups if group.name in scored.branches and not plan.kept(group)
        ]
        clock.remark(f"--drop-branches: of {len(scored.branches)} branches these go: {', '.join(gone) or 'none'}")
    slim = cut(scored, plan, run)
    for ratio in later:
        slim = cut_further(scored, slim, ratio, run)
    return replace(slim, attempts=attempts)


def priced(model: nn.Module, example: Tensor, run: Run) -> Scored:
    """The groups and what their units cost, without scores. Raises `BudgetError`."""
    recipe, clock = run.recipe, run.clock
    with clock.stage("find groups"):
        found = find_groups(model, example, classifier_names(model, example))
        structure = Selection(recipe.only, recipe.keep, recipe.scope, recipe.floors).of(found, model)
        _check_removable(structure)
    branches: Branches = {}
    if recipe.drop_branches:
        with clock.stage("find branches"):
            branches = find_branches(model, structure.groups, example)
    with clock.stage(f"price ({recipe.budget})"):
        price = Price(recipe.budget, run.budget.unit, run.budget.meter(model, structure.groups, example))
        ratio = 0.0
        if recipe.relevance_share is None:
            ratio = recipe.share(price({}))
            check_reachable(structure.groups, price, ratio, _limits(recipe, branches))
    return Scored(model, example, structure, {}, price, ratio, branches=branches)


def _check_removable(structure: Structure) -> None:
    """Raise `BudgetError`, with reasons, where nothing can be removed."""
    if structure.groups:
        return
    reasons = {layer.reason: layer.name for layer in reversed(structure.fixed)}
    listed = "; ".join(f"{name}: {reason}" for reason, name in list(reversed(reasons.items()))[:REASONS])
    raise BudgetError(
        f"the model has no removable units: {listed or 'no convolution or linear layer runs'}; see inspect"
    )


def score(model: nn.Module, example: Tensor, run: Run) -> Scored:
    """Find the groups, and say what their units are worth and cost, once for all ratios. Raises `BudgetError`."""
    recipe, clock = run.recipe, run.clock
    scored = priced(model, example, run)
    groups = scored.structure.groups
    with clock.stage(f"score ({recipe.scorer})"):
        scores = unit_scores(model, groups, run)
        scored = replace(scored, scores=scores)
    if not (recipe.class_scores or recipe.class_guard):
        return scored
    with clock.stage("class scores"):
        relevance = in_smaller_batches(partial(class_relevance, model, groups), run.parts["score"], clock.say)
    return replace(scored, scores=_guarded(scores, relevance, recipe), class_relevance=relevance)


def _guarded(scores: Scores, relevance: ClassRelevance | None, recipe: Recipe) -> Scores:
    """`scores`, raised for what single classes rest on where the recipe asks for that."""
    return guarded(scores, relevance) if recipe.class_guard and relevance else scores


def unit_scores(model: nn.Module, groups: Sequence[Group], run: Run) -> Scores:
    """What the run's scorer says of every group; `ResultError` where it is no number.

    What a scorer draws depends on the recipe's seed alone.
    """
    with seeded(run.recipe.seed):
        scores = in_smaller_batches(partial(run.scorer, model, groups), run.parts["score"], run.clock.say)
    for name, values in scores.items():
        if not values.isfinite().all():
            raise ResultError(
                f"scorer {run.recipe.scorer!r} gives NaN or infinity for units of {name!r}; use another one"
            )
    return scores


def plan_at(scored: Scored, ratio: float, recipe: Recipe) -> Plan:
    """What to remove at `ratio`, or by the recipe's share of relevance. Raises `BudgetError`."""
    groups, limits = scored.structure.groups, _limits(recipe, scored.branches)
    if recipe.relevance_share is not None:
        return plan_by_share(groups, scored.scores, scored.price, recipe.relevance_share, limits)
    return make_plan(groups, scored.scores, scored.price, ratio, limits)


def cut(scored: Scored, plan: Plan, run: Run) -> Slim:
    """Carry out `plan`, refined, and repair the result; the dense model is left as it was. Raises as `shrink` does."""
    plan = _refined(scored.model, scored.structure.groups, plan, run)
    with run.clock.stage("prune"):
        pruned = prune(scored.model, scored.structure.groups, plan, scored.example)
        _check_removal(pruned, scored.example)
    return _slim(scored, _repaired(scored, pruned, run))


def cut_further(scored: Scored, slim: Slim, ratio: float, run: Run) -> Slim:
    """One more round: score what is left in `slim`, remove up to `ratio` of the dense cost, repair. Changes `slim`."""
    recipe, clock, before = run.recipe, run.clock, slim.pruned
    with clock.stage(f"score again ({recipe.scorer})"):
        left = groups_left(before)
        scores = _guarded(spread(unit_scores(before.model, left, run), before), scored.class_relevance, recipe)
    with clock.stage("plan"):
        plan = from_first(plan_at(replace(scored, scores=scores), ratio, recipe))
    step = _refined(before.model, left, step_of(before, plan), run)
    with clock.stage("prune"):
        pruned = prune_further(before, left, after_step(before, step), scored.example)
        _check_removal(pruned, scored.example)
    return replace(slim, pruned=_repaired(scored, pruned, run))


def _refined(model: nn.Module, groups: Sequence[Group], plan: Plan, run: Run) -> Plan:
    """`plan`, which removes units of `groups`, after the search around it that the recipe asks for.

    What the search found on the score samples has to hold on others, or `plan` stays.
    """
    refine = run.recipe.refine
    if refine == "none":
        return plan
    with run.clock.stage(f"refine ({refine})"):
        found = from_first(swapped_plan(model, groups, plan, run.parts["score"], run.scorer))
        if found.removed == plan.removed:
            return plan
        before, after = (_changed_by(model, groups, each, run) for each in (plan, found))
        kept = from_first(after < before)
        run.clock.remark(
            f"--refine {refine}: {'kept' if kept else 'not kept'}; on samples not searched on the KL divergence "
            f"from the dense model goes from {before:.3g} to {after:.3g}"
        )
        return found if kept else plan


def _changed_by(model: nn.Module, groups: Sequence[Group], plan: Plan, run: Run) -> float:
    """By how much `plan` changes the predictions after the repairs in closed form; training would take too long."""
    held_out = run.held_out or run.parts["repair"]
    pruned = prune(model, groups, plan, next(iter(run.parts["score"]))[0][:1])
    for repair in run.repairs.values():
        if repair.phase != "train":
            pruned = repair(pruned, run.parts["repair"], held_out)
    return divergence(model, pruned.model, held_out)


def _repaired(scored: Scored, pruned: Pruned, run: Run) -> Pruned:
    """All repairs in order, then the dead paths that are left go too; beside the dense model."""
    _accuracy(pruned, run)
    for text, repair in run.repairs.items():
        with run.clock.stage(text):
            pruned = _after(repair, pruned, run)
        _accuracy(pruned, run)
    same_weights_(pruned.model)
    with run.clock.stage("clean up"):
        return without_dead_paths(pruned.whole, scored.example, scored.price, _limits(run.recipe))


def _after(repair: Repair, pruned: Pruned, run: Run) -> Pruned:
    """`pruned` with a copy of its model repaired, in smaller batches where memory asks for them.

    What fails half-way has changed its copy only.
    """

    def attempt(fit: Batches, check: Batches) -> Pruned:
        model = copy.deepcopy(pruned.model)
        first = pruned.first and replace(pruned.first, model=model)
        return repair(replace(pruned, model=model, first=first), fit, check)

    least = getattr(repair, "smallest", 1)
    return in_smaller_batches(attempt, run.parts["repair"], run.clock.say, run.held_out, least=least)


def ever_smaller(scored: Scored, ratios: Sequence[float], run: Run) -> Iterator[Slim]:
    """Ever smaller models, from the dense one on, each cut and repaired by itself when it is asked for.

    The plans are all made before. Ratios that lead to the same widths give one model; each is one stage of the clock,
    and with "select" among the parts its top-1 is measured. Raises as `shrink` does.
    """
    with run.clock.stage("plan"):  # from the largest ratio on, so that an impossible one is named as it was asked for
        plans = [plan_at(scored, ratio, run.recipe) for ratio in sorted(ratios, reverse=True)]
    distinct = {plan.cost_planned: plan for plan in plans if plan.cost_planned < plan.cost_dense}
    return _cuts(scored, list(reversed(distinct.values())), run)


def _cuts(scored: Scored, plans: Sequence[Plan], run: Run) -> Iterator[Slim]:
    price = scored.price
    nothing = Plan({}, price.budget, price.unit, price({}), price({}), price({}))
    yield _slim(scored, prune(scored.model, scored.structure.groups, nothing, scored.example))
    for plan in plans:
        with run.clock.stage(f"cut {1 - plan.cost_planned / plan.cost_dense:.1%} of the {plan.unit}"):
            slim = cut(scored, plan, run.unheard())
        _accuracy(slim.pruned, run)
        yield slim


def _slim(scored: Scored, pruned: Pruned) -> Slim:
    return Slim(scored.structure, scored.scores, pruned, scored.class_relevance)


def _limits(recipe: Recipe, branches: Branches | None = None) -> Limits:
    floors = Selection(floors=recipe.floors).least
    return Limits(recipe.normalise, recipe.round_to or 1, recipe.min_keep, floors, branches or {})


def _accuracy(pruned: Pruned, run: Run) -> None:
    if run.clock.measures and "select" in run.parts:
        run.clock.accuracy(top1_of(pruned.model, run.parts["select"], run.clock))


def top1_of(model: nn.Module, batches: Batches, clock: Clock) -> float:
    """Top-1 of the PyTorch model, a share in [0, 1]; in smaller batches where memory asks for them."""
    return in_smaller_batches(partial(torch_accuracy, model), batches, clock.say)


def _check_removal(pruned: Pruned, example: Tensor) -> None:
    """Refuse a model in which removing units does something else than zeroing them."""
    error = removal_error(pruned, example)
    if not error <= REMOVAL_TOLERANCE:
        raise ResultError(
            f"removing units changed the model: its logits differ by {error:.1e} of their scale from the dense model's "
            f"with the same units zeroed (at most {REMOVAL_TOLERANCE:.0e} expected); please report the architecture"
        )
