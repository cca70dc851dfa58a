"""The error budget of a split: what earlier anytime certificates left of it, and what one more takes."""

from __future__ import annotations

from pxcompress.certify.anytime import Budget, staked
from pxcompress.certify.record import CertificateRecord
from pxcompress.certify.used import Use, add_use, hash_of, uses_of


def budget_of(data: str, split: str, total: float, are: int) -> Budget:
    """What the next anytime test may use of the `are` samples of a split; `InputError` where nothing is left."""
    uses = uses_of(data, split)
    begins = min(max((use.ends for use in uses), default=0), are)
    return staked(total, sum(use.lost for use in uses), begins, are)


def used(record: CertificateRecord, request: str) -> CertificateRecord:
    """`record`, entered into the record of used splits under the text of what asked for it."""
    budget = record.budget
    use = Use(hash_of(request))
    if budget is not None:
        use = Use(use.certificate, budget.begins, budget.ends, budget.stake * budget.lost)
    return record.used(add_use(record.data, record.hashes["split"], use))
