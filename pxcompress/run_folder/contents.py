"""The run folder: what is written into it, how that is measured, and how a slim model is built again from it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pxcompress import __version__
from pxcompress.attribution.class_relevance import removed_shares
from pxcompress.clock import Clock
from pxcompress.cost.count import count_params, macs_by_module
from pxcompress.deploy.export import export_onnx, verify_parity
from pxcompress.deploy.intervals import BUSY, guesses
from pxcompress.deploy.measure import Candidate, Comparison, Tried, compare, environment, ratios, try_files, verdict
from pxcompress.errors import InputError, ParityError, short
from pxcompress.graph import find_groups, prune
from pxcompress.models.checkpoint import load_state
from pxcompress.models.loading import Architecture, classifier_names
from pxcompress.models.rewrite import plain
from pxcompress.models.task import sliced
from pxcompress.planning.plan_file import plan_from_json, plan_to_json, planned_groups
from pxcompress.proof import (
    Artifact,
    ClassChange,
    ClassShare,
    DataSummary,
    GroupWidth,
    LayerCost,
    Parity,
    Report,
    Rival,
    StageTime,
)
from pxcompress.recipe import Recipe
from pxcompress.report.build import check_files, read_report, sha256_of, to_json
from pxcompress.report.html import to_html
from pxcompress.run_folder import shelf
from pxcompress.run_folder.targets import Made, Targets, make_targets, rate_targets
from pxcompress.subject import Subject
from pxcompress.types import ClassRelevance, Preprocessing, Pruned, Slim

NEAR = 0.05
"""Share by which a speed may be off in the last measurement: what is noise on an idle machine."""

DENSE, SLIM, RECIPE, PLAN, WEIGHTS = "dense.onnx", "model.onnx", "recipe.json", "plan.json", "model.safetensors"
"""Files of a run folder that others read."""

PREDICT = Path(__file__).parents[1] / "deploy" / "predict.py"
"""Needs onnxruntime, numpy and pillow only; it is copied as it is."""


@dataclass(frozen=True)
class Files:
    """The exported models of a run folder, the parity of the pruned one with PyTorch, and what is certified of it."""

    dense: Artifact
    pruned: Artifact
    parity: Parity
    certificate: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured of all files, in one go."""

    comparison: Comparison
    targets: Targets
    rivals: tuple[Rival, ...] = ()
    layers: tuple[LayerCost, ...] = ()


def export(folder: Path, recipe: Recipe, subject: Subject, slim: Slim) -> Files:
    """Write recipe, plan, scores, slim weights and both ONNX files; `ParityError` where ONNX Runtime disagrees."""
    dense = export_dense(folder / DENSE, recipe, subject)
    small = export_slim(folder / SLIM, recipe, subject, slim)
    return describe(folder, recipe, subject, slim, (dense, small))


def export_dense(path: Path, recipe: Recipe, subject: Subject) -> Artifact:
    """Write the dense model as ONNX."""
    facts = {**_facts(recipe, subject), "pruned": "no"}
    return export_onnx(subject.loaded.model, subject.splits.example, path, facts, batch=recipe.onnx_batch)


def export_slim(path: Path, recipe: Recipe, subject: Subject, slim: Slim) -> Artifact:
    """Write a slim model as ONNX."""
    plan = sha256(_plan(slim).encode()).hexdigest()
    facts = {**_facts(recipe, subject), "pruned": "yes" if slim.pruned.plan.removed else "no", "plan_sha256": plan}
    return export_onnx(slim.pruned.model, subject.splits.example, path, facts, batch=recipe.onnx_batch)


def describe(folder: Path, recipe: Recipe, subject: Subject, slim: Slim, exported: tuple[Artifact, Artifact]) -> Files:
    """Write recipe, plan, scores and slim weights beside the `exported` dense and slim ONNX files, and check parity."""
    dense, small = exported
    (folder / RECIPE).write_text(recipe.to_json())
    (folder / PLAN).write_text(_plan(slim))
    scores = {name: values.float().contiguous() for name, values in slim.scores.items()}
    (folder / "scores.safetensors").write_bytes(save(scores))
    if slim.class_relevance is not None:
        _save_class_relevance(slim.class_relevance, subject, folder / "class_scores.safetensors")
    _save_weights(slim.pruned.model, subject, folder / WEIGHTS)
    parity = verify_parity(slim.pruned.model, small.path, subject.splits.test)
    if not parity.passed:
        raise ParityError(
            f"{SLIM} disagrees with PyTorch by up to {parity.max_abs:.2e} on {parity.samples} samples "
            f"({parity.top1_agreement:.1%} of the decisions agree); please report the architecture"
        )
    return Files(dense, small, parity)


