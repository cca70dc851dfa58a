"""Verifies a certificate by computing all of it again: of a run, of files, of a table of losses, or of labels.

Nothing is taken from a certificate but what was frozen before the samples were seen: the limit of the risk, and where
an anytime test was to begin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pxcompress.certify.path import sentence
from pxcompress.certify.record import CertificateRecord
from pxcompress.checks import read_record, read_text
from pxcompress.errors import InputError, PxError, ResultError
from pxcompress.notes import Note, begin, silent
from pxcompress.report.build import sha256_of
from pxcompress.run_folder.certificate import (
    FILE,
    Draw,
    choose_threshold,
    hash_files,
    is_smaller,
    judge_files,
    reserve_samples,
)
from pxcompress.run_folder.differences import (
    Verification,
    find_alterations,
    find_differences,
    list_alterations,
    list_other_files,
)
from pxcompress.run_folder.labelling import (
    ANSWERS,
    QUESTIONS,
    REQUEST,
    LabelRequest,
    list_changes,
    next_command,
    observe_again,
    read_request,
    recompute_answers,
)
from pxcompress.run_folder.loss_table import recompute_losses
from pxcompress.run_folder.model_files import recompute_files
from pxcompress.run_folder.names import DENSE, PLAN, RECIPE, SLIM, WEIGHTS
from pxcompress.run_folder.saved import read_run
from pxcompress.run_folder.sums import SUMS, find_altered_files, find_missing_files


def verify(folder: Path, data: str = "", note: Note = silent) -> Verification:
    """Compute the certificate in a run folder, or in a folder from `certify --out`, again.

    `data` says where the data, the images or the table of losses are if they have moved. Raises `InputError` if
    something cannot be read, and `ResultError` if there is no certificate yet, or one that contradicts itself.
    """
    if (folder / REQUEST).exists():
        return _verify_answers(folder, data, note)
    if (folder / FILE).exists() and not (folder / RECIPE).exists():
        return _verify_files(folder, data, note)
    return _verify_run(folder, data, note)


def _read_certificate(folder: Path, maker: str) -> CertificateRecord:
    """The certificate of a folder; `maker` names the command that makes one. Raises as `verify` does."""
    text = read_text(folder / FILE, f"{maker} makes one")
    try:
        record = read_record(CertificateRecord, text, repr(str(folder / FILE)))
        _ = record.certificate, record.counted
    except InputError as error:
        raise ResultError(str(error)) from error
    return record


def _verify_run(folder: Path, data: str, note: Note) -> Verification:
    """Compute the certificate of a run folder again from its files and its data.

    Checked are the digests of all files and of the split, which samples count, the losses of dense and pruned model,
    and that the decision follows from the p-values of the whole path. The models between them are not kept: their
    errors are taken from the certificate.
    """
    altered = _list_altered_files(folder) if (folder / RECIPE).is_file() else {}
    try:
        recipe = read_run(folder, data)
        _check_whole(folder)
        if SUMS not in altered and (missing := find_missing_files(folder)):
            note(f"not there any more, and so not checked: {', '.join(missing)}")
        record = _read_certificate(folder, "run with --max-drop")
        note(begin("reading the data"))
        files = [folder / DENSE, folder / SLIM]
        samples = reserve_samples(files, Draw(recipe.data, recipe.seed, recipe.skip_corrupt, record.group), note)
        samples = replace(samples, provider=record.provider)
        hashes = hash_files(folder, samples)
        note(begin(f"testing {len(files)} files on {len(samples.ids)} samples"))
        certificate, part = record.certificate, record.counted
        own_part = choose_threshold(replace(part, threshold=None), files[0], samples)
        rows = (certificate.rows[0], certificate.rows[certificate.chosen or 0])
        path = [(str(place), row.size, file) for place, (row, file) in enumerate(zip(rows, files, strict=True))]
        recomputed_certificate = judge_files(path, samples, certificate.limit, own_part)
    except PxError as error:  # what was altered may be unreadable now
        if not altered:
            raise
        raise ResultError(f"the certificate does not hold: {'; '.join(altered.values())}; {error}") from error
    problems = list_other_files(record.hashes, hashes)
    problems += [altered[name] for name in altered if name not in _NAMED_BY_CERTIFICATE]
    if not math.isclose(own_part.threshold or 0, part.threshold or 0, rel_tol=1e-6):
        problems.append(f"confident means a softmax of at least {own_part.threshold}, not {part.threshold}")
    problems += find_differences(rows, recomputed_certificate.rows)
    problems += find_alterations(certificate)
    if record.sentence != sentence(certificate, record.group) or recomputed_certificate.limit != certificate.limit:
        problems.append("its sentence is not what it shows")
    return _verification(record, problems)


_NAMED_BY_CERTIFICATE = (DENSE, SLIM, PLAN, WEIGHTS)


def _list_altered_files(folder: Path) -> dict[str, str]:
    """File name -> message, for files that changed since they were written."""
    try:
        return {name: f"{name!r} is not the file that was written" for name in find_altered_files(folder)}
    except InputError as error:
        return {SUMS: str(error)}


def _check_whole(folder: Path) -> None:
    """Raise `InputError` if a file is missing that the certificate names."""
    for name in _NAMED_BY_CERTIFICATE:
        if not (folder / name).is_file():
            raise InputError(f"{str(folder)!r} has no {name}, which its certificate is about; put it back")


def _verify_files(folder: Path, data: str, note: Note) -> Verification:
    """Compute the certificate of ONNX files on labelled data, or of a table of losses, again. Raises `InputError`."""
    record = _read_certificate(folder, "certify --out")
    if record.origin is None:
        raise InputError(
            f"{str(folder / FILE)!r} does not say which files it was made of; verify its run folder, or make it anew "
            "with certify --out"
        )
    note(begin("reading the data, and testing on it"))
    place = data or record.data
    again = recompute_files(record, place, note) if record.origin.files else recompute_losses(record, place)
    again = replace(again, data=record.data).with_uses(record.uses_before)
    return _compare(record, again)


def _compare(record: CertificateRecord, again: CertificateRecord) -> Verification:
    """Compare a recorded certificate with the recomputed one, `again`."""
    names, names_again = ([row.name for row in each.rows] for each in (record, again))
    differences = find_differences(record.rows, again.rows) if names == names_again else []
    problems = [*list_other_files(record.hashes, again.hashes), *(differences or list_alterations(record, again))]
    return _verification(record, problems)


def _verification(record: CertificateRecord, problems: list[str]) -> Verification:
    smaller = [] if is_smaller(record.certificate) else ["no smaller model is certified"]
    return Verification(record, (*problems, *smaller))


def _verify_answers(folder: Path, data: str, note: Note) -> Verification:
    """Compute the certificate in a folder of labels again from its models, its images and its answers.

    Without answers, models, images and questions alone are held against what was asked.
    """
    request = read_request(folder)
    observed = observe_again(request, data or request.unlabelled, note)
    changes = [*list_changes(request, observed.hashes), *_list_altered_pages(folder, request)]
    if not (folder / FILE).exists() and not (folder / ANSWERS).exists():
        raise ResultError(
            f"nothing is certified yet: {'; '.join(changes) or _describe_missing_answers(folder, request)}"
        )
    record = _read_certificate(folder, "certify --answers")
    if list_changes(request, observed.hashes):  # the answers are to other questions
        return Verification(record, tuple(changes))
    if not (folder / ANSWERS).exists():
        changes.append(f"{ANSWERS} is missing, without which errors cannot be counted again: put it back")
        return Verification(record, tuple(changes))
    verification = _compare(record, recompute_answers(folder, request, observed).with_uses(record.uses_before))
    return replace(verification, problems=(*verification.problems, *changes))


def _describe_missing_answers(folder: Path, request: LabelRequest) -> str:
    """A message for a folder without answers: what was verified so far, and what to do next."""
    return (
        f"{request.to_label} of {request.images} images need a label; models, images and questions are as they were "
        f"asked; fill in {QUESTIONS}, then: {next_command(folder)}"
    )


def _list_altered_pages(folder: Path, request: LabelRequest) -> Iterator[str]:
    """Messages about changed pages; the table may be unchanged, or filled in as it was certified."""
    answers = sha256_of(folder / ANSWERS) if (folder / ANSWERS).is_file() else ""
    for name, digest in request.pages.items():
        allowed = (digest, answers) if name == QUESTIONS else (digest,)
        if (folder / name).is_file() and sha256_of(folder / name) not in allowed:
            yield f"{name!r} is not the file that was written"
