"""Certificates for any task from a CSV file of losses: a line for each sample, a column for each model, dense first."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from pxcompress.certify.anytime import Budget
from pxcompress.certify.bounded import path_losses
from pxcompress.certify.learn_then_test import Array
from pxcompress.certify.parts import Part, check_groups
from pxcompress.certify.path import Candidate, RiskLimit, certify
from pxcompress.certify.record import CertificateRecord, Origin
from pxcompress.certify.used import hash_of
from pxcompress.checks import read_text, split_csv
from pxcompress.errors import InputError, unknown
from pxcompress.run_folder.ledger import Procedure, Samples, certify_by_plan, count_use, plan_anytime


def certify_losses(
    path: Path, limit: RiskLimit, group: str = "", earlier: CertificateRecord | None = None
) -> CertificateRecord:
    """Certify the models whose losses are in the table `path`; `limit` says whether by an anytime test.

    The models are named in its first line. With `group`, a column of words, the risk is held for each word. An anytime
    test goes on from an `earlier` certificate with the lines that it has not looked at, in a table that has grown at
    its end, or with a table of other samples. Raises `InputError`.
    """
    return count_use(*_judge(path, limit, Procedure(limit.anytime, group, earlier)))


def recompute_losses(record: CertificateRecord, data: str) -> CertificateRecord:
    """Compute a certificate of a loss table, now at `data`, again, without counting a use. Raises `InputError`."""
    again = _judge(Path(data), record.certificate.limit, Procedure.of(record))[0]
    return replace(again, data=record.data)


def _judge(path: Path, limit: RiskLimit, procedure: Procedure) -> tuple[CertificateRecord, Samples]:
    """The certificate of a table, before its use is counted, and its samples."""
    names, table, groups = read_losses(path, procedure.group)
    source = str(path.resolve())
    split = hashlib.sha256(path.read_bytes()).hexdigest()
    samples = Samples(source, split, _chain_lines(path), dict.fromkeys(names, ""))
    masks = {name: groups == name for name in np.unique(groups).tolist()} if procedure.group else {}
    rows = path_losses(limit.risk, table)
    candidates = [Candidate(name, -place, rows[place]) for place, name in enumerate(names)]
    anytime_plan = plan_anytime(samples, limit, procedure)
    budget: Budget | None = None
    seen: tuple[str, ...] = ()
    if anytime_plan is None:
        check_groups(limit, masks, len(table))
        certificate = certify(candidates, limit, masks)
    else:
        certificate, budget, seen = certify_by_plan(candidates, limit, samples, masks, anytime_plan)
    part, hashes = Part("classes" if masks else "all"), {"split": split}
    record = CertificateRecord.of(certificate, part, reserved=len(table), hashes=hashes, unit="", data=source)
    origin = Origin(earlier=procedure.earlier)
    record = replace(record, budget=budget, looked_at=seen, origin=origin).in_groups(procedure.group)
    return record, samples


def _chain_lines(path: Path) -> list[str]:
    """A hash for every line below the first that covers it and all lines before it, so that equal lines differ."""
    chain, texts = "", []
    for line in split_csv(path.read_text(encoding="utf-8-sig")):
        chain = hash_of(f"{chain}\n{line}")
        texts.append(chain)
    return texts[1:]


def read_losses(path: Path, group: str = "") -> tuple[tuple[str, ...], Array, Array]:
    """Names of the models, their losses (n, models), and the words (n,) in the column `group`, empty if none is named.

    `InputError` names the line that holds no numbers.
    """
    advice = "give a CSV in UTF-8 whose first line names the models"
    try:
        header, *lines = [*split_csv(read_text(path, advice))] or [[]]
    except csv.Error as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}); {advice}") from error
    if group and group not in header:
        raise unknown("column", group, header)
    place = header.index(group) if group else len(header)
    names = tuple(name for name in header if name != group)
    if len(names) < 2:
        raise InputError(f"{str(path)!r} has {len(names)} models; expected a column for each, the dense one first")
    rows = []
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise InputError(f"{str(path)!r}, line {number} has {len(line)} values for {len(header)} columns")
        try:
            rows.append([float(value) for value in (*line[:place], *line[place + 1 :])])
        except ValueError as error:
            raise InputError(
                f"{str(path)!r}, line {number}: {error}; expected a loss in [0, 1] for each model"
            ) from error
    words = np.array([line[place] for line in lines] if group else [])
    return names, np.array(rows).reshape(len(rows), len(names)), words
