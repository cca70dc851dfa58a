"""Measures the files of a run folder and assembles the report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pxcompress.attribution.class_relevance import removed_shares
from pxcompress.certify.calibration import LEAST_SAMPLES, CalibrationRecord, compare_calibration
from pxcompress.cost.count import count_params, macs_by_module
from pxcompress.deploy.comparison import Candidate, Comparison, compare, ratios, verdict
from pxcompress.deploy.environment import environment
from pxcompress.deploy.export import argument_name
from pxcompress.deploy.int8 import Judge
from pxcompress.deploy.intervals import NOISE_LIMIT, is_chance_level
from pxcompress.deploy.measure import FileTiming, time_and_predict
from pxcompress.deploy.predictions import Predictions
from pxcompress.errors import list_some
from pxcompress.proof import (
    ClassShare,
    Contender,
    DataSummary,
    GroupWidth,
    LayerCost,
    NamedInput,
    Warning,
)
from pxcompress.recipe import Goal, Recipe
from pxcompress.report.build import sha256_of
from pxcompress.report.record import PlanCosts, Report
from pxcompress.report.summary import format_bytes, format_milliseconds
from pxcompress.run import Run
from pxcompress.run_folder.against import measure_contenders
from pxcompress.run_folder.names import SLIM
from pxcompress.run_folder.smaller_images import recommend_smaller_images
from pxcompress.run_folder.targets import ConvertedFiles, Targets, make_targets, rate_targets
from pxcompress.run_folder.written import Files
from pxcompress.tasks import TASKS
from pxcompress.types import PruneResult
from pxcompress.workload import Workload

SPEED_TOLERANCE = 0.05
"""Share by which the last measurement may miss a goal of speed, for noise on an idle machine."""


NOTHING_RIGHT = 0.01
"""If the dense model's quality is below this share of the best possible, the report warns that nothing can be lost."""


DENSE_DRIFT_LIMIT = 0.2
"""If the dense model's speed differs by more than this share from when the plan was made, the report warns."""


@dataclass(frozen=True)
class RunMeasurements:
    """Measurements of all files of a run, made side by side."""

    files: Files
    comparison: Comparison
    targets: Targets
    layers: tuple[LayerCost, ...] = ()
    calibration: CalibrationRecord | None = None
    contenders: tuple[Contender, ...] = ()
    notes: tuple[Warning, ...] = ()


def measure(files: Files, workload: Workload, slim: PruneResult, run: Run) -> RunMeasurements:
    """Convert to the other precisions, and measure all files side by side."""
    converted_files = _convert_files(files, workload, run)
    models = slim.pruned.dense, slim.pruned.model
    macs = [macs_by_module(model, workload.splits.example) for model in models]
    dense, pruned = (
        Candidate(file.path, count_params(model), sum(of.values()))
        for file, model, of in zip((files.dense, files.pruned), models, macs, strict=True)
    )
    paths = (dense.path, pruned.path, *converted_files.files)
    with run.clock.stage("measure"):
        timings = time_and_predict(paths, workload.splits.test, workload.task, **asdict(run.recipe.bench))
    layers = tuple(LayerCost(name, cost, macs[1].get(name, 0)) for name, cost in macs[0].items())
    comparison = compare(dense, pruned, timings, workload.source.classes)
    calibration = _compare_calibration(timings[0].predictions, timings[1].predictions)
    contenders, notes = measure_contenders(files, (dense, pruned), workload, run)
    change = comparison.change
    if not contenders and change.is_shown and workload.task.metric.gain(change.value) < 0:
        notes = (*notes, *recommend_smaller_images((dense.macs, pruned.macs), timings[1].predictions, workload))
    return RunMeasurements(
        files, comparison, _targets(files, converted_files, timings), layers, calibration, contenders, notes
    )


def _compare_calibration(dense: Predictions, pruned: Predictions) -> CalibrationRecord | None:
    """Calibration of both models' probabilities; None if there are none, or too few samples."""
    if dense.class_outputs is None or pruned.class_outputs is None:
        return None
    if dense.samples < LEAST_SAMPLES or dense.broken or pruned.broken:
        return None
    labels = dense.statistics[:, 2].long()
    return compare_calibration(dense.class_outputs.numpy(), pruned.class_outputs.numpy(), labels.numpy())


def _targets(files: Files, converted_files: ConvertedFiles, timings: Sequence[FileTiming]) -> Targets:
    """Measurements of the files in all precisions, if others than float32 were asked for, and notes about them."""
    if not (converted_files.files or converted_files.failures):
        return Targets()
    targets = rate_targets(timings)
    notes = [*converted_files.failures, *converted_files.remarks, *targets.notes]
    if files.certificate is not None and converted_files.files:
        notes.append(Warning("precision", f"the certificate is about {SLIM}, not about its other precisions"))
    return replace(targets, notes=tuple(notes))


