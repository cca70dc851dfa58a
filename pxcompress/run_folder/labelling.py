"""Certificates on images without labels: a person labels only those on which the models disagree.

    request_labels -> request.json, to_label.csv, to_label.html -> certify_answers -> answers.csv, certificate.json

The limit of the risk, the path and the images are frozen in request.json before any label is known, since choosing
alpha or the models with the labels in view would void the guarantee.
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from pxcompress.cache import whole_file
from pxcompress.certify.anytime import Budget, certify_anytime
from pxcompress.certify.few_labels import (
    MISSING,
    check_few_labels,
    completed_labels,
    pessimistic_losses,
)
from pxcompress.certify.parts import Part, check_groups
from pxcompress.certify.path import RISKS, Candidate, RiskLimit, certify
from pxcompress.certify.record import CertificateRecord, LabelCount
from pxcompress.certify.used import hash_of
from pxcompress.checks import read_record_file
from pxcompress.data import open_images, open_source
from pxcompress.data.folder import Files
from pxcompress.deploy.measure import file_bytes
from pxcompress.errors import DataError, InputError
from pxcompress.notes import Note, begin, silent
from pxcompress.recipe import Guarantee
from pxcompress.report.labelling_page import LabelCase, to_labelling_page
from pxcompress.report.pages import Picture
from pxcompress.run_folder import ledger
from pxcompress.run_folder.answers import questions_csv, read_answers
from pxcompress.run_folder.certificate import check_descending, write_record
from pxcompress.run_folder.ledger import Procedure
from pxcompress.run_folder.names import DENSE, RECIPE, SLIM
from pxcompress.run_folder.place import whole_folder
from pxcompress.run_folder.saved import read_run
from pxcompress.run_folder.unlabelled import BY_ANSWER, ModelAnswers, observe, with_questions

REQUEST, QUESTIONS, PAGE, ANSWERS = "request.json", "to_label.csv", "to_label.html", "answers.csv"

FIXED_SIZE_TEST = Procedure()
"""The default procedure: one test of fixed size on all samples."""

_SIDE = 320
"""Largest side of a picture on the page, in pixels."""


@dataclass(frozen=True)
class LabelRequest:
    """The content of request.json: which images need a label, for which certificate.

    `files` are the models from dense to smallest, name -> path; `hashes` their sha256, and under "split" that of the
    images, `pages` those of the files that a person fills in; `to_label` of the `images` need a label. With a `budget`
    the test may stop at any time, and begins where others on these images ended, or goes on from the `earlier`
    certificate. The risk is held for every word of the column `group` of the table of images, or for every answer of
    the dense model.
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
    pages: Mapping[str, str] = field(default_factory=dict)
    group: str = ""
    earlier: CertificateRecord | None = None
    schema_version: Literal[1] = 1

    @property
    def limit(self) -> RiskLimit:
        """The risk to certify, its limit and its error probability."""
        return RiskLimit(self.risk, self.alpha, self.delta, anytime=self.budget is not None)


