"""The whole story on one page: recipe -> model and data -> groups -> scores -> plan -> pruned -> ONNX -> report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pxcompress.budgets import BUDGETS
from pxcompress.choices import LOSS_RISKS, one_of
from pxcompress.clock import Clock
from pxcompress.cost.latency import Conditions, best_step
from pxcompress.deploy.intervals import guesses
from pxcompress.deploy.runtime import check_provider
from pxcompress.errors import InputError
from pxcompress.explain.similarity import compared_explanations
from pxcompress.graph import find_groups, rotatable
from pxcompress.guard import name_failures
from pxcompress.models.adapter import Adapted, Adapter, Inputs, Logits, adapted, everything, released_
from pxcompress.models.loading import classifier_names
from pxcompress.models.rewrite import plain, unwrapped
from pxcompress.models.suited import check_suited
from pxcompress.notes import Note, silent
from pxcompress.passes.moments import Remembered
from pxcompress.passes.parts import HeldOut, watched
from pxcompress.planning.selection import Selection
from pxcompress.processes import from_first, processes, same_weights_, shares
from pxcompress.recipe import MEASURED, Recipe
from pxcompress.repair import REPAIRS
from pxcompress.report.record import Report
from pxcompress.run import Run
from pxcompress.run_folder.certificate import check_certifiable, smallest_certified
from pxcompress.run_folder.place import check_place, whole_folder
from pxcompress.run_folder.results import assemble, measure, write_report
from pxcompress.run_folder.saved import check_loads
from pxcompress.run_folder.written import export
from pxcompress.scorers import SCORERS
from pxcompress.stages import ever_smaller, plan_and_cut, quality_on_select, score, shrink
from pxcompress.state import device_of, seeded, without_checkpointing
from pxcompress.tasks.choice import build_task, start_logits
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.task import Task
from pxcompress.types import Batches, FileBudget, PruneResult
from pxcompress.workload import Workload, load_workload, with_baseline


@name_failures("compress")
def compress(recipe: Recipe, out: Path | None = None, *, force: bool = False, note: Note = silent) -> Report:
    """Run `recipe` and write the run folder `out` (default: exported/MODEL-BUDGET-RATIO); returns what was measured.

    `note` is told about progress. The folder appears whole, or not at all when anything fails: `InputError` for what
    the user gave, `ResultError` for a result that fails its own check. With a guarantee the folder holds the smallest
    model that passes, or the dense one where none does: `report.certificate` says which.
    """
    clock = Clock(note)
    place = out or Path("exported") / recipe.label
    if recipe.guarantee and processes() > 1:
        raise InputError(f"a guarantee is asked for in {processes()} processes; run it in one")
    if isinstance(BUDGETS.build(recipe.budget), FileBudget) and (processes() > 1 or recipe.rounds > 1):
        raise InputError(f"budget {recipe.budget!r} is measured on files; run it in one process and one round")
    check_provider(recipe.bench.provider)
    check_place(place, force)
    recipe = aligned(recipe, clock)
    with seeded(recipe.seed), whole_folder(place, force) as folder:
        workload, run = opened(recipe, clock)
        scored = score(workload.loaded.model, workload.splits.example, run)
        if recipe.guarantee is None:
            slim = plan_and_cut(scored, run, on_file=True)
            with clock.stage("export"):
                files = export(folder, recipe, workload, slim)
        else:
            slims = ever_smaller(scored, recipe.guarantee.ratios(scored.ratio), run)
            slim, files = smallest_certified(folder, workload, slims, run)
        measured = measure(files, workload, slim, run)
        alike, unexplained = compared_explanations(slim.pruned, workload.splits.select, recipe, clock)
        report = assemble(place, workload, slim, measured, run)
        report = replace(report, explanations=alike, notes=(*report.notes, *unexplained))
        write_report(folder, report)
        check_loads(folder, workload.splits.test)
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


def opened(recipe: Recipe, clock: Clock) -> tuple[Workload, Run]:
    """Model and data of `recipe`, with weights, and the run that they are for."""
    with clock.stage("load"):
        workload = load_workload(recipe)
        _check_task(recipe, workload.task)
        check_certifiable(recipe, workload)
        _check_names(recipe, workload)
    with clock.stage("weights"):
        workload = with_baseline(workload, recipe.seed, clock.say)
        model, task = workload.loaded.model, workload.task
        run = Run(recipe, watched(_shared(workload), clock.say), clock, task).remembering("repair", model)
        value = quality_on_select(model, model, run, task)
    clock.quality(task.metric, value)
    classes, samples = len(workload.source.classes), len(workload.splits.ids["select"])
    if isinstance(task, Classification) and guesses(value, samples, classes):
        side = " x ".join(str(size) for size in workload.splits.example.shape[2:])
        clock.say(
            f"THE DENSE MODEL IS NEAR CHANCE: top-1 {value:.1%} of {classes} classes; check its weights, and "
            f"--input-size (now {side})"
        )
    return workload, run


def _check_task(recipe: Recipe, task: Task) -> None:
    """Refuse what only classifiers have, before any work."""
    if isinstance(task, Classification):
        return
    labels = [text for text in recipe.scorers if SCORERS.build(text).target == "label"]
    if any(REPAIRS.build(text).phase == "train" for text in recipe.repair):
        raise InputError("repairs that train are for classifiers; leave out finetune")
    for wanted, words in ((recipe.class_scores, "class scores"), (labels, f"scorer {recipe.scorer!r}")):
        if wanted:
            raise InputError(f"{words} need one label a sample; leave them out, or give --task classification")
    if recipe.guarantee is not None and (recipe.guarantee.risk not in LOSS_RISKS or recipe.guarantee.part != "all"):
        raise InputError(
            f"risk {recipe.guarantee.risk!r} and --part are for classifiers; give --risk {one_of(LOSS_RISKS)}, which "
            "bound the task's loss of a sample"
        )


def _check_names(recipe: Recipe, workload: Workload) -> None:
    """Refuse names of groups that fit none, before anything is trained or scored for them."""
    if recipe.only or recipe.keep or recipe.floors:
        example = workload.splits.example
        model = rotatable(workload.loaded.model, example)
        found = find_groups(model, example, classifier_names(model, example), prove=False)
        Selection(recipe.only, recipe.keep, recipe.scope, recipe.floors).of(found, model)


def assist(recipe: Recipe) -> None:
    """Take part in `compress` in a process that is not the first: the same work, on another share of the data."""
    recipe = aligned(recipe, Clock(silent))
    with seeded(recipe.seed):
        workload = load_workload(recipe)
        model = workload.loaded.model
        run = Run(recipe, _shared(workload), task=workload.task).remembering("repair", model)
        quality_on_select(model, model, run, workload.task)
        shrink(workload.loaded.model, workload.splits.example, run)


def _shared(workload: Workload) -> dict[str, Batches]:
    """What this process has of the data; its model gets the weights that the first one has."""
    same_weights_(workload.loaded.model)
    return shares(workload.splits.parts)


@name_failures("compress_module")
def compress_module(  # noqa: PLR0913  (the door for users in Python)
    model: nn.Module,
    example: Inputs,
    batches: Iterable[Any],
    ratio: float | None = None,
    *,
    task: Task | str | None = None,
    logits: Logits | None = None,
    held_out: Iterable[Any] | None = None,
    note: Note = silent,
    **options: Any,
) -> PruneResult:
    """Prune and repair your own module in memory; `result.pruned.model` is the slim one, `model` is left as it was.

    `example` is one input, shape (1, ...), or a tuple or dict of them: the module is called as model(x),
    model(*inputs) or model(**inputs). `batches`, read several times, are inputs or (inputs, labels) and serve scoring
    and repair. By `held_out` batches, or else by a sixth of these samples, scores and repairs are chosen, and
    `result.agreements` says how near the outputs are there. `note` is told about progress and warnings.

    Everything that comes out keeps its shape. A `task`, or its text such as "segmentation", says where relevance starts
    and how near two outputs are. Without it relevance starts at an output (n, classes); other outputs count with the
    largest value along axis 1 at every position, as a mean, summed over all outputs, unless `logits` makes (n, classes)
    or (n,) of them. `options` are fields of `Recipe`, such as scorer, budget, repair or round_to:

        slim = compress_module(net, (image, sound), batches, 0.5, logits=lambda out: out["class"], budget="macs")

    Raises `InputError` for what cannot be handled, before any work, else as `shrink` does.
    """
    recipe = Recipe(model=type(model).__name__, ratio=ratio, **options)
    with torch.inference_mode(False), without_checkpointing():
        model = unwrapped(model)
        check_suited(model)
        judge = build_task(task) if isinstance(task, str) else task
        if judge is not None and logits is None and not isinstance(judge, Classification):
            logits = start_logits(judge)
        module = adapted(model, example, batches, logits)
        _check_answers(module, recipe)
        recipe = aligned(recipe, Clock(silent))
        with seeded(recipe.seed):
            ready = plain(module.model, lambda view: everything(view, module.example.to(device_of(view))))
            slim = shrink(
                ready, module.example, Run(recipe, _module_parts(module, ready, held_out), Clock(note), judge)
            )
    for each in (slim.pruned.model, slim.pruned.dense):
        released_(each)
    return slim


def _module_parts(module: Adapted, net: nn.Module, held_out: Iterable[Any] | None) -> dict[str, Batches]:
    """What to fit to, and what to choose by: `held_out`, or a part of the module's batches where they are enough."""
    fit: Batches = module.batches
    held: Batches = HeldOut(module.batches)
    if held_out is not None:
        held = module.packed(held_out)
    elif next(iter(held), None) is not None:
        fit = HeldOut(module.batches, others=True)
    remembered = Remembered(fit, net)
    parts: dict[str, Batches] = {"score": remembered, "repair": remembered}
    return parts if next(iter(held), None) is None else {**parts, "held-out": held}


def _check_answers(module: Adapted, recipe: Recipe) -> None:
    """Refuse what needs labels or logits that a user's module or batches do not have."""
    needs_labels = recipe.class_scores
    needs_labels |= any(SCORERS.build(text).target == "label" for text in recipe.scorers)
    if needs_labels and not module.labelled:
        raise InputError(
            f"scorer {recipe.scorer!r}, or class scores, need labels (n,) and logits (n, classes); give batches of "
            "(inputs, labels), logits=FUNCTION where the module returns something else, or take another scorer"
        )
    if isinstance(module.model, Adapter) and any(REPAIRS.build(text).phase == "train" for text in recipe.repair):
        raise InputError("repairs that train take a module with one input and logits (n, classes); leave out finetune")