def _convert_files(files: Files, workload: Workload, run: Run) -> ConvertedFiles:
    """Convert model.onnx to the other precisions of the recipe, calibrated on the repair split."""
    precisions = [name for name in run.recipe.targets if name != "fp32"]
    if not precisions:
        return ConvertedFiles()
    with run.clock.stage(f"export {', '.join(precisions)}"):
        judge = Judge(workload.splits.select, workload.task, run.recipe.max_quant_drop, run.recipe.bench.provider)
        return make_targets(files.pruned.path, precisions, workload.splits.repair, judge)


def assemble(place: Path, workload: Workload, slim: PruneResult, measured: RunMeasurements, run: Run) -> Report:
    """The report of a run whose folder will be at `place`."""
    files, comparison, targets = measured.files, measured.comparison, measured.targets
    recipe, plan = run.recipe, slim.pruned.plan
    return Report(
        recipe=recipe,
        environment=environment(comparison.threads),
        data=_summarise_data(workload),
        task=TASKS.text(workload.task),
        metric=workload.task.metric,
        weights=workload.loaded.weights,
        input_shape=tuple(workload.splits.example.shape[1:]),
        inputs=_list_inputs(workload),
        dense=comparison.dense,
        pruned=comparison.pruned,
        ratios=ratios(comparison.dense, comparison.pruned),
        parity=files.parity,
        provider=comparison.placement,
        stages=run.clock.stages,
        groups=tuple(
            GroupWidth(group.name, group.kind, group.units, len(plan.kept(group))) for group in slim.pruned.groups
        ),
        fixed=slim.structure.fixed,
        plan=PlanCosts(plan.budget, plan.unit, plan.cost_dense, plan.cost_planned, plan.cost_target),
        folder=str(place),
        verdict=f"{verdict(comparison)}: {place / SLIM}",
        notes=tuple(_list_notes(place, workload, slim, measured, run)),
        certificate=files.certificate,
        class_shares=_class_shares(slim, workload.source.classes),
        attempts=slim.attempts,
        agreements=slim.agreements,
        calibration=measured.calibration,
        temperature=slim.temperature,
        scorer=slim.scorer,
        rates=slim.rates,
        contenders=measured.contenders,
        missed=_describe_missed_goal(recipe, comparison),
        targets=targets.rows,
        speedup=comparison.speedup,
        change=comparison.change,
        class_changes=comparison.classes,
        layers=measured.layers,
        operators=comparison.operators,
        sha256={path.name: sha256_of(path) for path in sorted(files.dense.path.parent.iterdir()) if path.is_file()},
    )


def _summarise_data(workload: Workload) -> DataSummary:
    """Name and classes of the data, and the number of samples in each role."""
    source, counts = workload.source, {role: len(ids) for role, ids in workload.splits.ids.items()}
    images, skipped = workload.loaded.preprocessing.is_image, workload.splits.skipped
    return DataSummary(source.name, source.classes, skipped=skipped, layout=source.layout, images=images, **counts)


def _class_shares(slim: PruneResult, classes: Sequence[str]) -> tuple[ClassShare, ...]:
    """Share of each class's relevance that the removed units carried; empty without class scores."""
    if slim.class_relevance is None:
        return ()
    samples, shares = slim.class_relevance.samples, removed_shares(slim.class_relevance, slim.pruned.plan).tolist()
    return tuple(
        ClassShare(name, count, share if count else None)
        for name, count, share in zip(classes, samples, shares, strict=True)
    )


def _describe_missed_goal(goal: Goal, comparison: Comparison) -> str:
    """A text on how the last measurement missed a goal of speed; "" if it was met, or was of another kind."""
    faster, took = comparison.speedup.ratio, comparison.pruned.latency_ms.p50
    if goal.speedup is not None and faster < goal.speedup * (1 - SPEED_TOLERANCE):
        return f"{faster:.3g}x faster, {goal.speedup:g}x was asked for"
    if goal.latency_ms is not None and took > goal.latency_ms * (1 + SPEED_TOLERANCE):
        return f"{took:.4g} ms, at most {goal.latency_ms:g} ms was asked for"
    return ""


def _describe_attempts(goal: Goal, slim: PruneResult, comparison: Comparison) -> Iterator[Warning]:
    """Warnings on the attempts to fit the budget, and on a machine whose speed changed since then."""
    if not slim.attempts:
        return
    format_cost = format_bytes if slim.pruned.plan.unit == "bytes" else format_milliseconds
    attempt_texts = ", ".join(
        f"{format_cost(attempt.measured)} (planned {format_cost(attempt.planned)}{', corrected' if turn else ''})"
        for turn, attempt in enumerate(slim.attempts)
    )
    allowed_cost = slim.attempts[-1].allowed
    yield Warning(
        "closed-loop",
        f"plans were held against their exported files: {format_cost(allowed_cost)} allowed; measured {attempt_texts}",
    )
    if goal.speedup is not None:
        planned_dense, measured_dense = allowed_cost * goal.speedup, comparison.dense.latency_ms.p50
        if abs(measured_dense / planned_dense - 1) > DENSE_DRIFT_LIMIT:
            plan_text = f"{format_milliseconds(planned_dense)} when {goal.speedup:g}x was planned"
            yield Warning(
                "machine-changed",
                f"THE MACHINE CHANGED: the dense model took {plan_text}, and {format_milliseconds(measured_dense)} in "
                "the end; run again",
            )