def request_labels(
    files: Sequence[Path],
    unlabelled: str,
    guarantee: Guarantee | RiskLimit,
    folder: Path,
    procedure: Procedure = FIXED_SIZE_TEST,
    note: Note = silent,
) -> LabelRequest:
    """Write a new `folder` that says which images of `unlabelled` need a label for `guarantee`; maybe none does.

    `files` are a run folder, or ONNX files from dense to smallest, `unlabelled` a folder of images, or a table of them.
    In an anytime test labelling may stop at any line, and what is not looked at stays fresh. Raises `InputError`.
    """
    file_by_name = _name_files(files, unlabelled)
    limit = guarantee if isinstance(guarantee, RiskLimit) else replace(guarantee.limit, anytime=procedure.anytime)
    check_few_labels(limit.risk)
    group = procedure.group or _group_of_guarantee(guarantee)
    if folder.exists():
        raise InputError(f"{str(folder)!r} exists, perhaps with answers; choose another with --out, or remove it")
    check_descending([(name, float(file_bytes(file)), file) for name, file in file_by_name.items()])
    observed = observe(file_by_name, unlabelled, group, note)
    image_folder = str(Path(unlabelled).expanduser().resolve())
    anytime_plan = ledger.plan_anytime(observed.as_samples(image_folder), limit, procedure)
    limit = limit if anytime_plan is None else replace(limit, delta=anytime_plan.budget.stake)
    observed = with_questions(observed, limit, anytime_plan)
    if procedure.earlier is None:
        check_groups(limit, {name: mask[observed.order] for name, mask in observed.masks.items()}, len(observed.order))
    request = LabelRequest(
        files={name: str(file.resolve()) for name, file in file_by_name.items()},
        unlabelled=image_folder,
        risk=limit.risk,
        alpha=limit.alpha,
        delta=limit.delta,
        hashes=observed.hashes,
        images=len(observed.samples),
        to_label=len(observed.to_label),
        budget=anytime_plan.budget if anytime_plan else None,
        group=group,
        earlier=procedure.earlier,
    )
    pages = {QUESTIONS: questions_csv(observed.questions)}
    if request.to_label:
        note(begin(f"drawing the page of {request.to_label} images"))
        pages[PAGE] = _page(observed, folder)
    request = replace(request, pages={name: hash_of(text) for name, text in pages.items()})
    _write_texts(folder, {**pages, REQUEST: json.dumps(asdict(request), indent=1)})
    return request


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Make `folder` with text files, by name, whole or not at all."""
    with whole_folder(folder, force=False) as building:
        for name, text in texts.items():
            (building / name).write_text(text, encoding="utf-8")


def _group_of_guarantee(guarantee: Guarantee | RiskLimit) -> str:
    """The group to hold the risk in: `BY_ANSWER` for part "classes", else "" for all samples together.

    Raises `InputError` for part "confident".
    """
    part = "all" if isinstance(guarantee, RiskLimit) else guarantee.part
    if part == "confident":
        raise InputError("part 'confident' needs labelled data; give --data, or leave --part out")
    return BY_ANSWER if part == "classes" else ""


def certify_answers(answers: Path, folder: Path, note: Note = silent) -> CertificateRecord:
    """The certificate that `folder` asked labels for, from the filled table `answers`.

    It is written to the folder, with a copy of the table. Raises `InputError`, also if models or images have changed
    since.
    """
    request = read_request(folder)
    observed = observe_again(request, request.unlabelled, note)
    if problems := list_changes(request, observed.hashes):
        raise InputError(f"{problems[0]}; ask for labels anew, with another --out")
    record = _certificate(folder, request, observed, answers)
    # More answers to the same request are no new use: limit and path were chosen before the first of them.
    record = ledger.count_use(
        record, observed.as_samples(request.unlabelled), (folder / REQUEST).read_text(encoding="utf-8")
    )
    with whole_file(folder / ANSWERS) as beside:
        beside.write_bytes(answers.read_bytes())
    write_record(record, folder)
    return record


def recompute_answers(folder: Path, request: LabelRequest, observed: ModelAnswers) -> CertificateRecord:
    """Compute the certificate from the answers in `folder` again, without counting a use. Raises `InputError`."""
    return _certificate(folder, request, observed, folder / ANSWERS)


def observe_again(request: LabelRequest, unlabelled: str, note: Note) -> ModelAnswers:
    """The answers of a request's models on its images, and which images need a label for it."""
    observed = observe(_files(request), unlabelled, request.group, note)
    return with_questions(observed, request.limit, _plan_anytime(request, observed))


def _plan_anytime(request: LabelRequest, observed: ModelAnswers) -> ledger.AnytimePlan | None:
    """The part of the samples that a request's test may look at; None for a test of fixed size."""
    if request.budget is None:
        return None
    return ledger.plan_again(observed.as_samples(request.unlabelled), request.budget, request.earlier)


def next_command(folder: Path) -> str:
    """The command line to continue with a filled table."""
    return f"pxcompress certify --answers {QUESTIONS} --out {shlex.quote(str(folder))}"


