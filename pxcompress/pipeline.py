"""The whole run on one page: recipe -> model and data -> groups -> scores -> plan -> pruned -> ONNX -> report."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from pxcompress.budgets import BUDGETS
from pxcompress.clock import Clock
from pxcompress.cost.latency import Conditions, measure_best_step
from pxcompress.deploy.intervals import is_chance_level
from pxcompress.deploy.runtime import check_provider
from pxcompress.errors import InputError, ProcessError
from pxcompress.explain.similarity import compare_explanations
from pxcompress.graph import find_groups, make_rotatable
from pxcompress.guard import name_failures
from pxcompress.models.loading import classifier_names
from pxcompress.notes import Note, silent
from pxcompress.passes.parts import watch_batches
from pxcompress.processes import from_first, is_first, processes, rank, same_weights_, share_parts
from pxcompress.recipe import Goal, Recipe
from pxcompress.recipe.goal import MEASURED_STEP
from pxcompress.repair import REPAIRS
from pxcompress.report.record import Report
from pxcompress.run import Run
from pxcompress.run_folder.against import check_against
from pxcompress.run_folder.certificate import check_certifiable, check_risk, find_smallest_certified
from pxcompress.run_folder.pages import write_report
from pxcompress.run_folder.place import whole_folder
from pxcompress.run_folder.results import assemble, measure
from pxcompress.run_folder.saved import check_loads
from pxcompress.run_folder.written import Files, check_dynamic_size, export
from pxcompress.scorers import SCORERS
from pxcompress.stages import ever_smaller, plan_and_cut, quality_on_select, score
from pxcompress.state import seeded
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.task import Task
from pxcompress.types import Batches, FileBudget, PruneResult
from pxcompress.workload import Workload, load_workload, with_baseline


@name_failures("compress")
def compress(recipe: Recipe, out: Path | None = None, *, force: bool = False, note: Note = silent) -> Report:
    """Run `recipe` and write the run folder `out` (default: exported/MODEL-BUDGET-RATIO); returns the report.

    `note` is told about progress. The folder appears whole, or not at all when anything fails: `InputError` for what
    the user gave, `ResultError` for a result that fails its own check. With a guarantee the folder holds the smallest
    model that passes, or the dense one where none does: `report.certificate` says which. It is for one process, or the
    first of several; `work` is for all of them.
    """
    report = compress_in_process(recipe, out, force=force, note=note)
    if report is None:
        raise ProcessError(f"compress was called in process {rank()}, which writes nothing; call pipeline.work there")
    return report


def compress_in_process(
    recipe: Recipe, out: Path | None = None, *, force: bool = False, note: Note = silent
) -> Report | None:
    """Run `compress` in this process, one of one or more that share the data.

    Only the first writes and returns a report. The others write and print nothing, and return None. Raises as
    `compress` does, in all processes for errors of the user.
    """
    if recipe.guarantee and processes() > 1:
        raise InputError(f"a guarantee is asked for in {processes()} processes; run it in one")
    if isinstance(BUDGETS.build(recipe.budget), FileBudget) and (processes() > 1 or recipe.rounds > 1):
        raise InputError(f"budget {recipe.budget!r} is measured on files; run it in one process and one round")
    check_provider(recipe.bench.provider)
    clock = Clock(note if is_first() else silent)
    place = out or Path("exported") / recipe.label
    with whole_folder(place, force) if is_first() else nullcontext(place) as folder:
        recipe = with_measured_alignment(recipe, clock)
        with seeded(recipe.seed):
            workload, run = open_run(recipe, clock)
            scored = score(workload.loaded.model, workload.splits.example, run)
            if recipe.guarantee is None:
                slim = plan_and_cut(scored, run, on_file=True)
                if not is_first():
                    return None
                with clock.stage("export"):
                    files = export(folder, recipe, workload, slim)
            else:
                slims = ever_smaller(scored, recipe.guarantee.ratios(scored.ratio), run)
                slim, files = find_smallest_certified(folder, workload, slims, run)
            return prove(place, workload, slim, files, run)


def prove(place: Path, workload: Workload, slim: PruneResult, files: Files, run: Run) -> Report:
    """Measure the exported files and write the report into their folder, which is moved to `place` afterwards.

    Raises `ParityError` where the folder cannot be loaded as the model that it holds.
    """
    folder = files.dense.path.parent
    measured = measure(files, workload, slim, run)
    alike, unexplained = compare_explanations(slim.pruned, workload.splits.select, run.recipe, run.clock)
    report = assemble(place, workload, slim, measured, run)
    report = replace(report, explanations=alike, notes=(*report.notes, *unexplained))
    write_report(folder, report)
    built = workload.loaded.model if workload.loaded.architecture.in_python else None
    check_loads(folder, workload.splits.test, built)
    return report


def with_measured_alignment(recipe: Recipe, clock: Clock) -> Recipe:
    """`recipe`, in which a `round_to` of 0 is replaced by the best step of widths, measured on this machine."""
    if recipe.round_to != MEASURED_STEP:
        return recipe
    bench = recipe.bench
    with clock.stage("alignment"):
        step = from_first(
            measure_best_step(Conditions(bench.batch_size, bench.provider, bench.threads), recipe.targets[-1])
        )
    clock.say(f"widths go in steps of {step}, as measures best here")
    return recipe.but(round_to=step)


def open_run(recipe: Recipe, clock: Clock) -> tuple[Workload, Run]:
    """Load model and data of `recipe` and make its `Run`; all processes get the same weights."""
    with clock.stage("load"):
        workload = load_workload(recipe)
        _check_task(recipe, workload.task)
        check_certifiable(recipe, workload)
        check_against(recipe, workload)
        _check_names(recipe, workload)
        if is_first():
            check_dynamic_size(recipe, workload)
    with clock.stage("weights"):
        if is_first():  # the others get its weights
            workload = with_baseline(workload, recipe.seed, clock.say)
        model, task = workload.loaded.model, workload.task
        run = Run(recipe, watch_batches(_share_data(workload), clock.say), clock, task).with_moment_cache(
            "repair", model
        )
        value = quality_on_select(model, model, run, task)
    clock.quality(task.metric, value)
    classes, samples = len(workload.source.classes), len(workload.splits.ids["select"])
    if isinstance(task, Classification) and is_chance_level(value, samples, classes):
        side = " x ".join(str(size) for size in workload.splits.example.shape[2:])
        inputs = f", --input-size (now {side}) and --input-mean" if workload.loaded.preprocessing.is_image else ""
        clock.say(f"THE DENSE MODEL IS NEAR CHANCE: top-1 {value:.1%} of {classes} classes; check its weights{inputs}")
    return workload, run


def _check_task(recipe: Recipe, task: Task) -> None:
    """Raise `InputError` for options that only classifiers have, before any work."""
    if isinstance(task, Classification):
        return
    wanting = [name for name in ("class_scores", "temperature_scaling") if getattr(recipe, name)]
    wanting += [f"scorer {text!r}" for text in recipe.scorers if SCORERS.build(text).target == "label"]
    wanting += [f"repair {text!r}" for text in recipe.repair if REPAIRS.build(text).needs_labels]
    if wanting:
        raise InputError(f"{wanting[0]} needs one label a sample; leave it out, or give --task classification")
    if recipe.guarantee is not None:
        check_risk(recipe.guarantee.risk, recipe.guarantee.part, task)


def _check_names(goal: Goal, workload: Workload) -> None:
    """Raise `InputError` for group names in options that match no group, before any work."""
    if goal.only or goal.keep or goal.floors:
        example = workload.splits.example
        model = make_rotatable(workload.loaded.model, example)
        structure = find_groups(model, example, classifier_names(model, example), prove=False)
        goal.selection.of(structure, model)


def _share_data(workload: Workload) -> dict[str, Batches]:
    """The share of the data for this process, by role; the model gets the weights of the first process."""
    same_weights_(workload.loaded.model)
    return share_parts(workload.splits.parts)
