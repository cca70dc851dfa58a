"""Makes the certificate of a run folder: exported files -> losses on reserved samples -> certificate.json, and back.

Every model of a path is exported, and its losses come from that very file: what ships is what was tested, byte for
byte. It runs on the CPU in float32, which every machine has, so that `verify` finds the same losses: on ONNX Runtime,
or on another runtime for the CPU that was asked for, which the record names.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from pxcompress.cache import cache_dir, whole_file
from pxcompress.certify.bounded import path_losses
from pxcompress.certify.learn_then_test import Array
from pxcompress.certify.parts import Part, check_groups
from pxcompress.certify.path import (
    Candidate,
    Certificate,
    RiskLimit,
    certify,
    losses,
)
from pxcompress.certify.record import CertificateRecord
from pxcompress.certify.used import check_disjoint, split_hash
from pxcompress.choices import LOSS_RISKS, one_of
from pxcompress.data import (
    Source,
    are_known_by_content,
    keep_for_certificates,
    load_splits,
    open_source,
    restrict_classes,
)
from pxcompress.data.tables import read_words
from pxcompress.deploy import runtime
from pxcompress.deploy.export import artifact_of, onnx_files, read_metadata
from pxcompress.deploy.predictions import predictions
from pxcompress.errors import DataError, InputError, list_some
from pxcompress.models.onnx_file import AUTO, is_onnx, read_ports
from pxcompress.notes import Note, silent
from pxcompress.onnx_in.channels import LAYOUT
from pxcompress.proof import Artifact
from pxcompress.recipe import Guarantee, Recipe
from pxcompress.report.build import sha256_of
from pxcompress.run import Run
from pxcompress.run_folder.ledger import Samples, count_use
from pxcompress.run_folder.names import DENSE, PLAN, SLIM, WEIGHTS
from pxcompress.run_folder.saved import preprocessing_of
from pxcompress.run_folder.served import LEFT_OUT, ServedSamples, read_served
from pxcompress.run_folder.written import Files, export_dense, export_slim, write_beside_onnx
from pxcompress.tasks import TASKS
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.task import Task
from pxcompress.types import Batches, Preprocessing, PruneResult, Splits
from pxcompress.workload import Workload

FILE = "certificate.json"
WHOLE = Part()


@dataclass(frozen=True, eq=False)
class ReservedSamples:
    """The samples reserved for certificates, and those of `select`, which set the threshold of confidence.

    `data` is the spec they come from; `counts` is their number in each class, or in all if the `task` is no
    classification. Models run on `provider`. `contents` are those of `Splits`. If a `group` is named, a column of the
    data's table, the risk is held for each of its `words` (n,).
    """

    data: str
    batches: Batches
    ids: tuple[str, ...]
    select: Batches
    counts: Mapping[str, int]
    task: Task = field(default_factory=Classification)
    provider: str = "cpu"
    contents: tuple[str, ...] = ()
    group: str = ""
    words: tuple[str, ...] = ()

    def as_samples(self, hashes: Mapping[str, str]) -> Samples:
        """The reserved samples as a `ledger.Samples`, the form that tests take."""
        return Samples(self.data, hashes["split"], self.contents, hashes)

    def masks(self, part: Part, labels: Array) -> Mapping[str, Array]:
        """Name -> mask (n,) of each part in which the risk is held: words of the group, or classes of `labels`."""
        if self.group:
            return {word: np.array(self.words) == word for word in sorted(set(self.words))}
        return part.classes(labels, list(self.counts))

    def check(self, limit: RiskLimit, part: Part) -> None:
        """Raise `DataError` if there are too few samples for a certificate, however good the models are."""
        if self.group:
            check_groups(limit, self.masks(part, np.empty(0)), len(self.ids))
        else:
            part.check(limit, self.counts)

    def predict(self, file: Path, batches: Batches) -> tuple[Array, Array]:
        """Logits (n, classes) of an ONNX file on `batches`, and the labels (n,)."""
        return predict_samples(file, batches, self.provider)

    @classmethod
    def of(cls, data: str, source: Source, splits: Splits, task: Task, group: str = "") -> ReservedSamples:
        """Collect the reserved samples of `source`, which `data` names; no image is read."""
        ids = splits.ids["certify"]
        counts = {"": len(ids)}
        if task.is_classifier:
            labels = dict(zip(source.held_out.ids, source.held_out.labels.tolist(), strict=True))
            count_by_class = Counter(source.classes[labels[sample]] for sample in ids)
            counts = {name: count_by_class[name] for name in source.classes}
        column = read_words(data, group) if group else {}
        words = tuple(column[sample] for sample in ids) if group else ()
        contents = splits.contents["certify"]
        return cls(data, splits.certify, ids, splits.select, counts, task, contents=contents, group=group, words=words)


def check_risk(risk: str, part: str, task: Task) -> None:
    """Raise `InputError` for a risk, or a part of the samples, that only classifiers have, with another task."""
    if not task.is_classifier and (risk not in LOSS_RISKS or part != "all"):
        raise InputError(
            f"risk {risk!r} and --part are for classifiers; give --risk {one_of(LOSS_RISKS)}, which bound the task's "
            "loss of a sample"
        )


def check_certifiable(recipe: Recipe, workload: Workload) -> None:
    """Raise `DataError`, before any work, if the reserved samples are too few or have another role as well."""
    if recipe.guarantee is None:
        return
    cache_dir()  # the record of used splits is kept there
    ids = workload.splits.ids
    others = {role: ids[role] for role in ids if role != "certify"}
    check_disjoint(ids["certify"], {**others, "training": workload.source.train.ids})
    _check_not_served(recipe, workload.splits)
    _reserve(recipe.guarantee, recipe, workload).check(recipe.guarantee.limit, recipe.guarantee.counted_part)


def _check_not_served(recipe: Recipe, splits: Splits) -> None:
    """Raise `DataError` if reserved samples had another role in the run that made the model or its weights."""
    sources = [Path(name) for name in (recipe.model if is_onnx(recipe.model) else None, recipe.checkpoint) if name]
    has_served = read_served(sources, silent)
    if served := sum(map(has_served, splits.contents["certify"])):
        raise DataError(
            f"{served} samples to certify on served the run that made {str(sources[0])!r} for something else; give its "
            "--seed and its --data as they were, or fresh samples"
        )


def _reserve(guarantee: Guarantee, recipe: Recipe, workload: Workload) -> ReservedSamples:
    """The samples that a run reserves for its certificate, and the provider on which models are tested on them."""
    samples = ReservedSamples.of(recipe.data, workload.source, workload.splits, workload.task, guarantee.group)
    return replace(samples, provider=choose_provider(recipe.bench.provider))


def find_smallest_certified(
    folder: Path, workload: Workload, slims: Iterable[PruneResult], run: Run
) -> tuple[PruneResult, Files]:
    """Test ever smaller models, the dense one first, and write the smallest that passes to `folder` as the run's
    result.

    Where no smaller one passes the folder holds the dense model as its model, too. certificate.json holds the whole
    path. Raises as `written.export` does.
    """
    recipe, clock = run.recipe, run.clock
    if recipe.guarantee is None:
        raise ValueError("the recipe asks for no guarantee")
    samples = _reserve(recipe.guarantee, recipe, workload)
    models = []
    with tempfile.TemporaryDirectory(prefix=".path-", dir=folder) as place:
        with clock.stage("export"):
            artifacts = [export_dense(folder / DENSE, recipe, workload)]
        for step, slim in enumerate(slims):
            models.append(slim)
            if step:
                with clock.stage(f"export step {step}"):
                    artifacts.append(export_slim(Path(place) / str(step) / SLIM, recipe, workload, slim))
        path = [
            (_name(step, slim), slim.pruned.plan.cost_planned, artifact.path)
            for step, (slim, artifact) in enumerate(zip(models, artifacts, strict=True))
        ]
        with clock.stage("certify"):
            part = choose_threshold(recipe.guarantee.counted_part, artifacts[0].path, samples)
            certificate = judge_files(path, samples, recipe.guarantee.limit, part)
        chosen_place = certificate.chosen or 0
        slim = models[chosen_place]
        small = (
            _move(artifacts[chosen_place], folder)
            if chosen_place
            else export_slim(folder / SLIM, recipe, workload, slim)
        )
    files = write_beside_onnx(folder, recipe, workload, slim, (artifacts[0], small))
    hashes = hash_files(folder, samples)
    record = make_record(certificate, part, samples, hashes, slim.pruned.plan.unit)
    record = count_use(record, samples.as_samples(hashes))
    write_record(record, folder)
    if record.spent:
        clock.say(record.spent)
    return slim, replace(files, certificate=record)


def write_record(record: CertificateRecord, folder: Path) -> None:
    """Write a certificate into `folder`, which is made if it is missing, whole or not at all."""
    with whole_file(folder / FILE) as beside:
        beside.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")


def judge_files(
    path: Iterable[tuple[str, float, Path]], samples: ReservedSamples, limit: RiskLimit, part: Part = WHOLE
) -> Certificate:
    """Certify a path of models, given as (name, size, ONNX file), the dense one first; `part` has its threshold set."""
    candidates, labels = judge_candidates(path, samples, limit.risk, part)
    return certify(candidates, part.with_scope(limit), samples.masks(part, labels))


def judge_candidates(
    path: Iterable[tuple[str, float, Path]], samples: ReservedSamples, risk: str, part: Part
) -> tuple[list[Candidate], Array]:
    """The models of a path with their losses on all samples, and the labels (n,), empty if no loss needs them."""
    if risk in LOSS_RISKS:
        return _judge_losses(list(path), samples, risk), np.empty(0, dtype=np.int64)
    candidates: list[Candidate] = []
    dense: Array | None = None
    labels = np.empty(0, dtype=np.int64)
    for name, size, file in path:
        logits, labels = samples.predict(file, samples.batches)
        dense = logits if dense is None else dense
        candidates.append(Candidate(name, size, losses(risk, dense, logits, labels, part.mask(dense))))
    return candidates, labels


def _judge_losses(path: Sequence[tuple[str, float, Path]], samples: ReservedSamples, risk: str) -> list[Candidate]:
    """The models of a path with the task's loss on every sample."""
    sessions = {name: runtime.open_session(file, samples.provider) for name, _, file in path}
    dense, task = path[0][0], samples.task
    if task.needs_targets:
        inputs, targets = next(iter(samples.batches))
        task.check(sessions[dense].outputs_of(inputs), targets)
    if task.scaled:
        selected = predictions({dense: sessions[dense]}, dense, dense, samples.select, task)
        task = task.with_scale(selected[dense].statistics)
    results = predictions(sessions, dense, dense, samples.batches, task)
    table = np.stack([task.loss(results[name].statistics).numpy() for name, _, _ in path], 1)
    rows = path_losses(risk, table)
    return [Candidate(name, size, row) for (name, size, _), row in zip(path, rows, strict=True)]


