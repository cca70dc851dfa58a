"""The whole story on one page: recipe -> model and data -> groups -> scores -> plan -> pruned -> ONNX -> report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pxcompress.adapter import Adapted, Adapter, Inputs, Logits, adapted, released_
from pxcompress.artifact import assemble, convert, export, measure, write_report
from pxcompress.budgets import BUDGETS
from pxcompress.certificate import check_certifiable, smallest_certified
from pxcompress.class_relevance import class_relevance, guarded
from pxcompress.clock import Clock, Note
from pxcompress.dead_paths import without_dead_paths
from pxcompress.errors import InputError, ResultError
from pxcompress.fit import fitted
from pxcompress.folder import check_place, whole_folder
from pxcompress.graph import REMOVAL_TOLERANCE, find_groups, prune, removal_error
from pxcompress.latency import Conditions, best_step
from pxcompress.measure import torch_accuracy
from pxcompress.memory import in_smaller_batches
from pxcompress.models import classifier_names
from pxcompress.plan import Limits, check_reachable, make_plan
from pxcompress.ranks import from_first, processes, same_weights_, shares
from pxcompress.recipe import MEASURED, Recipe
from pxcompress.repair import REPAIRS
from pxcompress.rewrite import plain
from pxcompress.rounds import after_step, groups_left, prune_further, ratios_of, spread, step_of
from pxcompress.runtime import check_provider
from pxcompress.scorers import SCORERS
from pxcompress.selection import Selection
from pxcompress.state import seeded
from pxcompress.subject import Subject, load_subject, with_baseline
from pxcompress.swaps import swapped_plan
from pxcompress.types import Attempt, Batches, FileBudget, Group, Plan, Pruned, Report, Scored, Scores, Slim


def _silent(message: str) -> None:
    """Progress that nobody reads."""


def compress(recipe: Recipe, out: Path | None = None, *, force: bool = False, note: Note = _silent) -> Report:
    """Run `recipe` and write the run folder `out` (default: exported/MODEL-BUDGET-RATIO); returns what was measured.

    `note` is told about progress. The folder appears whole, or not at all when anything fails: `InputError` for what
    the user gave, `ResultError` for a result that fails its own check. With a guarantee the folder holds the smallest
    model that passes, or the dense one where none does: `report.certificate` says which.
    """
    clock = Clock(note)
    recipe = aligned(recipe, clock)
    place = out or Path("exported") / recipe.label
    if recipe.guarantee and processes() > 1:
        raise InputError(f"a guarantee is asked for in {processes()} processes; run it in one")
    if isinstance(BUDGETS.build(recipe.budget), FileBudget) and (processes() > 1 or recipe.rounds > 1):
        raise InputError(f"budget {recipe.budget!r} is measured on files; run it in one process and one round")
    check_provider(recipe.bench.provider)
    check_place(place, force)
    with seeded(recipe.seed), whole_folder(place, force) as folder:
        subject, parts = opened(recipe, clock)
        scored = score(subject.loaded.model, subject.splits.example, parts, recipe, clock)
        if recipe.guarantee is None:
            slim = plan_and_cut(scored, parts, recipe, clock, on_file=True)
            with clock.stage("export"):
                files = export(folder, recipe, subject, slim)
        else:
            slims = ever_smaller(scored, recipe.guarantee.ratios(scored.ratio), parts, recipe, clock)
            slim, files = smallest_certified(folder, recipe, subject, slims, clock)
        with clock.stage("measure"):
            comparison = measure(files, recipe.bench, subject, slim)
        targets = convert(files, recipe, subject, clock)
        report = assemble(place, recipe, subject, slim, (files, comparison, targets), clock.stages)
        write_report(folder, report)
    return report


def aligned(recipe: Recipe, clock: Clock) -> Recipe:
    """`recipe` with a step for its widths: where it asks for the one that measures best, that one."""
    if recipe.round_to != MEASURED:
        return recipe
    bench = recipe.bench
    with clock.stage("alignment"):
        step = from_first(best_step(Conditions(bench.batch_size, bench.provider, bench.threads)))
    clock.say(f"widths go in steps of {step}, as measures best here")
    return recipe.but(round_to=step)


def opened(recipe: Recipe, clock: Clock) -> tuple[Subject, Mapping[str, Batches]]:
    """Model and data of `recipe`, with weights, and what this process has of the data by role."""
    with clock.stage("load"):
        subject = load_subject(recipe)
        check_certifiable(recipe, subject)
    with clock.stage("weights"):
        subject = with_baseline(subject, recipe.seed, clock.say)
        parts = _shared(subject)
        top1 = _top1(subject.loaded.model, parts["select"], clock)
    clock.accuracy(top1)
    return subject, parts


def assist(recipe: Recipe) -> None:
    """Take part in `compress` in a process that is not the first: the same work, on another share of the data."""
    recipe = aligned(recipe, Clock(_silent))
    with seeded(recipe.seed):
        subject = load_subject(recipe)
        parts = _shared(subject)
        torch_accuracy(subject.loaded.model, parts["select"])
        shrink(subject.loaded.model, subject.splits.example, parts, recipe)


def _shared(subject: Subject) -> dict[str, Batches]:
    """What this process has of the data; its model gets the weights that the first one has."""
    same_weights_(subject.loaded.model)
    splits = subject.splits
    return shares({"score": splits.score, "repair": splits.repair, "select": splits.select})


def compress_module(
    model: nn.Module,
    example: Inputs,
    batches: Iterable[Any],
    ratio: float | None = None,
    *,
    logits: Logits | None = None,
    **options: Any,
) -> Slim:
    """Prune and repair your own module in memory; `result.pruned.model` is the slim one, `model` is left as it was.

    `example` is one input, shape (1, ...), or a tuple or dict of them: the module is called as model(x),
    model(*inputs) or model(**inputs). `batches`, read several times, are inputs or (inputs, labels) and serve scoring
    and repair. Everything that comes out keeps its shape. Relevance starts at an output (n, classes); other outputs
    count with the largest value along axis 1 at every position, as a mean, summed over all outputs, unless `logits`
    makes (n, classes) or (n,) of them. `options` are fields of `Recipe`, such as scorer, budget, repair or round_to:

        slim = compress_module(net, (image, sound), batches, 0.5, logits=lambda out: out["class"], budget="macs")

    Raises `InputError` for what cannot be handled, before any work, else as `shrink` does.
    """
    recipe = Recipe(model=type(model).__name__, ratio=ratio, **options)
    module = adapted(model, example, batches, logits)
    _check_suited(module, recipe)
    recipe = aligned(recipe, Clock(_silent))
    with seeded(recipe.seed):
        parts = {"score": module.batches, "repair": module.batches}
        slim = shrink(plain(module.model), module.example, parts, recipe)
    for each in (slim.pruned.model, slim.pruned.dense):
        released_(each)
    return slim


def _check_suited(module: Adapted, recipe: Recipe) -> None:
    """Refuse what needs labels or logits that a user's module or batches do not have."""
    needs_labels = recipe.class_scores or recipe.class_guard
    needs_labels |= getattr(SCORERS.build(recipe.scorer), "target", "") == "label"
    if needs_labels and not module.labelled:
        raise InputError(
            f"scorer {recipe.scorer!r}, or class scores, need labels (n,) and logits (n, classes); give batches of "
            "(inputs, labels), logits=FUNCTION where the module returns something else, or take another scorer"
        )
    if isinstance(module.model, Adapter) and any(repair.startswith("finetune") for repair in recipe.repair):
        raise InputError("repair 'finetune' takes a module with one input and logits (n, classes); leave it out")


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
    clock = clock or Clock(_silent)
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
        if on_file and isinstance(budget, FileBudget):
            plan, attempts = fitted(scored, lambda ratio: plan_at(scored, ratio, recipe), budget, recipe.limit)
        else:
            plan = from_first(plan_at(scored, first, recipe))
    slim = cut(scored, plan, batches, recipe, clock)
    for ratio in later:
        slim = cut_further(scored, slim, ratio, batches, recipe, clock)
    return replace(slim, attempts=attempts)


