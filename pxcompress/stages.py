"""The stages of a run that need no files: model -> groups -> prices -> scores -> plan -> pruned -> repaired."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from pxcompress.agreement import DenseOutputs
from pxcompress.attribution.class_relevance import class_relevance
from pxcompress.cost.count import list_uncounted
from pxcompress.deploy.predictions import torch_quality
from pxcompress.directions import rotate_streams_
from pxcompress.errors import BudgetError, ResultError
from pxcompress.exchange_rates import at_rates, with_measured_rates
from pxcompress.graph import (
    REMOVAL_TOLERANCE,
    find_groups,
    make_rotatable,
    own_all_norms,
    prune,
    removal_error,
    restore_layer_norms,
)
from pxcompress.models.loading import classifier_names
from pxcompress.passes.memory import in_smaller_batches
from pxcompress.passes.parts import spread_samples
from pxcompress.planning.dead_paths import remove_dead_paths
from pxcompress.planning.fit import fit_to_file
from pxcompress.planning.order import ACROSS_GROUPS
from pxcompress.planning.plan import check_reachable, make_plan
from pxcompress.planning.relevance_share import plan_by_share
from pxcompress.planning.rounds import groups_left, list_ratios, prune_further, spread_scores
from pxcompress.processes import from_first, same_weights_
from pxcompress.recipe import Goal
from pxcompress.run import Run
from pxcompress.scorers import SCORERS
from pxcompress.state import seeded
from pxcompress.tasks.task import Task
from pxcompress.temperature import with_temperature
from pxcompress.types import (
    Agreement,
    Agreements,
    Attempt,
    Batches,
    FileBudget,
    Group,
    Plan,
    Price,
    Pruned,
    PruneResult,
    Repair,
    ScoredModel,
    Scores,
    Structure,
)

REASONS = 3
"""Most reasons that a message lists for a model without removable units."""


def prune_and_repair(model: nn.Module, example: Tensor, run: Run) -> PruneResult:
    """Find groups, score, plan, prune and repair: the part of a run that needs neither files nor ONNX.

    `example` is one input, shape (1, ...). Raises `BudgetError` where no plan reaches the ratio, `ResultError` where
    removal is not what zeroing is.
    """
    return plan_and_cut(score(model, example, run), run)


def plan_and_cut(scored: ScoredModel, run: Run, *, on_file: bool = False) -> PruneResult:
    """Plan, prune and repair a scored model, in the recipe's rounds.

    With `on_file` a plan for a budget that only files tell is corrected until its exported file fits; it then takes
    one process and one round.
    """
    recipe, clock = run.recipe, run.clock
    first, *later = list_ratios(scored.ratio, recipe.rounds)
    attempts: tuple[Attempt, ...] = ()
    with clock.stage("plan"):
        if on_file and isinstance(run.budget, FileBudget) and recipe.relevance_share is None:
            plans = partial(plan_at, scored, goal=recipe)
            plan, attempts = fit_to_file(scored, plans, run.budget, recipe.limit, recipe.open_axes)
        else:
            plan = from_first(plan_at(scored, first, recipe))
    slim = cut(scored, plan, run)
    for ratio in later:
        slim = cut_further(scored, slim, ratio, run)
    slim = with_temperature(slim, scored.example, run)
    return replace(slim, pruned=restore_layer_norms(slim.pruned), attempts=attempts)


def price_groups(model: nn.Module, example: Tensor, run: Run) -> ScoredModel:
    """Find the groups and what their units cost; scores are still empty. Raises `BudgetError`."""
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
    return ScoredModel(model, example, structure, {}, price, ratio)


def _find_structure(model: nn.Module, example: Tensor, goal: Goal) -> tuple[nn.Module, Structure]:
    """A copy of `model` in which streams that may lose directions are rotated, and all groups that may be pruned."""
    rotated = make_rotatable(model, example)
    structure = find_groups(rotated, example, classifier_names(rotated, example))
    structure = goal.selection.of(structure, rotated)
    streams = {group.name: group for group in structure.groups if group.kind == "direction"}
    if own_all_norms(rotated, streams.values()):
        return rotated, structure
    chosen = {group.name for group in structure.groups}
    rotated = make_rotatable(model, example, streams)
    groups = find_groups(rotated, example, classifier_names(rotated, example), prove=False).groups
    return rotated, replace(structure, groups=tuple(group for group in groups if group.name in chosen))


def _check_removable(structure: Structure) -> None:
    """Raise `BudgetError`, with reasons, if nothing can be removed."""
    if structure.groups:
        return
    reasons = {layer.reason: layer.name for layer in reversed(structure.fixed)}
    reasons_text = "; ".join(f"{name}: {reason}" for reason, name in list(reversed(reasons.items()))[:REASONS])
    raise BudgetError(
        f"the model has no removable units: {reasons_text or 'no convolution or linear layer runs'}; see inspect"
    )


def score(model: nn.Module, example: Tensor, run: Run) -> ScoredModel:
    """Find the groups, and the score and cost of their units, once for all ratios. Raises `BudgetError`."""
    recipe, clock = run.recipe, run.clock
    scored = price_groups(model, example, run)
    model, groups = scored.model, scored.structure.groups
    if any(group.kind == "direction" for group in groups):
        with clock.stage("rotate streams"), seeded(recipe.seed):
            in_smaller_batches(partial(rotate_streams_, model, groups), run.parts["score"], clock.say)
    run = run.with_moment_cache("score", model)
    run.remember_moments_of(model)
    candidates = []
    for text in recipe.scorers if run.held_out else recipe.scorers[:1]:
        with clock.stage(f"score ({text})"):
            candidates.append(replace(scored, scores=unit_scores(model, groups, text, run), scorer=text))
    run.clear_solutions("score")
    scored = _choose_scored(candidates, run)
    if short := run.short_of_samples:
        name, (features, samples) = max(short.items(), key=lambda item: item[1][0])
        remainder = f" (of {len(short)} such layers the widest)" if len(short) > 1 else ""
        clock.add_note(
            f"few samples: {name} reads {features} features of {samples} samples{remainder}; what feeds it stays wider "
            "than more samples would show to be needed"
        )
    if not recipe.class_scores:
        return scored
    with clock.stage("class scores"):
        relevance = in_smaller_batches(partial(class_relevance, model, groups), run.parts["score"], clock.say)
    return replace(scored, class_relevance=relevance)


def _choose_scored(candidates: Sequence[ScoredModel], run: Run) -> ScoredModel:
    """The candidate whose pruned model is most similar to the dense one on held-out samples.

    All candidates score the same model. Each is pruned to the recipe's ratio and gets the repairs of the phase
    "absorb"; the first one wins a tie. If the plan compares scores of different groups, the candidates are the first
    one unchanged, and all of them with the scores of each group multiplied by its measured exchange rate.
    """
    if len(candidates) == 1:
        return candidates[0]
    absorbing = [repair for repair in run.repairs.values() if repair.phase == "absorb"]
    names = [each.scorer for each in candidates]
    if run.recipe.normalise in ACROSS_GROUPS and run.recipe.relevance_share is None:
        with run.clock.stage("measure groups"):
            fit, held_out = run.parts["repair"], run.held_out
            candidates = [candidates[0], *with_measured_rates(candidates, absorbing, fit, held_out, run.task)]
        names = [f"{names[0]} as it is", *(f"{name} with measured rates" for name in names)]
    with run.clock.stage("choose the score"):
        dense = DenseOutputs(candidates[0].model, run.held_out, run.task)
        divergences = []
        for scored in candidates:
            plan = from_first(plan_at(scored, list_ratios(scored.ratio, run.recipe.rounds)[0], run.recipe))
            pruned = prune(scored.model, scored.structure.groups, plan)
            for repair in absorbing:
                pruned = _try_repair(repair, pruned, run)
            divergences.append(_get_distance(dense.compare(pruned.model)))
        best_place = min(range(len(candidates)), key=lambda place: divergences[place])
    divergence_texts = ", ".join(f"{value:.3g} by {name}" for value, name in zip(divergences, names, strict=True))
    run.clock.add_note(
        f"the score is {names[best_place]}: on held-out samples the divergence from the dense model is "
        f"{divergence_texts}"
    )
    return candidates[best_place]


def unit_scores(model: nn.Module, groups: Sequence[Group], scorer: str, run: Run) -> Scores:
    """Scores of every group by a scorer, given as text. Raises `ResultError` for scores that are no finite numbers.

    Random numbers of a scorer depend on the recipe's seed alone.
    """
    with seeded(run.recipe.seed):
        work = partial(SCORERS.build(scorer), model, groups)
        scores = in_smaller_batches(work, run.parts["score"], run.clock.say)
    for name, values in scores.items():
        if not values.isfinite().all():
            raise ResultError(f"scorer {scorer!r} gives NaN or infinity for units of {name!r}; use another one")
    return scores


def plan_at(scored: ScoredModel, ratio: float, goal: Goal) -> Plan:
    """The plan for removing `ratio`, or for the goal's share of relevance. Raises `BudgetError`."""
    groups = scored.structure.groups
    if goal.relevance_share is not None:
        return plan_by_share(groups, scored.scores, scored.price, goal.relevance_share, goal.limits)
    return make_plan(groups, scored.scores, scored.price, ratio, goal.limits)


