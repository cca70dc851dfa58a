"""The statistics of Learn then Test, on arrays: p-values, testing many models, numbers of samples. Knows no model.

Source: Angelopoulos, Bates, Candes, Jordan, Lei, "Learn then Test", 2021.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, xlogy

from pxcompress.errors import InputError

Array = NDArray[Any]

# --- p-values of H0: "the risk is above alpha", for losses (..., n) in [0, 1] -> (...) ------------------------------


def binomial(values: Array, alpha: float) -> Array:
    """P(Bin(n, alpha) <= errors): exact for losses that are 0 or 1."""
    return bdtr(values.sum(axis=-1), values.shape[-1], alpha)


def hoeffding(values: Array, alpha: float) -> Array:
    """exp(-2 n (alpha - mean)+^2)."""
    return np.exp(-2 * values.shape[-1] * np.maximum(alpha - values.mean(axis=-1), 0) ** 2)


def hoeffding_bentkus(values: Array, alpha: float) -> Array:
    """min(exp(-n KL(mean, alpha)), e P(Bin(n, alpha) <= ceil(n mean))) (Bates et al., 2021; Learn then Test)."""
    n = values.shape[-1]
    mean = np.minimum(values.mean(axis=-1), alpha)
    divergence = xlogy(mean, mean / alpha) + xlogy(1 - mean, (1 - mean) / (1 - alpha))
    bentkus = math.e * bdtr(np.ceil(values.sum(axis=-1)), n, alpha)
    return np.minimum(np.exp(-n * divergence), np.minimum(bentkus, 1))


def betting(values: Array, alpha: float) -> Array:
    """1 / max_t prod_(i<=t) (1 - bet_i (loss_i - alpha)): Ville's inequality on a capital that grows if risk < alpha.

    Bets follow the variance seen so far (Waudby-Smith and Ramdas, 2020; as in Bates et al., 2021), so a model that
    rarely changes an answer needs few samples. The order is drawn from a fixed seed, because data often come sorted by
    class, and then the past would tell the future.
    """
    n = values.shape[-1]
    values = values[..., np.random.default_rng(0).permutation(n)]
    count = np.arange(2, n + 2)
    mean = (0.5 + values.cumsum(axis=-1)) / count
    variance = (0.25 + ((values - mean) ** 2).cumsum(axis=-1)) / count
    before = np.concatenate([np.full_like(variance[..., :1], 0.25), variance[..., :-1]], axis=-1)
    bet = np.minimum(1, np.sqrt(2 * math.log(20) / (n * before)))  # tuned for p = 1/20, valid for all
    capital = np.log1p(-bet * (values - alpha)).cumsum(axis=-1)
    return np.minimum(1, np.exp(-capital.max(axis=-1)))


BOUNDS: dict[str, Callable[[Array, float], Array]] = {
    "binomial": binomial,
    "hoeffding-bentkus": hoeffding_bentkus,
    "hoeffding": hoeffding,
    "betting": betting,
}


# --- testing many models: which p-values, of paths that start dense, may be rejected together -----------------------


def fixed_sequence(p_values: ArrayLike, delta: float) -> int:
    """How many models pass, from the first on: stops at the first p-value above delta."""
    failed = np.asarray(p_values) > delta
    return int(failed.argmax()) if failed.any() else len(failed)


def graphical(p_values: ArrayLike, weights: ArrayLike, transitions: ArrayLike, delta: float) -> NDArray[np.bool_]:
    """Rejected hypotheses (m,) of Bretz et al., 2009, algorithm 1: each rejected one hands its share of delta on.

    `weights` (m,) sum to at most 1; row i of `transitions` (m, m) says where the share of i goes, and sums to <= 1.
    """
    p = np.asarray(p_values, dtype=float)
    w, g = np.array(weights, dtype=float), np.array(transitions, dtype=float)
    rejected = np.zeros(len(p), dtype=bool)
    # A p-value may underflow to 0: without a share of delta it still may not be rejected.
    while (ready := ~rejected & (w > 0) & (p <= w * delta)).any():
        i = int(ready.argmax())
        rejected[i] = True
        w = w + w[i] * g[i]
        loop = (g[:, i] * g[i])[:, None]
        g = np.where(loop < 1, (g + np.outer(g[:, i], g[i])) / np.where(loop < 1, 1 - loop, 1), 0.0)
        w[i], g[i], g[:, i] = 0.0, 0.0, 0.0
        np.fill_diagonal(g, 0.0)
    return rejected


Chains = Sequence[Sequence[int]]


def _bonferroni(chains: Chains, p: Array, delta: float) -> NDArray[np.bool_]:
    """Each path is a fixed sequence with delta / paths."""
    rejected = np.zeros(len(p), dtype=bool)
    for chain in chains:
        rejected[list(chain[: fixed_sequence(p[list(chain)], delta / len(chains))])] = True
    return rejected


def _graph(chains: Chains, p: Array, delta: float) -> NDArray[np.bool_]:
    """As `_bonferroni`, but a path that passes to its end hands its share to the others."""
    weights, transitions = np.zeros(len(p)), np.zeros((len(p), len(p)))
    for chain in chains:
        weights[chain[0]] = 1 / len(chains)
        for here, following in itertools.pairwise(chain):
            transitions[here, following] = 1
        for other in chains:
            if other is not chain:
                transitions[chain[-1], other[0]] = 1 / (len(chains) - 1)
    return graphical(p, weights, transitions, delta)


TESTING: dict[str, Callable[[Chains, Array, float], NDArray[np.bool_]]] = {"graph": _graph, "bonferroni": _bonferroni}
"""How several paths share delta. With one path both are the fixed sequence."""


# --- numbers of samples ---


def max_errors(n: int, alpha: float, delta: float) -> int | None:
    """The most errors among n samples that still pass the exact binomial test; None where not even 0 errors do."""
    if n < 1 or not 0 < alpha < 1 or not 0 < delta < 1:
        raise InputError(f"n {n}, alpha {alpha}, delta {delta}; expected n >= 1, alpha and delta between 0 and 1")
    too_many = first_whole(lambda errors: bdtr(errors, n, alpha) > delta)
    return too_many - 1 if too_many else None


def samples_needed(alpha: float, delta: float, expected_risk: float = 0.0) -> int:
    """The smallest n at which n * expected_risk errors pass the exact binomial test. For losses of 0 or 1.

    Raises `InputError` where the expected risk is not below alpha: no number of samples would do.
    """
    if not 0 <= expected_risk < alpha < 1 or not 0 < delta < 1:
        given = f"expected risk {expected_risk}, alpha {alpha}, delta {delta}"
        raise InputError(f"{given}; expected 0 <= risk < alpha < 1 and delta between 0 and 1")

    def smallest(errors: int) -> int:
        return errors + first_whole(lambda right: bdtr(errors, errors + right, alpha) <= delta)

    return smallest(first_whole(lambda errors: smallest(errors) * expected_risk <= errors))


def first_whole(holds: Callable[[int], bool]) -> int:
    """The smallest whole number from 0 on at which `holds` turns true, and stays so: doubling, then bisection."""
    if holds(0):
        return 0
    low, high = 0, 1
    while not holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
