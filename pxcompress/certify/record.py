"""What certificate.json holds: a certificate, which samples it is about, and the files and the use that it records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from pxcompress.certify.anytime import Budget
from pxcompress.certify.parts import Part
from pxcompress.certify.path import Certificate, CertificateRow, RiskLimit, judge, sentence, spent
from pxcompress.errors import InputError


@dataclass(frozen=True)
class LabelCount:
    """How many samples needed a label, since models disagree on them, and how many of these have one."""

    asked: int
    answered: int


@dataclass(frozen=True)
class Origin:
    """The inputs of `certify`, beside the limit and the data, so that `verify` can repeat it.

    `files` are the models, name -> path; a table of losses has none. `seed` and `skip_corrupt` say how the data are
    cut, `earlier` is the certificate that an anytime test goes on from.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    skip_corrupt: bool = False
    earlier: CertificateRecord | None = None


@dataclass(frozen=True)
class CertificateRecord:
    """A certificate as it is written to disk; every field is a key of certificate.json.

    `risk` to `bound` are the limit of the risk and its p-value. `part` to `threshold` say which samples count: `n` of
    the `reserved` ones. Sizes are in `size_unit`. `hashes` are sha256, by the name of what was hashed. `spent` explains
    what it means that the samples of `data` served `uses_before` certificates. `labels` is given where the data had
    none; `group` is the column of a table whose words are the classes. A test that may stop at any time has a `budget`,
    what it used and what is left, and in `looked_at` a short hash of every sample it has seen, so that a later test can
    go on with others; 1 / p of its rows is the largest wealth of their bets. Models ran on `provider`. The `origin` is
    given where neither a run folder nor a request says what was tested.
    """

    risk: str
    alpha: float
    delta: float
    scope: str
    bound: str
    rows: tuple[CertificateRow, ...]
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
    origin: Origin | None = None
    schema_version: Literal[1] = 1

    @classmethod
    def of(
        cls, certificate: Certificate, part: Part, *, reserved: int, hashes: Mapping[str, str], unit: str, data: str
    ) -> CertificateRecord:
        """The record of a certificate on `reserved` samples of `data`; `part` says which of them count."""
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

    def in_groups(self, group: str) -> CertificateRecord:
        """A copy whose sentence says that the classes are values of the column `group`.

        Unchanged if `group` is empty.
        """
        return replace(self, group=group, sentence=sentence(self._verdict, group)) if group else self

    def with_uses(self, uses_before: int) -> CertificateRecord:
        """A copy that says that `uses_before` certificates used its samples before, and what that means for it."""
        return replace(self, uses_before=uses_before, spent=spent(uses_before, self.delta).message)

    @property
    def _verdict(self) -> Certificate:
        return judge(RiskLimit(self.risk, self.alpha, self.delta, self.scope, self.anytime), self.rows)

    @property
    def certificate(self) -> Certificate:
        """The certificate, decided again from its p-values.

        Raises `InputError` where the choice does not follow from its own p-values, or its error probability from its
        own budget.
        """
        verdict = self._verdict
        if (verdict.chosen, verdict.certified) != (self.chosen, self.certified):
            raise InputError("the certificate's choice does not follow from its own p-values; make it anew")
        stake = self.budget.stake if self.budget else None
        if self.anytime != (stake is not None) or stake not in (None, self.delta):
            raise InputError("the certificate's delta does not follow from its own error budget; make it anew")
        return verdict

    @property
    def counted(self) -> Part:
        """The `Part` of samples that count; all samples where the risk is held in the groups of a column."""
        return Part() if self.group else Part(self.part, self.coverage, self.threshold)