def choose_provider(provider: str) -> str:
    """The provider on which a certificate is tested: the requested one if it runs on the CPU, else "cpu"."""
    named = provider != runtime.AUTO and runtime.get_device(provider) == "cpu"
    return provider if named else "cpu"


def is_smaller(certificate: Certificate) -> bool:
    """Whether a model smaller than the dense one is certified."""
    return bool(certificate.chosen)


def choose_threshold(part: Part, dense: Path, samples: ReservedSamples) -> Part:
    """`part` with its threshold of confidence set on the select split; returned unchanged unless it is "confident"."""
    return part if part.coverage is None else part.with_threshold_from(samples.predict(dense, samples.select)[0])


def predict_samples(file: Path, batches: Batches, provider: str = "cpu") -> tuple[Array, Array]:
    """Logits (n, classes) of an ONNX file on `batches`, and the labels (n,)."""
    model = runtime.open_session(file, provider)
    pairs = [(model.predict(inputs), labels.cpu().numpy()) for inputs, labels in batches]
    return np.concatenate([logits for logits, _ in pairs]), np.concatenate([labels for _, labels in pairs])


def _name(step: int, slim: PruneResult) -> str:
    plan = slim.pruned.plan
    share = 1 - plan.cost_planned / plan.cost_dense if plan.cost_dense else 0.0
    return f"step {step}: {share:.1%} fewer {plan.unit}" if step else "dense"


