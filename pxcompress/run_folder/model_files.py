"""Certificates of existing ONNX files, on the samples that labelled data reserve for certificates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pxcompress.certify.parts import Part
from pxcompress.certify.path import RiskLimit, certify
from pxcompress.certify.record import CertificateRecord, Origin
from pxcompress.certify.used import split_hash
from pxcompress.deploy import runtime
from pxcompress.deploy.export import artifact_of
from pxcompress.deploy.measure import file_bytes
from pxcompress.errors import InputError
from pxcompress.notes import Note, silent
from pxcompress.recipe import Guarantee
from pxcompress.run_folder.certificate import (
    Draw,
    check_descending,
    check_risk,
    choose_provider,
    choose_threshold,
    judge_candidates,
    make_record,
    reserve_samples,
)
from pxcompress.run_folder.ledger import Procedure, Samples, certify_by_plan, count_use, plan_anytime
from pxcompress.run_folder.names import DENSE, SLIM
from pxcompress.run_folder.saved import read_run


def certify_files(
    files: Sequence[Path],
    data: str,
    guarantee: Guarantee | RiskLimit,
    seed: int = 0,
    procedure: Procedure | None = None,
    note: Note = silent,
) -> CertificateRecord:
    """Certify ONNX files that pxcompress wrote, from dense to smallest, on the samples that `data` reserves.

    Returns the content of certificate.json; sizes are bytes. A single run folder stands for its dense and its pruned
    file; for it `data` may be empty, which means its own. The `procedure` says whether the test stops once it is
    decided, so that what it has not looked at stays fresh. Raises `InputError`, also for files that are not in order.
    """
    procedure = procedure or Procedure()
    skip_corrupt = False
    if len(files) == 1 and files[0].is_dir():
        recipe = read_run(files[0], data)
        data, seed, skip_corrupt = recipe.data, recipe.seed, recipe.skip_corrupt
        files = [files[0] / DENSE, files[0] / SLIM]
    if len(files) < 2:
        raise InputError(
            f"only {str(files[0])!r} is given; expected a run folder, or ONNX files from dense to smallest"
        )
    if not data:
        raise InputError("no data is given; expected --data SPEC, with samples that no model of the path has seen")
    limit, part = _split_guarantee(guarantee, procedure)
    if part.coverage is not None and procedure.anytime:
        raise InputError("part 'confident' is given with --anytime; leave one of them out")
    if repeated := [file for file in files if files.count(file) > 1]:
        raise InputError(f"{str(repeated[0])!r} is given twice; expected different models, from dense to smallest")
    origin = Origin({str(file): str(file.resolve()) for file in files}, seed, skip_corrupt, procedure.earlier)
    return count_use(*_judge(origin, Draw(data, seed, skip_corrupt, procedure.group), limit, part, procedure, note))


def recompute_files(record: CertificateRecord, data: str, note: Note) -> CertificateRecord:
    """Compute a certificate of files again on its own samples, without counting a use. Raises `InputError`."""
    assert record.origin is not None
    for file in record.origin.files.values():
        if not Path(file).is_file():
            raise InputError(f"model {file!r} is not there any more; put it back")
    part = replace(record.counted, threshold=None)
    draw = Draw(data, record.origin.seed, record.origin.skip_corrupt, record.group)
    return _judge(record.origin, draw, record.certificate.limit, part, Procedure.of(record), note)[0]


def _judge(
    origin: Origin, draw: Draw, limit: RiskLimit, part: Part, procedure: Procedure, note: Note
) -> tuple[CertificateRecord, Samples]:
    """The certificate of the files in `origin`, before its use is counted, and its samples."""
    files = [Path(file) for file in origin.files.values()]
    runtime.check_provider(procedure.provider)
    reserved = reserve_samples(files, draw, note)
    reserved = replace(reserved, provider=choose_provider(procedure.provider))
    check_risk(limit.risk, part.part, reserved.task)
    if procedure.earlier is None:
        reserved.check(limit, part)
    path = [(name, float(file_bytes(file)), file) for name, file in zip(origin.files, files, strict=True)]
    check_descending(path)
    split = split_hash(reserved.ids)
    hashes = {**{name: artifact_of(file).sha256 for name, _, file in path}, "split": split}
    samples = reserved.as_samples(hashes)
    anytime_plan = plan_anytime(samples, limit, procedure)
    part = choose_threshold(part, files[0], reserved)
    candidates, labels = judge_candidates(path, reserved, limit.risk, part)
    masks = reserved.masks(part, labels)
    if anytime_plan is None:
        certificate = certify(candidates, part.with_scope(limit), masks)
        record = make_record(certificate, part, reserved, hashes, "bytes")
    else:
        certificate, budget, seen = certify_by_plan(
            candidates, replace(limit, anytime=True), samples, masks, anytime_plan
        )
        record = make_record(certificate, part, reserved, hashes, "bytes")
        record = replace(record, budget=budget, looked_at=seen)
    return replace(record, origin=origin), samples


def _split_guarantee(guarantee: Guarantee | RiskLimit, procedure: Procedure) -> tuple[RiskLimit, Part]:
    """The risk limit, and which samples count; those of the earlier certificate if a test goes on."""
    if isinstance(guarantee, RiskLimit):
        return guarantee, procedure.part
    return guarantee.limit, guarantee.counted_part
