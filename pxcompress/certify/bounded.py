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
    """A mean of numbers in [0, 1], and the low and high end of its confidence interval."""

    mean: float
    low: float
    high: float


def path_losses(risk: str, table: ArrayLike) -> list[NDArray[np.float64]]:
    """Losses (n,) by a risk for each model of a path, from a `table` (n, models) of losses in [0, 1], the dense model
    first.

    The risks of classifiers need a table of zeros and ones: 1 for a wrong answer. Raises `InputError`.
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
    """Confidence interval, at 1 - delta, for the mean of independent numbers (n,) in [0, 1] of any distribution.

    For numbers 0 and 1 alone it is Clopper and Pearson's, exact. For others it holds the means that neither of two bets
    refutes, with half of the capital each (the hedged capital of Waudby-Smith and Ramdas, 2020). Which of the two is
    used follows from the kind of numbers, not from chance: 0/1 losses are such by nature.
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
    """The largest number in [low, 1] for which `possible` is true, by bisection.

    `possible` must be true below that number and false above it. The result is the upper end of the last interval.
    """
    high = 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return high
