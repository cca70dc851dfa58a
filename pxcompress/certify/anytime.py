"""Tests that may stop at any time, so that a split can be used again: what a test has not looked at stays fresh.

A test goes through the samples of a split one by one, and stops as soon as the path is decided. The next one begins
where it stopped, at samples that have told nothing yet, whatever was learned from the first. All share one error
budget: a test stakes half of what is left, and loses its stake only where a model of its path does not pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from pxcompress.certify.learn_then_test import BETS, Array, log_capitals, log_wealth
from pxcompress.certify.path import Candidate, Certificate, CertificateRow, ClassResult, RiskLimit, certify, judge
from pxcompress.errors import InputError

Part = TypeVar("Part", CertificateRow, ClassResult)
"""Type of a row of a certificate: of a whole model, or of one class of it."""

STAKE = 0.5
"""Share of the remaining error budget (the allowed chance of a wrong certificate) that one anytime test uses."""


@dataclass(frozen=True)
class Budget:
    """The samples and the error budget that an anytime test may use of a split.

    It looks at the samples numbered from `begins` up to `ends`, of `samples` in all. `total` is the allowed chance that
    any certificate on them is wrong, `left` what earlier tests left of it, and `stake` the part that this test uses up
    if it is `lost`, which means that a model of its path did not pass. A `resumed` test goes on with the stake of an
    earlier one.
    """

    total: float
    left: float
    stake: float
    begins: int
    ends: int
    samples: int
    lost: bool = False
    resumed: bool = False

    @property
    def left_after(self) -> float:
        """The error budget that remains for later tests of the split."""
        return self.left - self.stake * self.lost

    @property
    def words(self) -> str:
        """Words on what the test used of samples and error budget, and what remains unless it continued another."""
        if self.resumed:
            return (
                f"samples {self.begins + 1} to {self.ends} of {self.samples} were looked at, going on from an earlier "
                f"certificate with its stake of {self.stake:.4g}"
            )
        return (
            f"samples {self.begins + 1} to {self.ends} of {self.samples} were looked at, and {self.stake:.4g} of the "
            f"error budget of {self.total:.4g} staked. LEFT for other tests: {self.samples - self.ends} samples, and a "
            f"budget of {self.left_after:.4g}"
        )


def stake_budget(total: float, lost: float, begins: int, samples: int) -> Budget:
    """The budget of the next test of a split: a share of `total`, of which earlier tests have `lost` some.

    The test starts at sample `begins` of `samples`. Raises `InputError` where no samples or no budget remain.
    """
    remaining_error = total - lost
    if remaining_error <= 1e-6 or begins >= samples:
        raise InputError(
            f"nothing is left of these samples: {begins} of {samples} were looked at, and {lost:.4g} of the error "
            f"budget of {total:.4g} are lost; certify on fresh samples, or give a lower --confidence"
        )
    return Budget(total, remaining_error, STAKE * remaining_error, begins, begins, samples)


def certify_anytime(
    candidates: Sequence[Candidate],
    limit: RiskLimit,
    budget: Budget,
    classes: Mapping[str, Array] | None = None,
    before: Sequence[CertificateRow] = (),
) -> tuple[Certificate, Budget]:
    """Certify a path of models by a test that may stop early, on the samples from where the `budget` begins.

    Losses end where labels do; the test stops there or earlier. With `classes` (name -> mask of the losses) every one
    of them has to pass: each has a capital of its own. `before` are the rows of an earlier certificate of the path, on
    other samples, from whose capitals the test goes on. Returns the budget with what was used of it, too.
    """
    masks = dict(classes or {})
    stop = stopping_time([np.asarray(each.losses) for each in candidates], limit, masks, before)
    masks = {name: mask[:stop] for name, mask in masks.items()}
    candidates = [each._replace(losses=np.asarray(each.losses)[:stop]) for each in candidates]
    rows = certify(candidates, limit, masks).rows
    earlier: Sequence[CertificateRow | None] = before or [None] * len(rows)
    rows = tuple(
        _with_capital(row, np.asarray(candidate.losses), limit, masks, one)
        for row, candidate, one in zip(rows, candidates, earlier, strict=True)
    )
    certificate = judge(limit, rows)
    return certificate, replace(budget, ends=budget.begins + stop, lost=not all(certificate.certified))


def _with_capital(
    row: CertificateRow, losses: Array, limit: RiskLimit, masks: Mapping[str, Array], before: CertificateRow | None
) -> CertificateRow:
    """`row` with the capital of each of its bets after these losses, added to what an earlier test (`before`) has
    seen.
    """
    if not masks:
        return _continue_test(row, losses, limit, before)
    earlier = {each.name: each for each in before.classes} if before else {}
    classes = tuple(
        _continue_test(each, losses[masks[each.name]], limit, earlier.get(each.name)) for each in row.classes
    )
    return replace(
        row,
        n=row.n + (before.n if before else 0),
        errors=row.errors + (before.errors if before else 0),
        p_value=max(each.p_value for each in classes),
        classes=classes,
    )


def _continue_test(row: Part, losses: Array, limit: RiskLimit, before: CertificateRow | ClassResult | None) -> Part:
    """`row` for these losses after the earlier ones in `before`: summed counts, the largest wealth so far, and the last
    capitals.
    """
    start = before.capital if before else (0.0,) * len(BETS)
    values, alpha = limit.in_unit(losses), limit.in_unit(limit.alpha)
    last = tuple(log_capitals(values, alpha, start)[:, -1].tolist()) if len(losses) else start
    if before is None:
        return replace(row, capital=last)
    wealth = log_wealth(values, alpha, start).max(initial=0.0)
    return replace(
        row,
        n=row.n + before.n,
        errors=row.errors + before.errors,
        p_value=min(before.p_value, math.exp(-wealth)),
        capital=last,
    )


def stopping_time(
    path: Sequence[Array],
    limit: RiskLimit,
    classes: Mapping[str, Array] | None = None,
    before: Sequence[CertificateRow] = (),
) -> int:
    """How many losses (n,) of every model the test must look at until it knows which models pass; at most n.

    Each model is decided once it has passed, in every one of the `classes`, or once the opposite bet shows that its
    risk is too high; after one that is too bad the next models are not needed. Models that passed `before` need no more
    losses.
    """
    needed_samples = 0
    for place, losses in enumerate(path):
        row = before[place] if before else None
        passes, fails = _decide(losses, limit, classes or {}, row)
        needed_samples = max(needed_samples, min(passes, fails))
        if passes > fails or passes > len(losses):
            break
    return min(needed_samples, len(path[0]))


def _decide(
    losses: Array, limit: RiskLimit, classes: Mapping[str, Array], before: CertificateRow | None
) -> tuple[int, int]:
    """How many of n losses it takes until a model passes in all classes, and until it fails in one; n + 1: never."""
    masks = classes or {"": np.ones(len(losses), dtype=bool)}
    earlier: Mapping[str, CertificateRow | ClassResult] = {}
    if before is not None:
        earlier = {each.name: each for each in before.classes} if classes else {"": before}
    passes, fails = 0, len(losses) + 1
    for name, mask in masks.items():
        places = np.append(np.flatnonzero(mask) + 1, len(losses) + 1)
        row = earlier.get(name)
        if row is None or row.p_value > limit.delta:
            growing, other = _wealths(losses[mask], limit, row.capital if row else 0.0)
            passes = max(passes, int(places[_first(growing >= -math.log(limit.delta))]))
            fails = min(fails, int(places[_first(other >= -math.log(limit.delta))]))
    return passes, fails


def _wealths(losses: Array, limit: RiskLimit, start: ArrayLike = 0.0) -> tuple[Array, Array]:
    """Logarithms of two capitals after each loss: of the bet that the risk is below alpha, and of the bet that it is
    above.
    """
    values, alpha = limit.in_unit(np.asarray(losses)), limit.in_unit(limit.alpha)
    return log_wealth(values, alpha, start), log_wealth(1 - values, 1 - alpha)


def _first(reached: Array) -> int:
    """Index of the first True in `reached`; its length where there is none."""
    return int(reached.argmax()) if reached.any() else len(reached)