def priced(model: nn.Module, example: Tensor, recipe: Recipe, clock: Clock) -> Scored:
    """The groups and what their units cost, without scores. Raises `BudgetError`."""
    with clock.stage("find groups"):
        found = find_groups(model, example, classifier_names(model, example))
        structure = Selection(recipe.only, recipe.keep, recipe.scope, recipe.floors).of(found, model)
    budget = BUDGETS.build(recipe.budget)
    with clock.stage(f"price ({recipe.budget})"):
        meter = budget.meter(model, structure.groups, example)
        ratio = recipe.share(meter({}))
        check_reachable(structure.groups, meter, ratio, _limits(recipe), (recipe.budget, budget.unit))
    return Scored(model, example, structure, {}, meter, budget.unit, ratio)


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
        return replace(scored, class_relevance=relevance)


def _scores(model: nn.Module, groups: Sequence[Group], batches: Batches, recipe: Recipe, clock: Clock) -> Scores:
    """What the recipe's scorer says of every group; `ResultError` where it is no number."""
    scores = in_smaller_batches(partial(SCORERS.build(recipe.scorer), model, groups), batches, clock.say)
    for name, values in scores.items():
        if not values.isfinite().all():
            raise ResultError(f"scorer {recipe.scorer!r} gives NaN or infinity for units of {name!r}; use another one")
    return scores


