"""Model -> groups -> prices -> scores -> plan -> pruned -> repaired: the stages of a run that need no files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from pxcompress.attribution.class_relevance import class_relevance, guarded
from pxcompress.budgets import BUDGETS
from pxcompress.clock import Clock, silent
from pxcompress.deploy.measure import torch_accuracy
from pxcompress.errors import ResultError
from pxcompress.graph import REMOVAL_TOLERANCE, Branches, find_branches, find_groups, prune, removal_error
from pxcompress.memory import in_smaller_batches
from pxcompress.models.loading import classifier_names
from pxcompress.planning.dead_paths import without_dead_paths
from pxcompress.planning.fit import fitted
from pxcompress.planning.plan import Limits, check_reachable, make_plan
from pxcompress.planning.rounds import after_step, groups_left, prune_further, ratios_of, spread, step_of
from pxcompress.planning.selection import Selection
from pxcompress.planning.stop_rule import plan_by_share
from pxcompress.planning.swaps import divergence, swapped_plan
from pxcompress.ranks import from_first, same_weights_
from pxcompress.recipe import Recipe
from pxcompress.repair import REPAIRS
from pxcompress.scorers import SCORERS
from pxcompress.types import (
    Attempt,
    Batches,
    ClassRelevance,
    FileBudget,
    Group,
    Plan,
    Pruned,
    Repair,
    Scored,
    Scores,
    Slim,
)


def shrink(
    model: nn.Module,
    example: Tensor,
    batches: Mapping[str, Batches],
    recipe: Recipe,
    clock: Clock | None = None,
) -> Slim:
    """Find, score, plan, prune, repair: the part of a run that needs neither files nor ONNX.

    `example` is one input, shape (1, ...); `batches` are those of the roles "score" and "repair". With "select" as
    well, top-1 is measured after every stage that changes the model.
    Raises `BudgetError` where no plan reaches the ratio, `ResultError` where removal is not what zeroing is.
    """
    clock = clock or Clock(silent)
    return plan_and_cut(score(model, example, batches, recipe, clock), batches, recipe, clock)


def plan_and_cut(
    scored: Scored, batches: Mapping[str, Batches], recipe: Recipe, clock: Clock, *, on_file: bool = False
) -> Slim:
    """Plan, prune and repair what was scored, in the recipe's rounds.

    With `on_file` a plan for a budget that only files tell is corrected until its exported file fits; it then takes
    one process and one round.
    """
    budget = BUDGETS.build(recipe.budget)
    first, *later = ratios_of(scored.ratio, recipe.rounds)
    attempts: tuple[Attempt, ...] = ()
    with clock.stage("plan"):
        if on_file and isinstance(budget, FileBudget) and recipe.relevance_share is None:
            plan, attempts = fitted(scored, lambda ratio: plan_at(scored, ratio, recipe), budget, recipe.limit)
        else:
            plan = from_first(plan_at(scored, first, recipe))
    if recipe.drop_branches:
        gone = [
            group.name for group in scored.structure.groups if group.name in scored.branches and not plan.kept(group)
        ]
        clock.remark(f"--drop-branches: of {len(scored.branches)} branches these go: {', '.join(gone) or 'none'}")
    slim = cut(scored, plan, batches, recipe, clock)
    for ratio in later:
        slim = cut_further(scored, slim, ratio, batches, recipe, clock)
    return replace(slim, attempts=attempts)


def priced(model: nn.Module, example: Tensor, recipe: Recipe, clock: Clock) -> Scored:
    """The groups and what their units cost, without scores. Raises `BudgetError`."""
    with clock.stage("find groups"):
        found = find_groups(model, example, classifier_names(model, example))
        structure = Selection(recipe.only, recipe.keep, recipe.scope, recipe.floors).of(found, model)
    branches: Branches = {}
    if recipe.drop_branches:
        with clock.stage("find branches"):
            branches = find_branches(model, structure.groups, example)
    budget = BUDGETS.build(recipe.budget)
    with clock.stage(f"price ({recipe.budget})"):
        meter = budget.meter(model, structure.groups, example)
        ratio, limits = 0.0, _limits(recipe, branches)
        if recipe.relevance_share is None:
            ratio = recipe.share(meter({}))
            check_reachable(structure.groups, meter, ratio, limits, (recipe.budget, budget.unit))
    return Scored(model, example, structure, {}, meter, budget.unit, ratio, branches=branches)


def score(model: nn.Module, example: Tensor, batches: Mapping[str, Batches], recipe: Recipe, clock: Clock) -> Scored:
    """Find the groups, and say what their units are worth and cost, once for all ratios. Raises `BudgetError`."""
    scored = priced(model, example, recipe, clock)
    groups = scored.structure.groups
    with clock.stage(f"score ({recipe.scorer})"):
        scores = _scores(model, groups, batches["score"], recipe, clock)
        scored = replace(scored, scores=scores)
    if not (recipe.class_scores or recipe.class_guard):
        return scored
    with clock.stage("class scores"):
        relevance = in_smaller_batches(partial(class_relevance, model, groups), batches["score"], clock.say)
    return replace(scored, scores=_guarded(scores, relevance, recipe), class_relevance=relevance)


def _guarded(scores: Scores, relevance: ClassRelevance | None, recipe: Recipe) -> Scores:
    """`scores`, raised for what single classes rest on where the recipe asks for that."""
    return guarded(scores, relevance) if recipe.class_guard and relevance else scores


def _scores(model: nn.Module, groups: Sequence[Group], batches: Batches, recipe: Recipe, clock: Clock) -> Scores:
    """What the recipe's scorer says of every group; `ResultError` where it is no number."""
    scores = in_smaller_batches(partial(SCORERS.build(recipe.scorer), model, groups), batches, clock.say)
    for name, values in scores.items():
        if not values.isfinite().all():
            raise ResultError(f"scorer {recipe.scorer!r} gives NaN or infinity for units of {name!r}; use another one")
    return scores


