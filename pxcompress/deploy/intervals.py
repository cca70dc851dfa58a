"""Confidence intervals, 95 %, of measured figures: accuracies, their difference, and speed-ups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm, t

from pxcompress.deploy.stopwatch import BLOCK, LEAST_TURNS
from pxcompress.proof import Latency, Speedup

Seconds = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

_RESAMPLES = 2000
"""Number of bootstrap draws for the interval of a speed-up."""

_SET_RESAMPLES = 400
"""Number of bootstrap draws for the interval of a metric, which may take milliseconds to compute."""

NOISE_LIMIT = 0.15
"""Noise of timings above which a comparison of latencies is reported as unreliable."""


@dataclass(frozen=True)
class Interval:
    """Low and high end of a 95 % confidence interval."""

    low: float
    high: float


def wilson_interval(share: float, samples: int) -> Interval:
    """95 % score interval of a share of `samples` (Wilson 1927); without samples it is 0 to 1."""
    if not samples:
        return Interval(0.0, 1.0)
    interval = binomtest(round(share * samples), samples).proportion_ci(0.95, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def bootstrap_interval(statistic: Callable[[Rows], float], samples: int, *, seed: int = 0) -> Interval:
    """95 % bootstrap percentile interval; `statistic` maps resampled row numbers (n,) to a number.

    The draws are the same in every call.
    """
    if not samples:
        return Interval(0.0, 1.0)
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, samples, samples)) for _ in range(_SET_RESAMPLES)]
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))


def newcombe_interval(first_right: int, second_right: int, both_right: int, samples: int) -> Interval:
    """95 % interval of the first model's share of right answers minus the second's, on the same samples.

    From the Wilson intervals of both and the correlation of being right (Newcombe 1998, "Improved confidence intervals
    for the difference between binomial proportions based on paired data", method 10).
    """
    one, two, correlation = (
        first_right / samples,
        second_right / samples,
        _phi(first_right, second_right, both_right, samples),
    )
    of_first, of_second = wilson_interval(one, samples), wilson_interval(two, samples)

    def reach(up: float, down: float) -> float:
        return sqrt(max(up**2 - 2 * correlation * up * down + down**2, 0.0))

    low, high = reach(one - of_first.low, of_second.high - two), reach(of_first.high - one, two - of_second.low)
    return Interval(one - two - low, one - two + high)


def _phi(first_right: int, second_right: int, both_right: int, samples: int) -> float:
    """Correlation of two models being right on the same samples, with a correction that lowers positive values."""
    both_wrong = samples - first_right - second_right + both_right
    product = float(both_right * both_wrong - (first_right - both_right) * (second_right - both_right))
    if product > 0:
        product = max(product - samples / 2, 0.0)
    spread = first_right * (samples - first_right) * second_right * (samples - second_right)
    return product / sqrt(spread) if spread else 0.0


def is_chance_level(top1: float, samples: int, classes: int) -> bool:
    """Whether the accuracy `top1` could be that of a model that guesses among `classes` at random."""
    return wilson_interval(top1, samples).low <= 1 / classes


def estimate_speedup(dense: Seconds, pruned: Seconds, *, seed: int = 0) -> Speedup:
    """Ratio of the medians and its 95 % percentile bootstrap interval.

    Run i of both belongs together (see `stopwatch.time_interleaved`). Runs next to each other are alike, so whole
    blocks of them are drawn, the same ones from both: what slows the machine for a while cancels. Percentiles are those
    of Hesterberg (2015, "What teachers should know about the bootstrap", 5.2), which make up for few blocks; fewer runs
    than blocks are needed allow no more than their extremes. Raises `ValueError` for different numbers of runs.
    """
    if len(dense) != len(pruned):
        raise ValueError(f"{len(dense)} dense and {len(pruned)} pruned runs; expected as many of both")
    runs = len(dense)
    ratio = float(np.median(dense) / np.median(pruned))
    if runs < LEAST_TURNS:
        return Speedup(ratio, float(dense.min() / pruned.max()), float(dense.max() / pruned.min()))
    size = min(BLOCK, runs // LEAST_TURNS)
    blocks = runs // size
    draws = np.random.default_rng(seed).integers(0, blocks, (_RESAMPLES, blocks))
    index = (draws[:, :, None] * size + np.arange(size)).reshape(_RESAMPLES, -1)
    tail = 100 * norm.cdf(-sqrt(blocks / (blocks - 1)) * t.ppf(0.975, blocks - 1))
    ratios = np.median(dense[index], axis=1) / np.median(pruned[index], axis=1)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Speedup(ratio, min(float(low), ratio), max(float(high), ratio))


def mean_speedup(first: Latency, second: Latency) -> float:
    """Mean latency of the first model divided by that of the second: how many times faster the second is on average."""
    return first.mean / second.mean


def disagrees_with_mean(change: Speedup, first: Latency, second: Latency) -> bool:
    """Whether the interval by p50 contradicts the mean, because a few calls took very long."""
    mean = mean_speedup(first, second)
    return change.low > 1 > mean or change.high < 1 < mean


def measure_noise(seconds: Seconds) -> float:
    """Spread of the runs: distance from the median to the farther quartile, as a share of the median."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return float(max(high - middle, middle - low) / middle)