def plan_at(scored: Scored, ratio: float, recipe: Recipe) -> Plan:
    """What to remove at `ratio`. Raises `BudgetError`."""
    budget = (recipe.budget, scored.unit)
    relevance = scored.class_relevance if recipe.class_guard else None
    scores = scored.scores if relevance is None else guarded(scored.scores, relevance)
    return make_plan(scored.structure.groups, scores, scored.meter, ratio, _limits(recipe), budget)


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
    """`plan`, which removes units of the subject's groups, after the search around it that the recipe asks for."""
    if recipe.refine == "none":
        return plan
    with clock.stage(f"refine ({recipe.refine})"):
        return from_first(swapped_plan(*subject, plan, batches["score"], SCORERS.build(recipe.scorer)))


def _repaired(scored: Scored, pruned: Pruned, batches: Mapping[str, Batches], recipe: Recipe, clock: Clock) -> Pruned:
    """All repairs in order, then the dead paths that are left go too; beside the dense model."""
    _accuracy(clock, pruned, batches)
    for text in recipe.repair:
        with clock.stage(text):
            pruned = REPAIRS.build(text)(pruned, batches["repair"], batches.get("select", ()))
        _accuracy(clock, pruned, batches)
    same_weights_(pruned.model)
    with clock.stage("clean up"):
        return without_dead_paths(pruned.whole, scored.example, scored.meter, _limits(recipe))


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
            slim = cut(scored, plan, batches, recipe, Clock(_silent, measures=False))
        _accuracy(clock, slim.pruned, batches)
        yield slim


def _slim(scored: Scored, pruned: Pruned) -> Slim:
    return Slim(scored.structure, scored.scores, pruned, scored.class_relevance)


def _limits(recipe: Recipe) -> Limits:
    floors = Selection(floors=recipe.floors).least
    return Limits(recipe.normalise, recipe.round_to or 1, recipe.min_keep, floors)


def _accuracy(clock: Clock, pruned: Pruned, batches: Mapping[str, Batches]) -> None:
    if clock.measures and "select" in batches:
        clock.accuracy(_top1(pruned.model, batches["select"], clock))


def _top1(model: nn.Module, batches: Batches, clock: Clock) -> float:
    return in_smaller_batches(partial(torch_accuracy, model), batches, clock.say)


def _check_removal(pruned: Pruned, example: Tensor) -> None:
    """Refuse a model in which removing units does something else than zeroing them."""
    error = removal_error(pruned, example)
    if not error <= REMOVAL_TOLERANCE:
        raise ResultError(
            f"removing units changed the model: its logits differ by {error:.1e} of their scale from the dense model's "
            f"with the same units zeroed (at most {REMOVAL_TOLERANCE:.0e} expected); please report the architecture"
        )