def plan_at(scored: Scored, ratio: float, recipe: Recipe) -> Plan:
    """What to remove at `ratio`, or by the recipe's share of relevance. Raises `BudgetError`."""
    budget = (recipe.budget, scored.unit)
    groups, limits = scored.structure.groups, _limits(recipe, scored.branches)
    if recipe.relevance_share is not None:
        return plan_by_share(groups, scored.scores, scored.meter, recipe.relevance_share, limits, budget)
    return make_plan(groups, scored.scores, scored.meter, ratio, limits, budget)


def cut(scored: Scored, plan: Plan, batches: Mapping[str, Batches], recipe: Recipe, clock: Clock) -> Slim:
    """Carry out `plan`, refined, and repair the result; the dense model is left as it was. Raises as `shrink` does."""
    plan = _refined((scored.model, scored.structure.groups), plan, batches, recipe, clock)
    with clock.stage("prune"):
        pruned = prune(scored.model, scored.structure.groups, plan, scored.example)
        _check_removal(pruned, scored.example)
    return _slim(scored, _repaired(scored, pruned, batches, recipe, clock))


def cut_further(
    scored: Scored, slim: Slim, ratio: float, batches: Mapping[str, Batches], recipe: Recipe, clock: Clock
) -> Slim:
    """One more round: score what is left in `slim`, remove up to `ratio` of the dense cost, repair. Changes `slim`."""
    before = slim.pruned
    with clock.stage(f"score again ({recipe.scorer})"):
        left = groups_left(before)
        scores = spread(_scores(before.model, left, batches["score"], recipe, clock), before)
        scores = _guarded(scores, scored.class_relevance, recipe)
    with clock.stage("plan"):
        plan = from_first(plan_at(replace(scored, scores=scores), ratio, recipe))
    step = _refined((before.model, left), step_of(before, plan), batches, recipe, clock)
    with clock.stage("prune"):
        pruned = prune_further(before, left, after_step(before, step), scored.example)
        _check_removal(pruned, scored.example)
    return replace(slim, pruned=_repaired(scored, pruned, batches, recipe, clock))


def _refined(
    subject: tuple[nn.Module, Sequence[Group]],
    plan: Plan,
    batches: Mapping[str, Batches],
    recipe: Recipe,
    clock: Clock,
) -> Plan:
    """`plan`, which removes units of the subject's groups, after the search around it that the recipe asks for.

    What the search found on the score samples has to hold on others, or `plan` stays.
    """
    if recipe.refine == "none":
        return plan
    with clock.stage(f"refine ({recipe.refine})"):
        found = from_first(swapped_plan(*subject, plan, batches["score"], SCORERS.build(recipe.scorer)))
        if found.removed == plan.removed:
            return plan
        before, after = (_changed_by(subject, each, batches, recipe) for each in (plan, found))
        kept = from_first(after < before)
        clock.remark(
            f"--refine {recipe.refine}: {'kept' if kept else 'not kept'}; on samples not searched on the KL divergence "
            f"from the dense model goes from {before:.3g} to {after:.3g}"
        )
        return found if kept else plan


