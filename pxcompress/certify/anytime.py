"""Tests that may stop at any time, so that a split can be used again: what a test has not looked at stays fresh.

A test goes through the samples of a split one by one, and stops as soon as the path is decided. The next one begins
where it stopped, at samples that have told nothing yet, whatever was learned from the first. All share one error
budget: a test stakes half of what is left, and loses its stake only where a model of its path does not pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pxcompress.certify.learn_then_test import Array, log_wealth
from pxcompress.certify.path import Candidate, Certificate, Goal, certify
from pxcompress.errors import InputError

STAKE = 0.5
"""Share of what is left of the error budget that a test stakes."""


@dataclass(frozen=True)
class Budget:
    """What an anytime test may use of a split, and what it leaves.

    It looks at samples from `begins` on, up to `ends`, of so many as there `are`. `total` is the chance that any
    certificate on them is wrong, `left` what is left of it before this one, which stakes `stake`.
    """

    total: float
    left: float
    stake: float
    begins: int
    ends: int
    are: int
    lost: bool = False

    @property
    def left_after(self) -> float:
        """Error budget that is left for later tests of the split."""
        return self.left - self.stake * self.lost

    @property
    def words(self) -> str:
        """A sentence on the error budget that is left."""
        return (
            f"samples {self.begins + 1} to {self.ends} of {self.are} were looked at, and {self.stake:.4g} of the error "
            f"budget of {self.total:.4g} staked. LEFT for other tests: {self.are - self.ends} samples, and a budget of "
            f"{self.left_after:.4g}"
        )


def stake_budget(total: float, lost: float, begins: int, are: int) -> Budget:
    """The part of the error budget `total` that the next test of a split gets, of which earlier ones have `lost` some.

    Raises `InputError` where nothing is left: samples or budget.
    """
    remaining_error = total - lost
    if remaining_error <= 1e-6 or begins >= are:
        raise InputError(
            f"nothing is left of these samples: {begins} of {are} were looked at, and {lost:.4g} of the error budget "
            f"of {total:.4g} are lost; certify on fresh samples, or give a lower --confidence"
        )
    return Budget(total, remaining_error, STAKE * remaining_error, begins, begins, are)


def certify_anytime(candidates: Sequence[Candidate], goal: Goal, budget: Budget) -> tuple[Certificate, Budget]:
    """The certificate of a path by the losses of samples from where the `budget` begins, in the order of the test.

    Losses end where labels do; the test stops there or earlier. Returns the budget with what was used of it, too.
    """
    stop = stopping_time([np.asarray(each.losses) for each in candidates], goal)
    certificate = certify([each._replace(losses=np.asarray(each.losses)[:stop]) for each in candidates], goal)
    return certificate, replace(budget, ends=budget.begins + stop, lost=not all(certificate.certified))


def stopping_time(path: Sequence[Array], goal: Goal) -> int:
    """How many losses (n,) of every model a test looks at: until it is known which models pass, at most all n.

    The path is decided once each model has passed, or is shown by the same bet on the other side to be too bad, and
    one that is too bad makes those after it needless.
    """
    needed_samples = 0
    for losses in path:
        passes, fails = (_first(wealth >= -math.log(goal.delta)) for wealth in _wealths(losses, goal))
        needed_samples = max(needed_samples, min(passes, fails))
        if passes > fails or passes > len(losses):
            break
    return min(needed_samples, len(path[0]))


def _wealths(losses: Array, goal: Goal) -> tuple[Array, Array]:
    """The capital that grows where the risk is below alpha, and the one that grows where it is above."""
    values, alpha = goal.in_unit(np.asarray(losses)), goal.in_unit(goal.alpha)
    return log_wealth(values, alpha), log_wealth(1 - values, 1 - alpha)


def _first(reached: Array) -> int:
    """How many samples it takes; one more than there are where it is never reached."""
    return int(reached.argmax()) + 1 if reached.any() else len(reached) + 1