def cut(scored: ScoredModel, plan: Plan, run: Run) -> PruneResult:
    """Prune by `plan` and repair the result; the dense model is left as it was. Raises as `prune_and_repair` does."""
    with run.clock.stage("prune"):
        pruned = prune(scored.model, scored.structure.groups, plan)
        _check_removal(pruned, scored.example)
    pruned, agreements = _repair(scored, pruned, run)
    return replace(_make_result(scored, pruned), agreements=agreements)


def cut_further(scored: ScoredModel, slim: PruneResult, ratio: float, run: Run) -> PruneResult:
    """One more round: score the remaining units, remove up to `ratio` of the dense cost, repair. Changes `slim`."""
    recipe, clock, previous = run.recipe, run.clock, slim.pruned
    with clock.stage(f"score again ({scored.scorer})"):
        remaining_groups = groups_left(previous)
        scores = at_rates(
            spread_scores(unit_scores(previous.model, remaining_groups, scored.scorer, run), previous), scored.rates
        )
    with clock.stage("plan"):
        plan = from_first(plan_at(replace(scored, scores=scores), ratio, recipe))
    with clock.stage("prune"):
        pruned = prune_further(previous, remaining_groups, plan)
        _check_removal(pruned, scored.example)
    pruned, agreements = _repair(scored, pruned, run)
    return replace(slim, pruned=pruned, agreements=agreements)