def _changed_by(
    subject: tuple[nn.Module, Sequence[Group]], plan: Plan, batches: Mapping[str, Batches], recipe: Recipe
) -> float:
    """By how much `plan` changes the predictions after the repairs in closed form; training would take too long."""
    held_out = batches.get("select", batches["repair"])
    pruned = prune(*subject, plan, next(iter(batches["score"]))[0][:1])
    for text in recipe.repair:
        if not text.startswith("finetune"):
            pruned = REPAIRS.build(text)(pruned, batches["repair"], held_out)
    return divergence(subject[0], pruned.model, held_out)


def _repaired(scored: Scored, pruned: Pruned, batches: Mapping[str, Batches], recipe: Recipe, clock: Clock) -> Pruned:
    """All repairs in order, then the dead paths that are left go too; beside the dense model."""
    _accuracy(clock, pruned, batches)
    for text in recipe.repair:
        with clock.stage(text):
            pruned = _after(REPAIRS.build(text), pruned, batches, clock)
        _accuracy(clock, pruned, batches)
    same_weights_(pruned.model)
    with clock.stage("clean up"):
        return without_dead_paths(pruned.whole, scored.example, scored.meter, _limits(recipe))


def _after(repair: Repair, pruned: Pruned, batches: Mapping[str, Batches], clock: Clock) -> Pruned:
    """`pruned` with a copy of its model repaired, in smaller batches where memory asks for them.

    What fails half-way has changed its copy only.
    """

    def attempt(fit: Batches, check: Batches) -> Pruned:
        model = copy.deepcopy(pruned.model)
        first = pruned.first and replace(pruned.first, model=model)
        return repair(replace(pruned, model=model, first=first), fit, check)

    least = getattr(repair, "smallest", 1)
    return in_smaller_batches(attempt, batches["repair"], clock.say, batches.get("select", ()), least=least)


def ever_smaller(
    scored: Scored, ratios: Sequence[float], batches: Mapping[str, Batches], recipe: Recipe, clock: Clock
) -> Iterator[Slim]:
    """Ever smaller models, from the dense one on, each cut and repaired by itself when it is asked for.

    The plans are all made before. Ratios that lead to the same widths give one model; each is one stage of `clock`,
    and with "select" among the batches its top-1 is measured. Raises as `shrink` does.
    """
    with clock.stage("plan"):  # from the largest ratio on, so that an impossible one is named as it was asked for
        plans = [plan_at(scored, ratio, recipe) for ratio in sorted(ratios, reverse=True)]
    distinct = {plan.cost_planned: plan for plan in plans if plan.cost_planned < plan.cost_dense}
    return _cuts(scored, list(reversed(distinct.values())), batches, recipe, clock)


def _cuts(
    scored: Scored, plans: Sequence[Plan], batches: Mapping[str, Batches], recipe: Recipe, clock: Clock
) -> Iterator[Slim]:
    cost = scored.meter({})
    nothing = Plan({}, recipe.budget, scored.unit, cost, cost, cost)
    yield _slim(scored, prune(scored.model, scored.structure.groups, nothing, scored.example))
    for plan in plans:
        with clock.stage(f"cut {1 - plan.cost_planned / plan.cost_dense:.1%} of the {plan.unit}"):
            slim = cut(scored, plan, batches, recipe, Clock(silent, measures=False))
        _accuracy(clock, slim.pruned, batches)
        yield slim


def _slim(scored: Scored, pruned: Pruned) -> Slim:
    return Slim(scored.structure, scored.scores, pruned, scored.class_relevance)


def _limits(recipe: Recipe, branches: Branches | None = None) -> Limits:
    floors = Selection(floors=recipe.floors).least
    return Limits(recipe.normalise, recipe.round_to or 1, recipe.min_keep, floors, branches or {})


def _accuracy(clock: Clock, pruned: Pruned, batches: Mapping[str, Batches]) -> None:
    if clock.measures and "select" in batches:
        clock.accuracy(top1_of(pruned.model, batches["select"], clock))


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
