"""Certificates for any task: from a CSV of losses, one line a sample, one column a model, from dense to smallest."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from pxcompress.certify.anytime import Budget
from pxcompress.certify.bounded import path_losses
from pxcompress.certify.learn_then_test import Array
from pxcompress.certify.parts import Part
from pxcompress.certify.path import Candidate, Goal, certify, check_samples
from pxcompress.certify.record import CertificateRecord
from pxcompress.errors import InputError
from pxcompress.run_folder.ledger import certify_next, used


def certify_losses(path: Path, goal: Goal) -> CertificateRecord:
    """The certificate of the models whose losses the table `path` holds; the goal says whether it is an anytime one.

    The models are named in its first line. Raises `InputError`.
    """
    names, table = read_losses(path)
    split = hashlib.sha256(path.read_bytes()).hexdigest()
    where = str(path.resolve())
    rows = path_losses(goal.risk, table)
    candidates = [Candidate(name, -place, rows[place]) for place, name in enumerate(names)]
    budget: Budget | None = None
    if goal.anytime:
        certificate, budget = certify_next(candidates, goal, where, split)
    else:
        check_samples(len(table), goal)
        certificate = certify(candidates, goal)
    record = CertificateRecord.of(
        certificate, Part(), reserved=len(table), hashes={"split": split}, unit="", data=where
    )
    return used(replace(record, budget=budget), f"{goal} {budget}")


def read_losses(path: Path) -> tuple[tuple[str, ...], Array]:
    """Names of the models, and their losses (n, models); `InputError` names the line that holds no numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *lines = csv.reader(file)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(
            f"{str(path)!r} cannot be read ({error}); give a CSV whose first line names the models"
        ) from error
    rows = []
    for number, line in enumerate(lines, start=2):
        try:
            rows.append([float(value) for value in line])
        except ValueError as error:
            raise InputError(
                f"{str(path)!r}, line {number}: {error}; expected a loss in [0, 1] for each model"
            ) from error
        if len(line) != len(header):
            raise InputError(f"{str(path)!r}, line {number} has {len(line)} values for {len(header)} models")
    if len(header) < 2:
        raise InputError(f"{str(path)!r} has {len(header)} column; expected one for each model, the dense one first")
    return tuple(header), np.array(rows).reshape(len(rows), len(header))
