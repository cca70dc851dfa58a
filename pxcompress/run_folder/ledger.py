"""The error budget of a split: what earlier anytime certificates left of it, and what one more takes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pxcompress.certify.anytime import Budget, certify_anytime, stake_budget
from pxcompress.certify.few_labels import random_order
from pxcompress.certify.learn_then_test import Array
from pxcompress.certify.parts import Part, check_groups
from pxcompress.certify.path import Candidate, Certificate, RiskLimit
from pxcompress.certify.record import CertificateRecord
from pxcompress.certify.used import Use, add_use, hash_of, uses_of
from pxcompress.checks import read_record
from pxcompress.errors import InputError


@dataclass(frozen=True)
class Procedure:
    """How losses are tested: whether the test may stop at any time, and goes on from the `earlier` certificate.

    The risk is held for every word of the column `group` of the data's table, where one is named. Models run on
    `provider`, where labelled data test them.
    """

    anytime: bool = False
    group: str = ""
    earlier: CertificateRecord | None = None
    provider: str = "cpu"

    @property
    def limit(self) -> RiskLimit | None:
        """That of the earlier certificate; None where there is none."""
        return self.earlier.certificate.limit if self.earlier else None

    @property
    def part(self) -> Part:
        """The samples that count in the earlier certificate."""
        return self.earlier.counted if self.earlier else Part()


@dataclass(frozen=True)
class Samples:
    """The samples of a test: where they come from, the hash of their split, their ids, and hashes of the models."""

    data: str
    split: str
    ids: Sequence[str]
    hashes: Mapping[str, str]

    @property
    def keys(self) -> tuple[str, ...]:
        """A short hash of every id, by which a later test knows which samples were looked at."""
        return tuple(hash_of(each)[:12] for each in self.ids)


def read_earlier(path: Path) -> CertificateRecord:
    """The anytime certificate at `path`, or in the folder `path`; `InputError` where there is none to go on from."""
    file = path / "certificate.json" if path.is_dir() else path
    try:
        record = read_record(CertificateRecord, file.read_text(), repr(str(file)))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{str(file)!r} cannot be read ({error}); give the certificate.json of a test with --anytime"
        ) from error
    if record.budget is None or not record.looked_at:
        raise InputError(f"{str(file)!r} is of a test of fixed size; only one with --anytime can go on")
    return record


def compute_remaining_budget(data: str, split: str, total: float, samples: int) -> Budget:
    """Error probability and first sample that the next anytime test on a split gets; `InputError` if none is left."""
    uses = uses_of(data, split)
    begins = min(max((use.ends for use in uses), default=0), samples)
    return stake_budget(total, sum(use.lost for use in uses), begins, samples)


def order_left(samples: Samples, total: float, earlier: CertificateRecord | None = None) -> tuple[Array, Budget]:
    """Positions of the samples that an anytime test may look at, in its order, and its part of the error budget.

    It begins where other tests of the split ended; one that goes on from an `earlier` certificate has all samples that
    this one has not looked at, and its stake. Raises `InputError` where nothing is left.
    """
    order = random_order(len(samples.ids), samples.split)
    if earlier is None:
        budget = compute_remaining_budget(samples.data, samples.split, total, len(order))
        return order[budget.begins :], budget
    _check_models(earlier, samples.hashes)
    assert earlier.budget is not None
    seen, keys = set(earlier.looked_at), samples.keys
    order = np.array([place for place in order if keys[place] not in seen], dtype=np.int64)
    if not len(order):
        raise InputError(f"the earlier test looked at all {len(keys)} samples; give more, to go on with them")
    count = len(earlier.looked_at)
    budget = replace(earlier.budget, begins=count, ends=count, are=count + len(order), resumed=True)
    return order, budget


def looked_at(samples: Samples, order: Array, budget: Budget, earlier: CertificateRecord | None) -> tuple[str, ...]:
    """Short hashes of all samples that the test, and those that it goes on from, have looked at."""
    keys = samples.keys
    return (*(earlier.looked_at if earlier else ()), *(keys[place] for place in order[: budget.ends - budget.begins]))


def certify_next(
    candidates: Sequence[Candidate],
    limit: RiskLimit,
    samples: Samples,
    masks: Mapping[str, Array],
    earlier: CertificateRecord | None = None,
) -> tuple[Certificate, Budget, tuple[str, ...]]:
    """An anytime certificate of a path by its losses on all samples of a split; what it has looked at comes with it.

    With `masks` (name -> (n,)) the risk is held in each of them.
    """
    order, budget = order_left(samples, limit.delta, earlier)
    limit = replace(limit, delta=budget.stake)
    masks = {name: mask[order] for name, mask in masks.items()}
    if earlier is None:
        check_groups(limit, masks, len(order), "left to certify on")
    rows = [each._replace(losses=np.asarray(each.losses)[order]) for each in candidates]
    certificate, budget = certify_anytime(rows, limit, budget, masks, earlier.rows if earlier else ())
    return certificate, budget, looked_at(samples, order, budget, earlier)


def record_certificate(record: CertificateRecord, request: str) -> CertificateRecord:
    """Enter a certificate into the ledger of used splits; returns it with the number of uses before.

    The same `request`, a text, counts as the same use when it comes again.
    """
    budget = record.budget
    use = Use(hash_of(request))
    if budget is not None:
        ends = sys.maxsize if budget.resumed else budget.ends  # samples of several splits: other tests get none of them
        use = Use(use.certificate, 0 if budget.resumed else budget.begins, ends, budget.stake * budget.lost)
    return record.used(add_use(record.data, record.hashes["split"], use))


def _check_models(earlier: CertificateRecord, hashes: Mapping[str, str]) -> None:
    """Raise `InputError` where the path is another one than that of the earlier certificate."""
    for name in (row.name for row in earlier.rows):
        if name not in hashes or hashes[name] != earlier.hashes.get(name, ""):
            raise InputError(
                f"{name!r}, of the earlier certificate, is not among the models, or changed; give its path"
            )
    others = hashes.keys() - {row.name for row in earlier.rows} - {"split"}
    if others:
        raise InputError(f"{min(others)!r} is not in the earlier certificate; give its path, no other models")
