"""What certificate.json holds: a certificate, which samples it is about, and the files and the use that it records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

from pxcompress.certify.anytime import Budget
from pxcompress.certify.parts import Part
from pxcompress.certify.path import Certificate, RiskLimit, Tested, judge, sentence, spent
from pxcompress.errors import InputError


@dataclass(frozen=True)
class LabelCount:
    """How many samples needed a label, since models disagree on them, and how many of these got one."""

    asked: int
    answered: int


@dataclass(frozen=True)
class CertificateRecord:
    """A certificate as it is written down; every field is a key of certificate.json.

    `risk` to `bound` are the limit of the risk and its p-value, `part` to `threshold` the samples that count, `n` of
    the `reserved` ones. Sizes are in `size_unit`. `hashes` are sha256 by what they are of. `spent` says that the
    samples of `data` served `uses_before` certificates. `labels` is there where the data had none; `group` is the
    column of a table whose words are the classes. A test that may stop at any time has a `budget`, what it used and
    what is left, and in `looked_at` a short hash of every sample it has seen, so that it can go on with others; 1 / p
    of its rows is the largest wealth of their bets. Models ran on `provider`.
    """

    risk: str
    alpha: float
    delta: float
    scope: str
    bound: str
    rows: tuple[Tested, ...]
    certified: tuple[bool, ...]
    chosen: int | None
    chosen_name: str | None
    n: int
    sentence: str
    part: str
    coverage: float | None
    threshold: float | None
    reserved: int
    hashes: Mapping[str, str]
    size_unit: str
    data: str
    uses_before: int
    spent: str
    labels: LabelCount | None = None
    anytime: bool = False
    budget: Budget | None = None
    group: str = ""
    looked_at: tuple[str, ...] = ()
    provider: str = "cpu"
    schema_version: Literal[1] = 1

    @classmethod
    def of(
        cls, certificate: Certificate, part: Part, *, reserved: int, hashes: Mapping[str, str], unit: str, data: str
    ) -> CertificateRecord:
        """The record of a certificate on `reserved` samples of `data`, of which `part` counts."""
        return cls(
            **asdict(certificate.limit),
            bound=certificate.limit.bound,
            rows=certificate.rows,
            certified=certificate.certified,
            chosen=certificate.chosen,
            chosen_name=certificate.chosen_name,
            n=certificate.rows[certificate.chosen or 0].n,
            sentence=sentence(certificate),
            **asdict(part),
            reserved=reserved,
            hashes=hashes,
            size_unit=unit,
            data=data,
            uses_before=0,
            spent="",
        )

    def used(self, uses_before: int) -> CertificateRecord:
        """A copy that says that its samples served `uses_before` certificates before, and what that means for it."""
        return replace(self, uses_before=uses_before, spent=spent(uses_before, self.delta).message)

    @property
    def certificate(self) -> Certificate:
        """The certificate, judged again; `InputError` where the choice does not follow from its own p-values."""
        verdict = judge(RiskLimit(self.risk, self.alpha, self.delta, self.scope, self.anytime), self.rows)
        if (verdict.chosen, verdict.certified) != (self.chosen, self.certified):
            raise InputError("the certificate's choice does not follow from its own p-values; make it anew")
        return verdict

    @property
    def counted(self) -> Part:
        """The samples that count."""
        return Part(self.part, self.coverage, self.threshold)
