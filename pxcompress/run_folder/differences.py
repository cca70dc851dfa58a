"""Differences between a recorded certificate and the recomputed one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pxcompress.certify.path import Certificate, CertificateRow
from pxcompress.certify.record import CertificateRecord


@dataclass(frozen=True)
class Verification:
    """A recorded certificate and messages about what contradicts it; it holds if there are none."""

    record: CertificateRecord
    problems: tuple[str, ...]


def list_alterations(record: CertificateRecord, recomputed_record: CertificateRecord) -> list[str]:
    """Messages about keys of a certificate whose recomputed values differ."""
    values, recomputed_values = asdict(record), asdict(recomputed_record)
    return [
        f"its {key!r} is not what is found again"
        for key in values
        if key != "hashes" and values[key] != recomputed_values[key]
    ]


def list_other_files(hashes: Mapping[str, str], hashes_now: Mapping[str, str]) -> list[str]:
    """Messages about files and samples whose hashes differ from the certificate's."""
    return [f"the {name} is not the certified one" for name in hashes if hashes_now.get(name) != hashes[name]]


def find_differences(rows: Sequence[CertificateRow], recomputed_rows: Sequence[CertificateRow]) -> list[str]:
    """Messages about models of a certificate whose counts or p-value differ from the recomputed ones."""
    problems = []
    for row, recomputed_row in zip(rows, recomputed_rows, strict=True):
        is_same = _counts(row) == _counts(recomputed_row) and math.isclose(
            row.p_value, recomputed_row.p_value, rel_tol=1e-6
        )
        if not is_same:
            problems.append(
                f"{row.name!r} has {_describe_counts(recomputed_row, row)}, not {_describe_counts(row, recomputed_row)}"
            )
    return problems


def _describe_counts(row: CertificateRow, other_row: CertificateRow) -> str:
    """Text with those counts of `row` that differ from `other_row`, at most three, and its p-value."""
    counts = [count for count in _counts(row) if count not in _counts(other_row)][:3] or _counts(row)[:1]
    words = [f"{errors:g} errors on {n} samples" + (f" of {name!r}" if name else "") for name, n, errors in counts]
    return f"{', '.join(words)} (p = {row.p_value:.3g})"


def _counts(row: CertificateRow) -> list[tuple[str, int, float]]:
    """The counts of a row as (class, samples, errors); all samples first, under the name ""."""
    return [("", row.n, row.errors), *((each.name, each.n, each.errors) for each in row.classes)]


def find_alterations(certificate: Certificate) -> list[str]:
    """Messages about models whose p-value does not follow from their errors; only for the bound "binomial"."""
    if certificate.limit.bound != "binomial":
        return []
    problems = []
    for row in certificate.rows:
        values = [certificate.limit.p_value(1.0 * (np.arange(n) < errors)) for _, n, errors in _counts(row)]
        if not math.isclose(max(values[1:] or values), row.p_value, rel_tol=1e-6):
            problems.append(f"the p-value of {row.name!r} is not that of its errors")
        if [(name, n) for name, n, _ in _counts(row)] != [(name, n) for name, n, _ in _counts(certificate.rows[0])]:
            problems.append(f"{row.name!r} was not tested on the samples of {certificate.rows[0].name!r}")
    return problems