def _move(artifact: Artifact, folder: Path) -> Artifact:
    """Move an exported file and the weights beside it into `folder`; names stay, since the file refers to them."""
    for file in onnx_files(artifact.path):
        shutil.move(file, folder / file.name)
    return replace(artifact, path=folder / artifact.path.name)


def hash_files(folder: Path, samples: ReservedSamples) -> dict[str, str]:
    """sha256 of the files that a certificate names, and of the ids of its samples, by what was hashed."""
    return {
        "model": artifact_of(folder / SLIM).sha256,
        "dense": artifact_of(folder / DENSE).sha256,
        "plan": sha256_of(folder / PLAN),
        "weights": sha256_of(folder / WEIGHTS),
        "split": split_hash(samples.ids),
    }


def make_record(
    certificate: Certificate, part: Part, samples: ReservedSamples, hashes: Mapping[str, str], unit: str
) -> CertificateRecord:
    """The content of certificate.json, in which this use of the samples is not counted yet."""
    part = Part("classes") if certificate.rows[0].classes else part
    record = CertificateRecord.of(
        certificate, part, reserved=len(samples.ids), hashes=hashes, unit=unit, data=samples.data
    )
    return replace(record, provider=samples.provider).in_groups(samples.group)


@dataclass(frozen=True)
class Draw:
    """How samples to certify on are drawn from `data`: as in a run with this seed; `group` as in `ReservedSamples`."""

    data: str
    seed: int = 0
    skip_corrupt: bool = False
    group: str = ""


