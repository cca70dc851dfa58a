"""The error budget of a split: what earlier anytime certificates left of it, and what one more takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pxcompress.certify.anytime import Budget, certify_anytime, stake_budget
from pxcompress.certify.few_labels import random_order
from pxcompress.certify.path import Candidate, Certificate, Goal, check_samples
from pxcompress.certify.record import CertificateRecord
from pxcompress.certify.used import Use, add_use, hash_of, uses_of


def compute_remaining_budget(data: str, split: str, total: float, samples: int) -> Budget:
    """Error probability and first sample that the next anytime test on a split gets; `InputError` if none is left."""
    uses = uses_of(data, split)
    begins = min(max((use.ends for use in uses), default=0), samples)
    return stake_budget(total, sum(use.lost for use in uses), begins, samples)


def certify_next(candidates: Sequence[Candidate], goal: Goal, data: str, split: str) -> tuple[Certificate, Budget]:
    """An anytime certificate of a path by its losses on a split, on the samples that earlier tests did not look at."""
    losses = [np.asarray(each.losses) for each in candidates]
    budget = compute_remaining_budget(data, split, goal.delta, len(losses[0]))
    order = random_order(len(losses[0]), split)[budget.begins :]
    goal = replace(goal, delta=budget.stake)
    check_samples(len(order), goal, "left to certify on")
    rows = [each._replace(losses=values[order]) for each, values in zip(candidates, losses, strict=True)]
    return certify_anytime(rows, goal, budget)


def record_certificate(record: CertificateRecord, request: str) -> CertificateRecord:
    """Enter a certificate into the ledger of used splits, by the text of its request; returns it with what it used."""
    budget = record.budget
    use = Use(hash_of(request))
    if budget is not None:
        use = Use(use.certificate, budget.begins, budget.ends, budget.stake * budget.lost)
    return record.used(add_use(record.data, record.hashes["split"], use))
