"""Certificates of ONNX files that are already there, on the samples that labelled data reserve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from pxcompress.certify.learn_then_test import Array
from pxcompress.certify.parts import Part, check_groups
from pxcompress.certify.path import RiskLimit, certify
from pxcompress.certify.record import CertificateRecord
from pxcompress.certify.used import split_hash
from pxcompress.data.tables import read_words
from pxcompress.deploy import runtime
from pxcompress.deploy.export import artifact_of
from pxcompress.deploy.measure import file_bytes
from pxcompress.errors import InputError
from pxcompress.recipe import Guarantee
from pxcompress.run_folder.certificate import (
    ReservedSamples,
    check_descending,
    choose_provider,
    choose_threshold,
    judge_candidates,
    make_record,
    reserve_samples,
)
from pxcompress.run_folder.ledger import Procedure, Samples, certify_next, record_certificate
from pxcompress.run_folder.names import DENSE, SLIM
from pxcompress.run_folder.saved import read_run


def certify_files(
    files: Sequence[Path],
    data: str,
    guarantee: Guarantee | RiskLimit,
    seed: int = 0,
    procedure: Procedure | None = None,
) -> CertificateRecord:
    """Test ONNX files that pxcompress wrote, from dense to smallest, on the samples that `data` reserves.

    Returns what certificate.json would hold; sizes are bytes. A single run folder stands for its dense and its pruned
    file. `data` may be empty for it: its own. The `procedure` says whether the test stops when it is decided, so that
    what it has not looked at stays fresh. Raises `InputError`, also for files that are not in order.
    """
    procedure, skip_corrupt = procedure or Procedure(), False
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
    if part.coverage is not None and (procedure.anytime or procedure.group):
        raise InputError("part 'confident' is given with --anytime or --group; leave one of them out")
    runtime.check_provider(procedure.provider)
    samples = replace(reserve_samples(files, data, seed, skip_corrupt), provider=choose_provider(procedure.provider))
    if not procedure.group and procedure.earlier is None:
        part.check(limit, samples.counts)
    path = [(str(file), float(file_bytes(file)), file) for file in files]
    check_descending(path)
    split = split_hash(samples.ids)
    hashes = {**{name: artifact_of(file).sha256 for name, _, file in path}, "split": split}
    part = choose_threshold(part, files[0], samples)
    candidates, labels = judge_candidates(path, samples, limit.risk, part)
    masks = _masks(samples, labels, part.classes(labels, list(samples.counts)), procedure)
    if procedure.group and not procedure.anytime:
        check_groups(limit, masks, len(samples.ids))
    if not procedure.anytime:
        certificate = certify(candidates, part.with_scope(limit), masks)
        shown = Part("classes") if masks else part
        return replace(make_record(certificate, shown, samples, hashes, "bytes"), group=procedure.group)
    given = Samples(data, split, samples.ids, hashes)
    certificate, budget, seen = certify_next(candidates, replace(limit, anytime=True), given, masks, procedure.earlier)
    shown = Part("classes" if masks else "all")
    record = CertificateRecord.of(certificate, shown, reserved=len(samples.ids), hashes=hashes, unit="bytes", data=data)
    record = replace(record, group=procedure.group, budget=budget, looked_at=seen, provider=samples.provider)
    return record_certificate(record, f"{budget.begins} {asdict(record)}")


def _split_guarantee(guarantee: Guarantee | RiskLimit, procedure: Procedure) -> tuple[RiskLimit, Part]:
    """What is to be promised, and about which samples; those of the earlier certificate where a test goes on."""
    if isinstance(guarantee, RiskLimit):
        return guarantee, procedure.part
    return guarantee.limit, guarantee.counted_part


def _masks(
    samples: ReservedSamples, labels: Array, classes: Mapping[str, Array], procedure: Procedure
) -> Mapping[str, Array]:
    """The parts in each of which the risk is held: classes by label, or the words of a column of the data's table."""
    if not procedure.group:
        return classes
    words = read_words(samples.data, procedure.group)
    column = np.array([words[sample] for sample in samples.ids])
    return {name: column == name for name in np.unique(column).tolist()}
