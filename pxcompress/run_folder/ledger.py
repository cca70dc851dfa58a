"""Keeps account of the error budget of a split: what earlier anytime certificates left, and what the next one takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from pxcompress.certify.anytime import Budget, certify_anytime, stake_budget
from pxcompress.certify.few_labels import random_order
from pxcompress.certify.learn_then_test import Array
from pxcompress.certify.parts import Part, check_groups
from pxcompress.certify.path import Candidate, Certificate, RiskLimit
from pxcompress.certify.record import CertificateRecord
from pxcompress.certify.used import Use, add_use, count_seen_elsewhere, hash_of, short_hash, uses_of
from pxcompress.checks import read_record_file
from pxcompress.errors import InputError


@dataclass(frozen=True)
class Procedure:
    """How a test is done: whether it may stop at any time, and whether it goes on from the `earlier` certificate.

    If a `group` is named, a column of the data's table, the risk is held for each of its words. Models run on
    `provider` when labelled data test them. To repeat a test, `recorded` is the budget that it had.
    """

    anytime: bool = False
    group: str = ""
    earlier: CertificateRecord | None = None
    provider: str = "cpu"
    recorded: Budget | None = None

    @classmethod
    def of(cls, record: CertificateRecord) -> Procedure:
        """The procedure of a certificate, to compute it again."""
        earlier = record.origin.earlier if record.origin else None
        return cls(record.anytime, record.group, earlier, record.provider, record.budget)

    @property
    def limit(self) -> RiskLimit | None:
        """The risk limit of the earlier certificate; None if there is none."""
        return self.earlier.certificate.limit if self.earlier else None

    @property
    def part(self) -> Part:
        """The samples that count in the earlier certificate; all if there is none."""
        return self.earlier.counted if self.earlier else Part()


@dataclass(frozen=True)
class Samples:
    """The samples of a test.

    It has the data they come from, the hash of their split, texts that identify each one's content, and hashes of the
    models.
    """

    data: str
    split: str
    contents: Sequence[str]
    hashes: Mapping[str, str]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """A short hash of every sample, by which a later test recognises those that were looked at."""
        return tuple(map(short_hash, self.contents))

    @cached_property
    def order(self) -> Array:
        """Indices of all samples in random order, always the same: the order in which an anytime test looks at them."""
        return random_order(len(self.contents), self.split)


@dataclass(frozen=True, eq=False)
class AnytimePlan:
    """Which samples of a split an anytime test may look at, as indices in order, and its share of the error budget.

    If the test continues one that ended in a certificate, that is `earlier`.
    """

    order: Array
    budget: Budget
    earlier: CertificateRecord | None = None


def read_earlier(path: Path) -> CertificateRecord:
    """The anytime certificate at `path`, or in the folder `path`. Raises `InputError` if it cannot be continued."""
    file = path / "certificate.json" if path.is_dir() else path
    record = read_record_file(CertificateRecord, file, "give the certificate.json of a test with --anytime")
    if record.budget is None or not record.looked_at:
        raise InputError(f"{str(file)!r} is of a test of fixed size; only one with --anytime can go on")
    return record


def plan_anytime(samples: Samples, limit: RiskLimit, procedure: Procedure) -> AnytimePlan | None:
    """The plan of an anytime test, or of the one that is repeated; None for a test of fixed size."""
    if not procedure.anytime:
        return None
    if procedure.recorded is not None:
        return plan_again(samples, procedure.recorded, procedure.earlier)
    return plan_next(samples, limit.delta, procedure.earlier)


def plan_next(samples: Samples, total: float, earlier: CertificateRecord | None = None) -> AnytimePlan:
    """Plan the next anytime test of a split, within an error budget of `total` for all its tests.

    It begins with the sample after the last one that other tests of the split looked at. A test that continues an
    `earlier` certificate has all samples that this one has not looked at, and its share of the budget. Raises
    `InputError` where no samples or no budget are left, and where the data have changed, since samples that served
    other tests already would be looked at again.
    """
    if earlier is not None:
        _check_models(earlier, samples.hashes)
        assert earlier.budget is not None
        order, count = _find_unseen(samples, earlier), len(earlier.looked_at)
        if not len(order):
            raise InputError(
                f"the earlier test looked at all {len(samples.keys)} samples; give more, to go on with them"
            )
        budget = replace(earlier.budget, begins=count, ends=count, samples=count + len(order), resumed=True)
        return AnytimePlan(order, budget, earlier)
    if count := count_seen_elsewhere(samples.data, samples.split, samples.keys):
        raise InputError(
            f"{count} of these {len(samples.keys)} samples served certificates before the data changed; to go on from "
            "one made with --anytime, give --resume FOLDER, else give the new samples alone"
        )
    uses = uses_of(samples.data, samples.split)
    begins = min(max((use.ends for use in uses), default=0), len(samples.keys))
    return AnytimePlan(
        samples.order[begins:], stake_budget(total, sum(use.lost for use in uses), begins, len(samples.keys))
    )


def plan_again(samples: Samples, budget: Budget, earlier: CertificateRecord | None = None) -> AnytimePlan:
    """The plan that a test had, from the `budget` in its certificate or in its request for labels."""
    order = samples.order[budget.begins :] if earlier is None else _find_unseen(samples, earlier)
    return AnytimePlan(
        order, replace(budget, ends=budget.begins, samples=budget.begins + len(order), lost=False), earlier
    )


def _find_unseen(samples: Samples, earlier: CertificateRecord) -> Array:
    """Indices of the samples that an earlier certificate has not looked at, in the order of the test."""
    seen = set(earlier.looked_at)
    return np.array([place for place in samples.order if samples.keys[place] not in seen], dtype=np.int64)


def list_looked_at(samples: Samples, anytime_plan: AnytimePlan, budget: Budget) -> tuple[str, ...]:
    """Short hashes of all samples that a test, and the earlier ones it continues, have looked at.

    `budget` is the test's budget after it ended.
    """
    places = anytime_plan.order[: budget.ends - budget.begins]
    return (
        *(anytime_plan.earlier.looked_at if anytime_plan.earlier else ()),
        *(samples.keys[place] for place in places),
    )


def certify_by_plan(
    candidates: Sequence[Candidate],
    limit: RiskLimit,
    samples: Samples,
    masks: Mapping[str, Array],
    anytime_plan: AnytimePlan,
) -> tuple[Certificate, Budget, tuple[str, ...]]:
    """Certify the smallest of ever smaller models, the `candidates`, by an anytime test on their losses.

    The error probability is the plan's stake, whatever `limit` has. Returns the certificate, the budget after the test,
    and short hashes of the samples that it looked at. With `masks` (name -> booleans (n,), one for each sample) the
    risk has to stay below the limit in each of these groups of samples.
    """
    limit = replace(limit, delta=anytime_plan.budget.stake)
    masks = {name: mask[anytime_plan.order] for name, mask in masks.items()}
    if anytime_plan.earlier is None:
        check_groups(limit, masks, len(anytime_plan.order), "left to certify on")
    rows = [each._replace(losses=np.asarray(each.losses)[anytime_plan.order]) for each in candidates]
    before = anytime_plan.earlier.rows if anytime_plan.earlier else ()
    certificate, budget = certify_anytime(rows, limit, anytime_plan.budget, masks, before)
    return certificate, budget, list_looked_at(samples, anytime_plan, budget)


def count_use(record: CertificateRecord, samples: Samples, request: str = "") -> CertificateRecord:
    """Record a certificate as a use of its split; returns it with the number of earlier uses of its samples.

    A repeated `request` is no new use; without one, a repeated certificate is none.
    """
    budget = record.budget
    use = Use(hash_of(request or json.dumps(asdict(record))))
    if budget is not None:
        ends = sys.maxsize if budget.resumed else budget.ends  # samples of several splits: other tests get none of them
        use = Use(use.certificate, 0 if budget.resumed else budget.begins, ends, budget.stake * budget.lost)
    keys = [samples.keys[place] for place in samples.order]
    return record.with_uses(add_use(samples.data, samples.split, keys, use))


def _check_models(earlier: CertificateRecord, hashes: Mapping[str, str]) -> None:
    """Raise `InputError` if the models are not those of the earlier certificate."""
    for name in (row.name for row in earlier.rows):
        if name not in hashes or hashes[name] != earlier.hashes.get(name, ""):
            raise InputError(
                f"{name!r}, of the earlier certificate, is not among the models, or changed; give its path"
            )
    others = hashes.keys() - {row.name for row in earlier.rows} - {"split"}
    if others:
        raise InputError(f"{min(others)!r} is not in the earlier certificate; give its path, no other models")
