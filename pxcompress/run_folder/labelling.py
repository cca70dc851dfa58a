"""Certificates on images without labels: only those on which the models disagree are labelled, by a person.

    request_labels -> request.json, to_label.csv, to_label.html -> certify_answers -> answers.csv, certificate.json

Goal, path and images are frozen in request.json before any label is known, since choosing alpha or the models with the
labels in view would void the guarantee.
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pxcompress.certify.anytime import Budget, certify_anytime
from pxcompress.certify.few_labels import (
    MISSING,
    check_few_labels,
    completed_labels,
    pessimistic_losses,
    random_order,
    samples_to_label,
)
from pxcompress.certify.learn_then_test import Array
from pxcompress.certify.parts import Part
from pxcompress.certify.path import RISKS, Candidate, Goal, certify
from pxcompress.certify.record import CertificateRecord, LabelCount
from pxcompress.certify.used import split_hash
from pxcompress.checks import read_record
from pxcompress.data import open_images, open_source
from pxcompress.data.batches import ImageBatches, read_images
from pxcompress.data.folder import Files
from pxcompress.data.samples import Samples
from pxcompress.deploy.export import artifact_of
from pxcompress.deploy.measure import file_bytes
from pxcompress.errors import DataError, InputError, ResultError
from pxcompress.notes import Note, silent
from pxcompress.recipe import Guarantee
from pxcompress.report.labelling_page import LabelCase, to_labelling_page
from pxcompress.report.pages import Picture
from pxcompress.run_folder.answers import Question, questions_csv, read_answers
from pxcompress.run_folder.certificate import (
    FILE,
    Verification,
    check_descending,
    is_smaller,
    predict_samples,
    read_shared_metadata,
)
from pxcompress.run_folder.differences import find_differences
from pxcompress.run_folder.ledger import compute_remaining_budget, record_certificate
from pxcompress.run_folder.names import DENSE, RECIPE, SLIM
from pxcompress.run_folder.saved import read_run

REQUEST, QUESTIONS, PAGE, ANSWERS = "request.json", "to_label.csv", "to_label.html", "answers.csv"

_SIDE = 320
"""Largest side of a picture on the page, pixels."""


@dataclass(frozen=True)
class LabelRequest:
    """What request.json holds. `files` are the models from dense to smallest, name -> path; `hashes` their sha256, and
    under "split" that of the images; `to_label` of the `images` need a label. With a `budget` the test may stop at
    any time, and begins where others on these images ended.
    """

    files: Mapping[str, str]
    unlabelled: str
    risk: str
    alpha: float
    delta: float
    hashes: Mapping[str, str]
    images: int
    to_label: int
    budget: Budget | None = None
    schema_version: Literal[1] = 1

    @property
    def goal(self) -> Goal:
        """What is to be certified."""
        return Goal(self.risk, self.alpha, self.delta, anytime=self.budget is not None)


@dataclass(frozen=True, eq=False)
class ModelAnswers:
    """What the models of a path answer on images: `predicted` classes (models, n), of which `asked` need a label.

    `order` is that of the test, in positions; images that others have looked at are not in it.
    """

    samples: Samples
    classes: tuple[str, ...]
    predicted: Array
    asked: Array
    order: Array
    hashes: Mapping[str, str]

    @property
    def questions(self) -> list[Question]:
        """The images to label, in order."""
        return [
            Question.of(self.samples.ids[place], [self.classes[answer] for answer in self.predicted[:, place]])
            for place in self.asked
        ]


def request_labels(
    files: Sequence[Path],
    unlabelled: str,
    guarantee: Guarantee,
    folder: Path,
    *,
    anytime: bool = False,
    note: Note = silent,
) -> LabelRequest:
    """Write to `folder`, a new one, which images below `unlabelled` need a label for `guarantee`; none may need any.

    `files` are a run folder, or ONNX files from dense to smallest. With `anytime` labelling may stop at any line, and
    what is not looked at stays fresh. Raises `InputError`.
    """
    file_by_name = _name_files(files, unlabelled)
    goal = replace(guarantee.goal, anytime=anytime)
    check_few_labels(goal.risk)
    if guarantee.part != "all":
        raise InputError(f"part {guarantee.part!r} needs labelled data; give --data, or leave --part out")
    if folder.exists():
        raise InputError(f"{str(folder)!r} exists, perhaps with answers; choose another with --out, or remove it")
    check_descending([(name, float(file_bytes(file)), file) for name, file in file_by_name.items()])
    observed = _observe(file_by_name, unlabelled, note)
    image_folder = str(Path(unlabelled).expanduser().resolve())
    budget = None
    if anytime:
        budget = compute_remaining_budget(image_folder, observed.hashes["split"], goal.delta, len(observed.samples))
        goal = replace(goal, delta=budget.stake)
    observed = _to_label(observed, goal, budget)
    guarantee.counted_part.check(goal, {"all": len(observed.order)})
    request = LabelRequest(
        files={name: str(file.resolve()) for name, file in file_by_name.items()},
        unlabelled=image_folder,
        risk=goal.risk,
        alpha=goal.alpha,
        delta=goal.delta,
        hashes=observed.hashes,
        images=len(observed.samples),
        to_label=len(observed.asked),
        budget=budget,
    )
    folder.mkdir(parents=True)
    (folder / REQUEST).write_text(json.dumps(asdict(request), indent=1))
    (folder / QUESTIONS).write_text(questions_csv(observed.questions))
    if request.to_label:
        note(f"drawing the page of {request.to_label} images ...")
        (folder / PAGE).write_text(_page(observed, folder))
    return request


def certify_answers(answers: Path, folder: Path, note: Note = silent) -> CertificateRecord:
    """The certificate of what `folder` asked for, by the filled table `answers`; written to the folder, with a copy of
    the table. Raises `InputError`, also where models or images have changed meanwhile.
    """
    request = read_request(folder)
    observed = _to_label(_observe(_files(request), request.unlabelled, note), request.goal, request.budget)
    if problems := _list_changes(request, observed.hashes):
        raise InputError(f"{problems[0]}; ask for labels anew, with another --out")
    record = _certificate(folder, request, observed, answers)
    # More answers to the same request are no new use: goal and path were chosen before the first of them.
    record = record_certificate(record, (folder / REQUEST).read_text())
    (folder / ANSWERS).write_bytes(answers.read_bytes())
    (folder / FILE).write_text(json.dumps(asdict(record), indent=1))
    return record


def verify_answers(folder: Path, data: str = "", note: Note = silent) -> Verification:
    """Recompute the certificate in a folder of labels from its models, its images and its answers.

    `data` says where the images are, if they have moved. Raises `InputError` where something cannot be read.
    """
    request = read_request(folder)
    try:
        record = read_record(CertificateRecord, (folder / FILE).read_text(), repr(str(folder / FILE)))
        certificate = record.certificate
    except OSError as error:
        raise InputError(f"{str(folder / FILE)!r} cannot be read ({error}); certify --answers makes one") from error
    except InputError as error:
        raise ResultError(str(error)) from error
    observed = _to_label(_observe(_files(request), data or request.unlabelled, note), request.goal, request.budget)
    if problems := _list_changes(request, observed.hashes):  # the answers are to other questions
        return Verification(record, tuple(problems))
    recomputed_record = _certificate(folder, request, observed, folder / ANSWERS).used(record.uses_before)
    problems = find_differences(record.rows, recomputed_record.rows) or _list_alterations(record, recomputed_record)
    if not is_smaller(certificate):
        problems.append("no smaller model is certified")
    return Verification(record, tuple(problems))


def next_command(folder: Path) -> str:
    """How to go on with a filled table."""
    return f"pxcompress certify --answers {QUESTIONS} --out {shlex.quote(str(folder))}"


def read_request(folder: Path) -> LabelRequest:
    """What a folder asks for; `InputError` where it is no folder of labels."""
    try:
        text = (folder / REQUEST).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{str(folder / REQUEST)!r} cannot be read ({error}); with --out give the folder that certify --unlabelled "
            "wrote"
        ) from error
    return read_record(LabelRequest, text, repr(str(folder / REQUEST)))


def _name_files(files: Sequence[Path], unlabelled: str) -> dict[str, Path]:
    """The models of a path by name; of a run folder, whose own data must not be the images, its two."""
    if len(files) == 1 and files[0].is_dir() and (files[0] / RECIPE).exists():
        recipe = read_run(files[0])
        if Path(recipe.data).is_dir():
            _check_fresh(recipe.data, unlabelled)
        return {name: files[0] / name for name in (DENSE, SLIM)}
    if len(files) < 2:
        problem = f"only {str(files[0])!r} is" if files else "no model is"
        raise InputError(f"{problem} given; expected a run folder, or ONNX files from dense to smallest")
    return {str(file): file for file in files}


def _check_fresh(data: str, unlabelled: str) -> None:
    """Raise `DataError` where an image below `unlabelled` is one of the `data` that the models were made from."""
    source = open_source(data)
    files = [pool.read for pool in (source.train, source.select, source.held_out)]
    used_paths = {(each.root / name).resolve() for each in files if isinstance(each, Files) for name in each.names}
    samples = open_images(unlabelled)
    shared_names = [name for name in samples.ids if (Path(unlabelled).expanduser() / name).resolve() in used_paths]
    if shared_names:
        raise DataError(
            f"{len(shared_names)} images of {unlabelled!r} are in the data of the run, such as {shared_names[0]!r}; "
            "certify on images that no model of the path has seen"
        )


def _files(request: LabelRequest) -> dict[str, Path]:
    files = {name: Path(path) for name, path in request.files.items()}
    for path in files.values():
        if not path.is_file():
            raise InputError(f"model {str(path)!r} is not there any more; put it back, or ask for labels anew")
    return files


def _observe(files: Mapping[str, Path], unlabelled: str, note: Note) -> ModelAnswers:
    """What `files` answer on the images below `unlabelled`; nothing is asked for yet."""
    preprocessing, classes = read_shared_metadata(list(files.values()))
    note("reading the images ...")
    reading = read_images(open_images(unlabelled), preprocessing, skip_corrupt=False)
    first_of_copies = np.sort(
        np.unique(np.array(reading.digests), return_index=True)[1]
    )  # copies are no independent samples
    store = reading.store.take(first_of_copies)
    note(f"{len(files)} models answer on {len(store)} images ...")
    batches = ImageBatches(store, 64)
    logits = [predict_samples(file, batches)[0] for file in files.values()]
    if any(each.ndim != 2 for each in logits):
        raise InputError("labels are asked for where classifiers disagree, and these are none; give --losses instead")
    predicted_classes = np.stack([each.argmax(axis=1) for each in logits])
    split = split_hash(
        f"{store.samples.ids[i]} {reading.digests[place].hex()}" for i, place in enumerate(first_of_copies)
    )
    hashes = {**{name: artifact_of(file).sha256 for name, file in files.items()}, "split": split}
    names = classes or tuple(str(index) for index in range(logits[0].shape[1]))
    return ModelAnswers(
        store.samples, names, predicted_classes, np.empty(0, int), random_order(len(store), split), hashes
    )


def _to_label(observed: ModelAnswers, goal: Goal, budget: Budget | None) -> ModelAnswers:
    """The same, with the images that need a label for `goal`, among those that the `budget` leaves."""
    order = observed.order[budget.begins :] if budget else observed.order
    positions = samples_to_label(goal.risk, observed.predicted, order, anytime=goal.anytime)
    return replace(observed, asked=positions, order=order)


def _certificate(folder: Path, request: LabelRequest, observed: ModelAnswers, answers: Path) -> CertificateRecord:
    """The certificate by the filled table `answers`, with the hashes of the table and of the request."""
    label_by_position = read_answers(answers, observed.questions, observed.classes)
    goal, dense, budget = request.goal, observed.predicted[0], request.budget
    labels = completed_labels(
        dense, {place: label_by_position.get(observed.samples.ids[place], MISSING) for place in observed.asked}
    )
    missing = (labels == MISSING)[observed.order]
    if goal.bound == "betting" and missing.any():
        raise InputError(
            f"{missing.sum()} of {len(observed.asked)} images have no label in {str(answers)!r}; {goal.risk} needs all "
            "of them: fill them in, or ask with --anytime"
        )
    counted_positions = observed.order[: missing.argmax()] if goal.anytime and missing.any() else observed.order
    candidates = [
        Candidate(
            name,
            float(file_bytes(Path(path))),
            pessimistic_losses(goal.risk, dense, predicted_classes, labels)[counted_positions],
        )
        for (name, path), predicted_classes in zip(request.files.items(), observed.predicted, strict=True)
    ]
    if budget is None:
        certificate = certify(candidates, goal)
    else:
        certificate, budget = certify_anytime(candidates, goal, budget)
    own_files = {"answers": answers, "request": folder / REQUEST}
    hashes = {
        **observed.hashes,
        **{name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in own_files.items()},
    }
    image_folder = request.unlabelled
    record = CertificateRecord.of(
        certificate, Part(), reserved=request.images, hashes=hashes, unit="bytes", data=image_folder
    )
    count = LabelCount(len(observed.asked), len(label_by_position)) if RISKS[goal.risk].needs_labels else None
    return replace(record, labels=count, budget=budget)


def _list_alterations(record: CertificateRecord, recomputed_record: CertificateRecord) -> list[str]:
    """Keys of the certificate that say something else than what is found again."""
    values, recomputed_values = asdict(record), asdict(recomputed_record)
    return [
        f"its {key!r} is not what is found again"
        for key in values
        if key != "hashes" and values[key] != recomputed_values[key]
    ] + [
        f"the {name} is not the certified one"
        for name, value in record.hashes.items()
        if recomputed_record.hashes.get(name) != value
    ]


def _list_changes(request: LabelRequest, hashes: Mapping[str, str]) -> list[str]:
    description = {"split": "the images are"}
    return [
        f"{description.get(name, f'{name!r} is')} not what labels were asked for"
        for name in hashes
        if hashes[name] != request.hashes.get(name)
    ]


def _page(observed: ModelAnswers, folder: Path) -> str:
    """The page to fill in, of a request in `folder`; no answer on it says which model gave it."""
    cases = [
        LabelCase(
            question.image,
            question.dense,
            question.pruned,
            tuple(sorted({observed.classes[answer] for answer in observed.predicted[:, place]})),
            _picture(observed.samples.load(int(place)), question.image),
        )
        for place, question in zip(observed.asked, observed.questions, strict=True)
    ]
    return to_labelling_page(cases, len(observed.samples), next_command(folder))


def _picture(image: Image.Image, name: str) -> Picture:
    """A small copy for the page; drawings and tiny images stay exact."""
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    kind = "png" if max(image.size) <= 96 else "jpeg"
    image.save(file, kind, quality=85)
    return Picture.of(file.getvalue(), kind, f"image {name}")