def read_request(folder: Path) -> LabelRequest:
    """The request in a folder. Raises `InputError` if there is none."""
    advice = "with --out give the folder that certify --unlabelled wrote"
    return read_record_file(LabelRequest, folder / REQUEST, advice)


def _name_files(files: Sequence[Path], unlabelled: str) -> dict[str, Path]:
    """The models to test by name: the ONNX `files`, or the two models of a run folder.

    Raises `DataError` if the images of `unlabelled` are part of the run's data, `InputError` for a single ONNX file.
    """
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
    """Raise `DataError` if an image below `unlabelled` is part of the `data` that the models were made from."""
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


def _certificate(folder: Path, request: LabelRequest, observed: ModelAnswers, answers: Path) -> CertificateRecord:
    """The certificate from the filled table `answers`, with the hashes of the table and of the request."""
    label_by_position = read_answers(answers, observed.questions, observed.classes)
    limit, dense, anytime_plan = request.limit, observed.predicted[0], _plan_anytime(request, observed)
    labels = completed_labels(
        dense, {place: label_by_position.get(observed.samples.ids[place], MISSING) for place in observed.to_label}
    )
    missing = (labels == MISSING)[observed.order]
    if limit.bound == "betting" and missing.any():
        raise InputError(
            f"{missing.sum()} of {len(observed.to_label)} images have no label in {str(answers)!r}; {limit.risk} needs "
            "all of them: fill them in, or ask with --anytime"
        )
    counted_positions = observed.order[: missing.argmax()] if limit.anytime and missing.any() else observed.order
    candidates = [
        Candidate(
            name,
            float(file_bytes(Path(path))),
            pessimistic_losses(limit.risk, dense, predicted_classes, labels)[counted_positions],
        )
        for (name, path), predicted_classes in zip(request.files.items(), observed.predicted, strict=True)
    ]
    masks = {name: mask[counted_positions] for name, mask in observed.masks.items()}
    budget: Budget | None = None
    seen: tuple[str, ...] = ()
    if anytime_plan is None:
        certificate = certify(candidates, limit, masks)
    else:
        before = request.earlier.rows if request.earlier else ()
        certificate, budget = certify_anytime(candidates, limit, anytime_plan.budget, masks, before)
        seen = ledger.list_looked_at(observed.as_samples(request.unlabelled), anytime_plan, budget)
    own_files = {"answers": answers, "request": folder / REQUEST}
    hashes = {
        **observed.hashes,
        **{name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in own_files.items()},
    }
    where = request.unlabelled
    part = Part("classes" if masks else "all")
    record = CertificateRecord.of(certificate, part, reserved=request.images, hashes=hashes, unit="bytes", data=where)
    count = LabelCount(len(observed.to_label), len(label_by_position)) if RISKS[limit.risk].needs_labels else None
    return replace(record, labels=count, budget=budget, looked_at=seen).in_groups(request.group)


def list_changes(request: LabelRequest, hashes: Mapping[str, str]) -> list[str]:
    """Messages about models and images that changed since labels were asked for."""
    description = {"split": "the images are"}
    return [
        f"{description.get(name, f'{name!r} is')} not what labels were asked for"
        for name in hashes
        if hashes[name] != request.hashes.get(name)
    ]


def _page(observed: ModelAnswers, folder: Path) -> str:
    """The page for a person to fill in; it does not tell which model gave which answer."""
    cases = [
        LabelCase(
            question.image,
            question.dense,
            question.pruned,
            tuple(sorted({observed.classes[answer] for answer in observed.predicted[:, place]})),
            _picture(observed.samples.load(int(place)), question.image),
        )
        for place, question in zip(observed.to_label, observed.questions, strict=True)
    ]
    return to_labelling_page(cases, len(observed.samples), next_command(folder))


def _picture(image: Image.Image, name: str) -> Picture:
    """A small copy of an image for the page; drawings and tiny images are stored without loss."""
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    kind = "png" if max(image.size) <= 96 else "jpeg"
    image.save(file, kind, quality=85)
    return Picture.of(file.getvalue(), kind, f"image {name}")