def _plan(slim: Slim) -> str:
    return plan_to_json(slim.pruned.plan, slim.pruned.groups)


def measure(files: Files, recipe: Recipe, subject: Subject, slim: Slim, clock: Clock) -> Measured:
    """Make the other precisions, take similar models where these are asked for, and measure all side by side, once."""
    made = _converted(files, recipe, subject, clock)
    models = slim.pruned.dense, slim.pruned.model
    macs = [macs_by_module(model, subject.splits.example) for model in models]
    dense, pruned = (
        Candidate(file.path, count_params(model), sum(of.values()))
        for file, model, of in zip((files.dense, files.pruned), models, macs, strict=True)
    )
    paths = (dense.path, pruned.path, *made.files)
    with tempfile.TemporaryDirectory() as place:
        others = shelf.take(recipe, subject, pruned.macs, Path(place), clock) if recipe.compare else ()
        with clock.stage("measure"):
            beside = [other.path for other in others]
            tried = try_files(paths, subject.splits.test, timed=beside, **asdict(recipe.bench))
        rivals = shelf.rated(others, tried[1], tried[len(paths) :])
    layers = tuple(LayerCost(name, cost, macs[1].get(name, 0)) for name, cost in macs[0].items())
    return Measured(compare(dense, pruned, tried), _targets(files, made, tried[: len(paths)]), rivals, layers)


def _targets(files: Files, made: Made, tried: Sequence[Tried]) -> Targets:
    """The files in all precisions, where others than float32 were asked for, and what to know about them."""
    if not (made.files or made.failures):
        return Targets()
    rated = rate_targets(tried)
    notes = [*made.failures, *rated.notes]
    if files.certificate is not None and made.files:
        notes.append(f"the certificate is about {SLIM}, not about its other precisions")
    return replace(rated, notes=tuple(notes))


def _converted(files: Files, recipe: Recipe, subject: Subject, clock: Clock) -> Made:
    """model.onnx in the other precisions of `recipe`, calibrated on the repair split."""
    asked = [name for name in recipe.targets if name != "fp32"]
    if not asked:
        return Made()
    with clock.stage(f"export {', '.join(asked)}"):
        return make_targets(files.pruned.path, asked, subject.splits.repair)


def assemble(
    place: Path,
    recipe: Recipe,
    subject: Subject,
    slim: Slim,
    results: tuple[Files, Measured],
    stages: tuple[StageTime, ...],
) -> Report:
    """The report of a run whose folder will stand at `place`."""
    files, measured = results
    comparison, targets = measured.comparison, measured.targets
    plan = slim.pruned.plan
    counts = {role: len(ids) for role, ids in subject.splits.ids.items()}
    return Report(
        recipe=json.loads(recipe.to_json()),
        environment={**environment(), "pxcompress": __version__, "threads": comparison.threads},
        data=DataSummary(subject.source.name, subject.source.classes, skipped=subject.splits.skipped, **counts),
        weights=subject.loaded.weights,
        input_shape=tuple(subject.splits.example.shape[1:]),
        dense=comparison.dense,
        pruned=comparison.pruned,
        ratios=ratios(comparison.dense, comparison.pruned),
        parity=files.parity,
        provider=comparison.placement,
        stages=stages,
        groups=tuple(
            GroupWidth(group.name, group.kind, group.units, len(plan.kept(group))) for group in slim.pruned.groups
        ),
        fixed=slim.structure.fixed,
        plan={key: value for key, value in asdict(plan).items() if key != "removed"},
        folder=str(place),
        verdict=f"{verdict(comparison)}: {place / SLIM}",
        notes=(*_notes(subject, files, comparison), *_loop(slim), *targets.notes),
        certificate=files.certificate,
        class_shares=_class_shares(slim, subject.source.classes),
        attempts=slim.attempts,
        missed=_missed(recipe, comparison),
        targets=targets.rows,
        speedup=comparison.speedup,
        rivals=measured.rivals,
        both_right=comparison.both_right,
        class_changes=tuple(
            ClassChange(name, *counts)
            for name, counts in zip(subject.source.classes, comparison.by_class, strict=False)
        ),
        layers=measured.layers,
        operators=comparison.operators,
        sha256={path.name: sha256_of(path) for path in sorted(files.dense.path.parent.iterdir()) if path.is_file()},
    )


