"""Losses in [0, 1] of any task, such as 1 - IoU: what they risk along a path, and how well their mean is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from pxcompress.certify.learn_then_test import betting
from pxcompress.certify.path import RISKS, losses
from pxcompress.choices import LOSS_RISKS, one_of
from pxcompress.errors import InputError

_STEPS = 40
"""Number of bisections of [0, 1] by which the ends of an interval are found."""


class MeanInterval(NamedTuple):
    """A mean of numbers in [0, 1], and the ends between which it is with the asked confidence."""

    mean: float
    low: float
    high: float


def path_losses(risk: str, table: ArrayLike) -> list[NDArray[np.float64]]:
    """Losses of every model of a path for a risk, from a `table` (n, models) of losses in [0, 1], the dense one first.

    The risks of a classifier take losses of 0 or 1, whether the answer is wrong. Raises `InputError`.
    """
    values = np.asarray(table, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise InputError("the table has losses outside of [0, 1]; divide them by the largest possible one")
    if risk in LOSS_RISKS:
        return [np.asarray(RISKS[risk].function(values[:, 0], column, column), dtype=np.float64) for column in values.T]
    if risk == "disagreement" or not np.isin(values, (0, 1)).all():
        raise InputError(f"risk {risk!r} cannot be told from these losses; give --risk {one_of(LOSS_RISKS)}")
    right = 1 - values.astype(np.int64)
    return [losses(risk, right[:, 0], column, np.ones(len(right), dtype=np.int64)) for column in right.T]


def mean_interval(values: ArrayLike, delta: float = 0.05) -> MeanInterval:
    """The interval of the mean of independent numbers (n,) in [0, 1], at confidence 1 - delta, whatever they are like.

    Numbers of 0 and 1 alone: Clopper and Pearson's, exact. Others: what two bets on either side cannot refute, with
    half of the capital each (the hedged capital of Waudby-Smith and Ramdas, 2020). Which of the two it is must not be
    left to chance: 0/1 losses are such by nature.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return MeanInterval(float("nan"), 0.0, 1.0)
    mean = float(array.mean())
    if np.isin(array, (0, 1)).all():
        errors, n = int(array.sum()), len(array)
        low = float(beta.ppf(delta / 2, errors, n - errors + 1)) if errors else 0.0
        high = float(beta.ppf(1 - delta / 2, errors + 1, n - errors)) if errors < n else 1.0
        return MeanInterval(mean, low, high)
    high = _largest(lambda alpha: float(betting(array, alpha)) > delta / 2, mean)
    low = 1 - _largest(lambda alpha: float(betting(1 - array, alpha)) > delta / 2, 1 - mean)
    return MeanInterval(mean, low, high)


def _largest(possible: Callable[[float], bool], low: float) -> float:
    """The largest number from `low` to 1 that is `possible`, which all below it are: bisection, rounded up."""
    high = 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return high
