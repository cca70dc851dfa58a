"""The statistics of Learn then Test, on arrays: p-values, and testing a path of models. Knows no model.

Source: Angelopoulos, Bates, Candes, Jordan, Lei, "Learn then Test", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, logsumexp

Array = NDArray[Any]


def binomial(values: Array, alpha: float) -> Array:
    """P-value of "the risk is above alpha" for losses (..., n) of 0 or 1, exact: P(Bin(n, alpha) <= errors)."""
    return bdtr(values.sum(axis=-1), values.shape[-1], alpha)


def betting(values: Array, alpha: float) -> Array:
    """P-value of "the risk is above alpha" by bets: 1 / the largest capital, prod_(i<=t) (1 - bet_i (loss_i - alpha))
    (Ville).

    Bets follow the variance seen so far (Waudby-Smith and Ramdas, 2020; as in Bates et al., 2021), so a model that
    rarely changes an answer needs few samples. The order is drawn from a fixed seed, because data often come sorted by
    class, and then the past would tell the future.
    """
    n = values.shape[-1]
    values = values[..., np.random.default_rng(0).permutation(n)]
    count = np.arange(2, n + 2)
    mean = (0.5 + values.cumsum(axis=-1)) / count
    variance = (0.25 + ((values - mean) ** 2).cumsum(axis=-1)) / count
    past_variance = np.concatenate([np.full_like(variance[..., :1], 0.25), variance[..., :-1]], axis=-1)
    bet = np.minimum(1, np.sqrt(2 * math.log(20) / (n * past_variance)))  # tuned for p = 1/20, valid for all
    capital = np.log1p(-bet * (values - alpha)).cumsum(axis=-1)
    return np.minimum(1, np.exp(-capital.max(axis=-1)))


BETS = np.geomspace(0.05, 0.95, 10)
"""The bets of `log_wealth`, as shares of the largest bet that cannot lose all.

Each starts with a tenth of the capital.
"""


def log_capitals(values: Array, alpha: float, start: ArrayLike = 0.0) -> Array:
    """Logarithms of each bet's capital after every loss, (..., bets, n), from logarithms (bets,) at the `start`."""
    bets = BETS / (1 - alpha)
    logs = np.log1p(bets[:, None] * (alpha - np.asarray(values, dtype=np.float64)[..., None, :])).cumsum(axis=-1)
    return logs + np.broadcast_to(np.asarray(start), len(bets))[:, None]


def log_wealth(values: Array, alpha: float, start: ArrayLike = 0.0) -> Array:
    """Logarithm of the total capital of all bets after every loss, (..., n): an e-process against "the risk is above
    alpha".

    Equal parts bet constant shares (the diversified capital of Waudby-Smith and Ramdas, 2020). It asks for no n
    beforehand, so that a test may stop, or go on with more samples from the capitals at the `start`, at any time.
    """
    return logsumexp(log_capitals(values, alpha, start), axis=-2) - math.log(len(BETS))


def e_process(values: Array, alpha: float) -> Array:
    """P-values of "the risk is above `alpha`" from losses (..., n) in the order of the test, valid whenever one stops.

    Each is 1 / the largest capital of a bet against it.
    """
    return np.minimum(1, np.exp(-log_wealth(values, alpha).max(axis=-1)))


BOUNDS: dict[str, Callable[[Array, float], Array]] = {
    "binomial": binomial,
    "betting": betting,
    "e-process": e_process,
}
"""Functions that give p-values of "the risk is above alpha", by name: losses (..., n) in [0, 1] -> (...)."""


def fixed_sequence(p_values: ArrayLike, delta: float) -> int:
    """How many models pass, counted from the first: the count stops at the first p-value above delta."""
    above = np.asarray(p_values) > delta
    return int(above.argmax()) if above.any() else len(above)


def first_whole(holds: Callable[[int], bool]) -> int:
    """The smallest whole number n >= 0 with holds(n), by doubling and bisection.

    `holds` must stay true from there on.
    """
    if holds(0):
        return 0
    low, high = 0, 1
    while not holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