def write_report(folder: Path, report: Report) -> None:
    """Write report.json, report.html, and predict.py, with which the model runs without pxcompress."""
    shutil.copyfile(PREDICT, folder / PREDICT.name)
    (folder / "report.json").write_text(to_json(report))
    (folder / "report.html").write_text(to_html(report))


def preprocessing_of(facts: Mapping[str, str]) -> Preprocessing:
    """How images are fed to a model, from its ONNX file's metadata. Raises `InputError` where that does not say."""
    try:
        return Preprocessing(
            input_size=tuple(json.loads(facts["input_size"])),
            mean=tuple(json.loads(facts["input_mean"])),
            std=tuple(json.loads(facts["input_std"])),
            interpolation=facts["interpolation"],
            crop=json.loads(facts["crop"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"an ONNX file without preprocessing in its metadata ({type(error).__name__}: {error}); "
            "give files that pxcompress wrote"
        ) from error


def read_run(folder: Path, data: str = "") -> Recipe:
    """The recipe of a run folder, with other `data` where they are given; `InputError` where it is none."""
    try:
        recipe = Recipe.from_json((folder / RECIPE).read_text())
    except OSError as error:
        raise InputError(f"{str(folder)!r} is not a run folder ({error.strerror}: {RECIPE}); give one") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{RECIPE} of {str(folder)!r} is no text ({error.reason}); run again") from error
    return recipe.but(data=data) if data else recipe


def load(folder: Path | str) -> nn.Module:
    """The slim PyTorch model of a run folder, in eval mode on the CPU, from architecture, plan.json and safetensors.

    Raises `InputError` where the folder is none of ours, was written for another version of the architecture, or where
    a file is not the one that the run wrote. Nothing in the folder is executed.
    """
    return load_pruned(Path(folder)).model


def load_pruned(folder: Path) -> Pruned:
    """The same with its groups and plan; `dense` is the architecture, whose weights are not those of the run."""
    check_files(folder, read_report(folder).sha256)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            facts: Mapping[str, str] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        plan = (folder / PLAN).read_text()
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise InputError(f"{str(folder)!r} is not a run folder ({error}); expected {PLAN} and {WEIGHTS}") from error
    try:
        return _rebuilt(facts, plan, state)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:  # what is there does not fit
        reason = f"{type(error).__name__}: {short(error)}"
        raise InputError(f"the model in {str(folder)!r} cannot be built again ({reason}); run again") from error


def _rebuilt(facts: Mapping[str, str], plan: str, state: Mapping[str, Tensor]) -> Pruned:
    """The architecture of `facts`, what `plan` says removed, with the weights `state`."""
    dense = plain(Architecture.from_json(facts["architecture"]).build().eval())
    example = torch.zeros(1, *json.loads(facts["input_shape"]))
    if "outputs" in facts:
        dense = sliced(dense, example, json.loads(facts["outputs"]))
    found = find_groups(dense, example, classifier_names(dense, example), prove=False).groups
    groups = planned_groups(plan, found)
    pruned = prune(dense, groups, plan_from_json(plan, groups), example)
    model = pruned.model
    for name in state.keys() - model.state_dict().keys():
        module, _, parameter = name.rpartition(".")
        model.get_submodule(module).register_parameter(parameter, nn.Parameter(state[name]))
    load_state(model, state, (), WEIGHTS)
    return pruned


def _save_weights(model: nn.Module, subject: Subject, path: Path) -> None:
    """The slim model's state, with what `load` needs to build the module around it."""
    facts = {
        "format": "pt",
        "architecture": subject.loaded.architecture.to_json(),
        "input_shape": json.dumps(list(subject.splits.example.shape[1:])),
        "pxcompress": __version__,
    }
    if subject.whole:
        facts["outputs"] = json.dumps(subject.whole.outputs)
    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    path.write_bytes(save(state, facts))  # not `save_file`: its errors are no OSError, its files for the owner only


def _save_class_relevance(relevance: ClassRelevance, subject: Subject, path: Path) -> None:
    """Group name -> (classes, units), with names and samples of the classes as JSON in the metadata."""
    facts = {"classes": json.dumps(subject.source.classes), "samples": json.dumps(relevance.samples)}
    path.write_bytes(save({name: values.contiguous() for name, values in relevance.units.items()}, facts))


def _class_shares(slim: Slim, classes: Sequence[str]) -> tuple[ClassShare, ...]:
    """What the removed units carried of each class's relevance; nothing where no class scores were asked for."""
    if slim.class_relevance is None:
        return ()
    samples, shares = slim.class_relevance.samples, removed_shares(slim.class_relevance, slim.pruned.plan).tolist()
    return tuple(
        ClassShare(name, count, share if count else None)
        for name, count, share in zip(classes, samples, shares, strict=True)
    )


def _facts(recipe: Recipe, subject: Subject) -> dict[str, str]:
    """metadata_props of the ONNX files: provenance, and what is needed to feed them and read their answer."""
    preprocessing = subject.loaded.preprocessing
    return {
        "pxcompress": __version__,
        "recipe_sha256": recipe.hash,
        "model": recipe.model,
        "classes": json.dumps(subject.source.classes),
        "input_mean": json.dumps(preprocessing.mean),
        "input_std": json.dumps(preprocessing.std),
        "input_size": json.dumps(preprocessing.input_size),
        "interpolation": preprocessing.interpolation,
        "crop": json.dumps(preprocessing.crop),
    }


def _missed(recipe: Recipe, comparison: Comparison) -> str:
    """How a goal of speed was missed in the last measurement; empty where it was met, or is none of speed."""
    faster, took = comparison.speedup.ratio, comparison.pruned.latency_ms.p50
    if recipe.speedup is not None and faster < recipe.speedup * (1 - NEAR):
        return f"{faster:.3g}x faster, {recipe.speedup:g}x was asked for"
    if recipe.latency_ms is not None and took > recipe.latency_ms * (1 + NEAR):
        return f"{took:.4g} ms, at most {recipe.latency_ms:g} ms was asked for"
    return ""


def _loop(slim: Slim) -> Iterator[str]:
    """What a closed loop tried, for a reader."""
    if slim.attempts:
        unit = slim.pruned.plan.unit
        tried = ", ".join(
            f"{attempt.measured:.4g} (planned {attempt.planned:.4g}{', corrected' if turn else ''})"
            for turn, attempt in enumerate(slim.attempts)
        )
        allowed = f"{slim.attempts[-1].allowed:.4g} {unit} are allowed"
        yield f"plans were held against their exported files: {allowed}, measured {tried}"


def _notes(subject: Subject, files: Files, comparison: Comparison) -> tuple[str, ...]:
    """What a reader must know beside the figures."""
    notes = []
    if subject.source.embedded:
        side = subject.splits.example.shape[-1]
        size = f" at {side} x {side} pixels" if subject.loaded.preprocessing.is_image else ""
        notes.append(f"embedded data {subject.source.name!r}{size}: a demonstration, not your task")
    if subject.whole:
        task, whole = len(subject.source.classes), len(subject.whole.source.classes)
        notes.append(f"a task of {task} of the {whole} classes: the dense model, too, knows no others")
    if subject.loaded.weights == "trained-here":
        notes.append("the dense model was trained here, on that data, for a few epochs")
    if subject.loaded.weights == "factory":
        notes.append("no --checkpoint was given: the weights are those that the factory made")
    dense, classes = comparison.dense, len(subject.source.classes)
    if guesses(dense, classes):
        why = "as untrained ones do; give --checkpoint" if subject.loaded.weights == "factory" else "check its weights"
        notes.append(f"THE DENSE MODEL IS NEAR CHANCE: top-1 {dense.top1:.1%} of {classes} classes; {why}")
    if comparison.noise > BUSY:
        notes.append(
            f"THE MACHINE IS BUSY: only half of the runs lie within {comparison.noise:.0%} of p50, so p90, p99 and the "
            "throughput mean little; time them again on a quiet one: pxcompress bench FOLDER"
        )
    if comparison.placement.fallback_reason:
        notes.append(comparison.placement.fallback_reason)
    if files.certificate and files.certificate["spent"]:
        notes.append(files.certificate["spent"])
    if subject.splits.skipped:
        notes.append(f"{len(subject.splits.skipped)} images could not be read and were left out")
    return tuple(notes)