@dataclass(frozen=True, eq=False)
class _RepairedModel:
    """A pruned model with some repairs, its agreement if samples are held out, and the repairs that were refused."""

    pruned: Pruned
    agreement: Agreement | None
    refused: tuple[str, ...] = ()


def _repair(scored: ScoredModel, pruned: Pruned, run: Run) -> tuple[Pruned, Agreements | None]:
    """Apply all repairs that help, in order, then remove units that do nothing; returns model and agreements.

    A repair helps if it brings the outputs on held-out samples nearer to the dense model's; a refit is judged together
    with the repairs that follow it. Training on labels is always kept. Without held-out samples all repairs are kept.
    """
    dense = DenseOutputs(pruned.whole.dense, run.held_out, run.task) if run.held_out else None
    _measure_quality(pruned, run)
    with run.clock.stage("compare with the dense model"):
        paths = [_RepairedModel(pruned, dense.compare(pruned.model) if dense else None)]
    for text, repair in run.repairs.items():
        if repair.phase == "train":  # which takes long
            paths = [_find_nearest(paths)]
        with run.clock.stage(text):
            paths = [next_path for path in paths for next_path in _try_paths(path, text, repair, dense, run)]
            if repair.phase != "refit":
                paths = [_find_nearest(paths)]
        _measure_quality(_find_nearest(paths).pruned, run)
    best_path = _find_nearest(paths)
    for text in best_path.refused:
        run.clock.add_note(f"repair {text} was not kept: without it held-out outputs are nearer to the dense model's")
    _check_finite(best_path.pruned)
    same_weights_(best_path.pruned.model)
    with run.clock.stage("clean up"):
        pruned = remove_dead_paths(best_path.pruned.whole, scored.example, scored.price, run.recipe.limits)
        if best_path.agreement is None:
            return pruned, None
        return pruned, Agreements(
            best_path.agreement, _compare_on_calibration(pruned, run, best_path.agreement.samples)
        )


def _try_paths(
    path: _RepairedModel, text: str, repair: Repair, dense: DenseOutputs | None, run: Run
) -> Sequence[_RepairedModel]:
    """The models to continue with after trying a repair: with it, without it, or both."""
    pruned = _try_repair(repair, path.pruned, run)
    if dense is None or path.agreement is None:
        return [_RepairedModel(pruned, None)]
    repaired = _RepairedModel(pruned, dense.compare(pruned.model), path.refused)
    if repair.needs_labels:
        return [repaired]
    return [repaired, replace(path, refused=(*path.refused, text))]


