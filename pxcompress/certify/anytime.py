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
from pxcompress.certify.path import Candidate, Certificate, ClassResult, RiskLimit, Tested, certify, judge
from pxcompress.errors import InputError

Part = TypeVar("Part", Tested, ClassResult)
"""A row of a certificate, or one of its classes."""

STAKE = 0.5
"""Share of what is left of the error budget that a test stakes."""


@dataclass(frozen=True)
class Budget:
    """What an anytime test may use of a split, and what it leaves.

    It looks at samples from `begins` on, up to `ends`, of `samples` in all. `total` is the chance that any
    certificate on them is wrong, `left` what is left of it before this one, which stakes `stake`. A `resumed` test
    goes on with the stake of an earlier one.
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
        """Error budget that is left for later tests of the split."""
        return self.left - self.stake * self.lost

    @property
    def words(self) -> str:
        """What the test used of the samples and of the error budget, and what is left, in a sentence."""
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
    """The part of the error budget `total` that the next test of a split gets, of which earlier ones have `lost` some.

    Raises `InputError` where nothing is left: samples or budget.
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
    before: Sequence[Tested] = (),
) -> tuple[Certificate, Budget]:
    """The certificate of a path by the losses of samples from where the `budget` begins, in the order of the test.

    Losses end where labels do; the test stops there or earlier. With `classes` (name -> mask of the losses) every one
    of them has to pass: each has a capital of its own. `before` are the rows of an earlier certificate of the path, on
    other samples, from whose capitals the test goes on. Returns the budget with what was used of it, too.
    """
    masks = dict(classes or {})
    stop = stopping_time([np.asarray(each.losses) for each in candidates], limit, masks, before)
    masks = {name: mask[:stop] for name, mask in masks.items()}
    candidates = [each._replace(losses=np.asarray(each.losses)[:stop]) for each in candidates]
    rows = certify(candidates, limit, masks).rows
    earlier: Sequence[Tested | None] = before or [None] * len(rows)
    rows = tuple(
        _with_capital(row, np.asarray(candidate.losses), limit, masks, one)
        for row, candidate, one in zip(rows, candidates, earlier, strict=True)
    )
    certificate = judge(limit, rows)
    return certificate, replace(budget, ends=budget.begins + stop, lost=not all(certificate.certified))


def _with_capital(
    row: Tested, losses: Array, limit: RiskLimit, masks: Mapping[str, Array], before: Tested | None
) -> Tested:
    """`row` with its capitals, and with what was seen before."""
    if not masks:
        return _go_on(row, losses, limit, before)
    earlier = {each.name: each for each in before.classes} if before else {}
    classes = tuple(_go_on(each, losses[masks[each.name]], limit, earlier.get(each.name)) for each in row.classes)
    return replace(
        row,
        n=row.n + (before.n if before else 0),
        errors=row.errors + (before.errors if before else 0),
        p_value=max(each.p_value for each in classes),
        classes=classes,
    )


def _go_on(row: Part, losses: Array, limit: RiskLimit, before: Tested | ClassResult | None) -> Part:
    """`row` of these losses, after those `before`: sums, the largest wealth there ever was, and the last capitals."""
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
    path: Sequence[Array], limit: RiskLimit, classes: Mapping[str, Array] | None = None, before: Sequence[Tested] = ()
) -> int:
    """How many losses (n,) of every model a test looks at: until it is known which models pass, at most all n.

    The path is decided once each model has passed, in every one of the `classes`, or is shown by the same bet on the
    other side to be too bad, and one that is too bad makes those after it needless. Models that passed `before` need
    no more.
    """
    needed_samples = 0
    for place, losses in enumerate(path):
        row = before[place] if before else None
        passes, fails = _decide(losses, limit, classes or {}, row)
        needed_samples = max(needed_samples, min(passes, fails))
        if passes > fails or passes > len(losses):
            break
    return min(needed_samples, len(path[0]))


def _decide(losses: Array, limit: RiskLimit, classes: Mapping[str, Array], before: Tested | None) -> tuple[int, int]:
    """After how many losses a model passes in all classes, and fails in one; one more than there are for never."""
    masks = classes or {"": np.ones(len(losses), dtype=bool)}
    earlier: Mapping[str, Tested | ClassResult] = {}
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
    """The capital that grows where the risk is below alpha, and the one that grows where it is above."""
    values, alpha = limit.in_unit(np.asarray(losses)), limit.in_unit(limit.alpha)
    return log_wealth(values, alpha, start), log_wealth(1 - values, 1 - alpha)


def _first(reached: Array) -> int:
    """Place of the first that is reached; how many there are where none is."""
    return int(reached.argmax()) if reached.any() else len(reached)