def reserve_samples(files: Sequence[Path], draw: Draw, note: Note = silent) -> ReservedSamples:
    """Draw the certify split, with samples prepared as the models' files say.

    Samples that had another role in the runs of the files are left out, and `note` is told so. If the data come in one
    piece and are new to these runs, all samples but those of select are taken. Raises `InputError`.
    """
    data, seed = draw.data, draw.seed
    preprocessing, classes = read_shared_metadata(files)
    metadata = read_metadata(files[0])
    task = TASKS.build(metadata.get("task", "classification"))
    ports = read_ports(str(files[0]), metadata.get(LAYOUT, AUTO)) if is_onnx(metadata.get("model", "")) else None
    source = open_source(data, task, skip_corrupt=draw.skip_corrupt, seed=seed, ports=ports)
    if (
        source.layout == "classes" and classes and set(classes) <= set(source.classes)
    ):  # all of them, or the task that `run --classes` cut out
        source = restrict_classes(source, classes, seed)
    is_one_number = source.layout == "numbers" and len(source.classes) == len(classes) == 1
    if classes and source.classes != classes and not is_one_number:
        names, expected = list_some(source.classes, 4), list_some(classes, 4)
        raise InputError(
            f"data {data!r} has {len(source.classes)} classes ({names}), {str(files[0])!r} has {len(classes)} "
            f"({expected}); give the data that the models are for, with the same names"
        )
    has_served = read_served(files, note)
    splits = load_splits(source, preprocessing, seed=seed, has_served=has_served)
    if splits.served:
        note(f"{splits.served} {LEFT_OUT}")
    everything = keep_for_certificates(source)
    if everything is not source and _are_new(splits, has_served):
        all_splits = load_splits(everything, preprocessing, seed=seed, has_served=has_served)
        if not all_splits.served:
            total = sum(map(len, all_splits.ids.values()))
            note(
                f"the runs of these models have seen none of these data, so that {len(all_splits.ids['certify'])} of "
                f"{total} samples certify; the others are the select split"
            )
            source, splits = everything, all_splits
    return ReservedSamples.of(data, source, splits, task, draw.group)


def _are_new(splits: Splits, has_served: ServedSamples) -> bool:
    """Whether it is certain that no sample was used in a run of the models."""
    contents = itertools.chain.from_iterable(splits.contents.values())
    return has_served.complete and are_known_by_content(splits) and not any(map(has_served, contents))


def read_shared_metadata(files: Sequence[Path]) -> tuple[Preprocessing, tuple[str, ...]]:
    """Preprocessing and class names that all files share. Raises `InputError` if they differ."""
    metadata = [runtime.open_session(file, "cpu").metadata for file in files]
    preprocessing = [_preprocessing(file, facts_of_file) for file, facts_of_file in zip(files, metadata, strict=True)]
    for place, file in enumerate(files):
        if preprocessing[place] != preprocessing[0] or metadata[place].get("classes") != metadata[0].get("classes"):
            raise InputError(
                f"{str(file)!r} has other classes or inputs than {str(files[0])!r}; give models of one task"
            )
    return preprocessing[0], tuple(json.loads(metadata[0].get("classes", "[]")))


def _preprocessing(file: Path, metadata: Mapping[str, str]) -> Preprocessing:
    try:
        return preprocessing_of(metadata, file.parent)
    except InputError as error:
        raise InputError(f"{str(file)!r}: {error}") from error


def check_descending(path: Sequence[tuple[str, float, Path]]) -> None:
    """Raise `InputError` if a path of (name, bytes, file) is not sorted from the largest to the smallest model."""
    for (larger_name, larger_size, _), (smaller_name, smaller_size, _) in itertools.pairwise(path):
        if smaller_size > larger_size:
            raise InputError(
                f"path out of order: {smaller_name!r} has {smaller_size:.0f} bytes, {larger_name!r} before it "
                f"{larger_size:.0f}; give the models from dense to smallest"
            )