def _find_nearest(paths: Sequence[_RepairedModel]) -> _RepairedModel:
    """The path most similar to the dense model on held-out samples, the first of equals; NaN is worst."""

    return min(paths, key=lambda path: _get_distance(path.agreement))


def _get_distance(agreement: Agreement | None) -> float:
    """The divergence from the dense model: 0 if it is unknown, infinity if it is NaN."""
    value = 0.0 if agreement is None else agreement.divergence
    return math.inf if math.isnan(value) else value


def _compare_on_calibration(pruned: Pruned, run: Run, samples: int) -> Agreement:
    """Agreement on about `samples` of the samples that repairs were fitted to."""
    return DenseOutputs(pruned.dense, spread_samples(run.parts["repair"], samples), run.task).compare(pruned.model)


def _check_finite(pruned: Pruned) -> None:
    """Raise `ResultError` for weights that are NaN or infinite."""
    for name, value in pruned.model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ResultError(
                f"the repaired model has NaN or infinity in {name!r}; check the data for inputs all alike, or leave a "
                "repair out"
            )


def _try_repair(repair: Repair, pruned: Pruned, run: Run) -> Pruned:
    """`pruned` with a repaired copy of its model, in smaller batches if memory is too small.

    What fails half-way has changed its copy only.
    """

    def attempt(fit: Batches, check: Batches) -> Pruned:
        model = copy.deepcopy(pruned.model)
        first_round = pruned.first and replace(pruned.first, model=model)
        return repair(replace(pruned, model=model, first=first_round), fit, check)

    return in_smaller_batches(attempt, run.parts["repair"], run.clock.say, run.held_out)


def ever_smaller(scored: ScoredModel, ratios: Sequence[float], run: Run) -> Iterator[PruneResult]:
    """Smaller and smaller models, from the dense one on, each pruned and repaired from it when it is needed.

    The plans are all made before. Ratios that lead to the same widths give one model; each is one stage of the clock,
    and with "select" among the parts its quality is measured. Raises as `prune_and_repair` does.
    """
    with run.clock.stage("plan"):  # from the largest ratio on, so that an impossible one is named as it was asked for
        plans = [plan_at(scored, ratio, run.recipe) for ratio in sorted(ratios, reverse=True)]
    distinct = {plan.cost_planned: plan for plan in plans if plan.cost_planned < plan.cost_dense}
    return _cut_path(scored, list(reversed(distinct.values())), run)


def _cut_path(scored: ScoredModel, plans: Sequence[Plan], run: Run) -> Iterator[PruneResult]:
    price = scored.price
    empty_plan = Plan({}, price.budget, price.unit, price({}), price({}), price({}))
    yield _make_result(scored, restore_layer_norms(prune(scored.model, scored.structure.groups, empty_plan)))
    for plan in plans:
        with run.clock.stage(f"cut {1 - plan.cost_planned / plan.cost_dense:.1%} of the {plan.unit}"):
            slim = with_temperature(cut(scored, plan, run.without_progress()), scored.example, run.without_progress())
        _measure_quality(slim.pruned, run)
        yield replace(slim, pruned=restore_layer_norms(slim.pruned))


def _make_result(scored: ScoredModel, pruned: Pruned) -> PruneResult:
    return PruneResult(scored.structure, scored.scores, pruned, scored.class_relevance)


def _measure_quality(pruned: Pruned, run: Run) -> None:
    if run.clock.measures and "select" in run.parts and run.task is not None:
        run.clock.quality(run.task.metric, quality_on_select(pruned.model, pruned.whole.dense, run, run.task))


def quality_on_select(model: nn.Module, dense: nn.Module, run: Run, task: Task) -> float:
    """The metric of the PyTorch model on the select split, in smaller batches if memory is too small."""

    def measure(batches: Batches) -> float:
        return torch_quality(model, batches, task, dense)

    return in_smaller_batches(measure, run.parts["select"], run.clock.say)


def _check_removal(pruned: Pruned, example: Tensor) -> None:
    """Raise `ResultError` if removing units does anything else than zeroing them."""
    error = removal_error(pruned, example)
    if not error <= REMOVAL_TOLERANCE:
        raise ResultError(
            f"removing units changed the model: its logits differ by {error:.1e} of their scale from the dense model's "
            f"with the same units zeroed (at most {REMOVAL_TOLERANCE:.0e} expected); please report the architecture"
        )