def _describe_sizes(recipe: Recipe, workload: Workload) -> Iterator[Warning]:
    """A warning on the sizes of images that the files take, if any, and on the size that figures are for."""
    if recipe.dynamic_size:
        side = "x".join(map(str, workload.splits.example.shape[2:]))
        yield Warning(
            "sizes",
            "the files take images of any height and width that the model does, tried at twice the height and "
            f"at twice the width; all figures are those of {side}",
        )


def _list_notes(
    place: Path, workload: Workload, slim: PruneResult, measured: RunMeasurements, run: Run
) -> Iterator[Warning]:
    """Everything that a reader must know beside the figures, as warnings."""
    files, comparison = measured.files, measured.comparison
    yield from _about_model(workload, comparison)
    yield from _warn_of_noise(place, comparison)
    if comparison.placement.fallback_reason:
        yield Warning("provider", comparison.placement.fallback_reason)
    if files.loading:
        yield Warning("loading", files.loading)
    if files.certificate and files.certificate.spent:
        yield Warning("spent", files.certificate.spent)
    if workload.splits.skipped:
        count, names = len(workload.splits.skipped), list_some(workload.splits.skipped, 3)
        yield Warning("skipped", f"{count} images could not be read and were left out: {names}")
    yield from _describe_attempts(run.recipe, slim, comparison)
    yield from _describe_sizes(run.recipe, workload)
    yield from (*measured.targets.notes, *measured.notes)
    yield from (Warning("remark", text) for text in run.clock.notes)


def _about_model(workload: Workload, comparison: Comparison) -> Iterator[Warning]:
    """Warnings about the data and the dense model's weights."""
    yield from (Warning("weights", text) for text in workload.loaded.notes)
    yield from (Warning("data", text) for text in (*workload.source.notes, *workload.splits.notes))
    weights, classes = workload.loaded.weights, len(workload.source.classes)
    if workload.source.embedded:
        side = workload.splits.example.shape[-1]
        pixels = f" at {side} x {side} pixels" if workload.loaded.preprocessing.is_image else ""
        text = f"embedded data {workload.source.name!r}{pixels}: a demonstration, not your task"
        yield Warning("demonstration", text)
    if workload.whole:
        class_count = len(workload.whole.source.classes)
        text = f"a task of {classes} of the {class_count} classes: the dense model, too, knows no others"
        yield Warning("part-of-classes", text)
    if weights == "trained-here":
        yield Warning("trained-here", "the dense model was trained here, on that data, for a few epochs")
    if weights == "factory":
        yield Warning("factory-weights", "no --checkpoint was given: the weights are those that the factory made")
    dense, metric = comparison.dense, workload.task.metric
    if workload.task.is_classifier and is_chance_level(dense.quality.value, dense.samples, classes):
        pixels = ", --input-size, to which images are resized, and --input-mean, by which pixels become inputs"
        reason = (
            "as untrained ones do; give --checkpoint"
            if weights == "factory"
            else f"check its weights{pixels if workload.loaded.preprocessing.is_image else ''}"
        )
        text = f"THE DENSE MODEL IS NEAR CHANCE: top-1 {dense.quality.value:.1%} of {classes} classes; {reason}"
        yield Warning("near-chance", text)
    elif metric.unit == "share" and metric.higher_is_better and dense.quality.value < NOTHING_RIGHT:
        text = f"THE DENSE MODEL IS NEARLY ALWAYS WRONG: {metric.name} {metric.format(dense.quality.value)}, so that it"
        yield Warning("near-chance", f"{text} can lose nothing; check its weights, classes and inputs")


def _warn_of_noise(place: Path, comparison: Comparison) -> Iterator[Warning]:
    """Warnings about timings on a machine that was busy."""
    advice = f"time them on a quiet one: pxcompress bench {shlex.quote(str(place))}"
    if comparison.disagrees:
        yield Warning(
            "busy",
            f"THE MACHINE IS BUSY: the pruned model is {comparison.speedup.ratio:.2f}x as fast by p50, but "
            f"{comparison.mean_speedup:.2f}x on average, since a few calls took very long; {advice}",
        )
    elif comparison.noise > NOISE_LIMIT:
        yield Warning(
            "busy",
            f"THE MACHINE IS BUSY: a quarter of the calls is {comparison.noise:.0%} or more off p50, so p90, p99 and "
            f"the throughput mean little; {advice}",
        )


def _list_inputs(workload: Workload) -> tuple[NamedInput, ...]:
    """Name and shape of each input in the files, for models with several inputs; else empty."""
    length = workload.splits.example.shape[-1]
    return tuple(
        NamedInput(argument_name(workload.loaded.model, each.name), tuple(size or length for size in each.shape))
        for each in workload.loaded.preprocessing.inputs
    )
