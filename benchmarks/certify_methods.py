"""What `certify.py` holds the product's certificates against: other bounds, and several paths that share one delta.

Sources: Bates, Angelopoulos, Lei, Malik, Jordan, "Distribution-Free, Risk-Controlling Prediction Sets", 2021; Bretz,
Maurer, Brannath, Posch, "A graphical approach to sequentially rejective multiple test procedures", 2009.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, xlogy

from pxcompress.certify.learn_then_test import first_whole, fixed_sequence

Array = NDArray[Any]


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


BOUNDS: dict[str, Callable[[Array, float], Array]] = {"hoeffding-bentkus": hoeffding_bentkus, "hoeffding": hoeffding}
"""P-values of H0 "the risk is above alpha", for losses (..., n) in [0, 1]."""


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


def max_errors(n: int, alpha: float, delta: float) -> int | None:
    """The most errors among n samples that still pass the exact binomial test; None where not even 0 errors do."""
    too_many = first_whole(lambda errors: bdtr(errors, n, alpha) > delta)
    return too_many - 1 if too_many else None
