"""How far probabilities can be trusted, dense against pruned: calibration error and conformal sets, with intervals.

Functions of logits (n, classes) and labels (n,) alone; NumPy and SciPy only. Where outputs are probabilities already,
give their logarithms, which have the same softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pxcompress.certify.bounded import mean_interval
from pxcompress.errors import InputError
from pxcompress.proof import Estimate

BINS = 15
COVERAGE = 0.9
_RESAMPLES = 300

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """Calibration of one model: `error` is the expected calibration error.

    Conformal sets hold the true class with at least the asked coverage: `set_size` is their mean number of
    classes, `covered` the share that holds it.
    """

    error: Estimate
    set_size: Estimate
    covered: Estimate


@dataclass(frozen=True)
class CalibrationRecord:
    """Both models on the same `samples`, and what the pruned one has more than the dense one, paired by sample."""

    dense: Calibration
    pruned: Calibration
    error_change: Estimate
    set_size_change: Estimate
    coverage: float
    samples: int


def softmax(logits: ArrayLike) -> Floats:
    """Probabilities (n, classes)."""
    values = np.asarray(logits, dtype=np.float64)
    shares = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def calibration_error(confidence: ArrayLike, right: ArrayLike, bins: int = BINS) -> float:
    """Mean distance between confidence and accuracy over bins of equally many samples (Nixon et al., 2019).

    Bins of equal width hold few samples where the model is sure, and say more about chance than about the model.
    """
    order = np.argsort(np.asarray(confidence), kind="stable")
    gaps = (np.asarray(confidence, dtype=np.float64) - np.asarray(right, dtype=np.float64))[order]
    return float(sum(abs(part.sum()) for part in np.array_split(gaps, min(bins, len(gaps)))) / len(gaps))


def threshold_of(logits: ArrayLike, labels: ArrayLike, coverage: float = COVERAGE) -> float:
    """Smallest probability with which a class enters a split conformal prediction set; 0 if samples are too few.

    A true class of further samples is in its set with at least that chance, whatever the model is worth: the threshold
    is the probability of rank ceil((m + 1) coverage) among those of m true classes (Vovk et al., 2005; Sadinle et al.,
    2019).
    """
    true = np.sort(_true(softmax(logits), labels))[::-1]
    rank = math.ceil(round((len(true) + 1) * coverage, 9))
    return float(true[rank - 1]) if rank <= len(true) else 0.0


def compare_calibration(
    dense: ArrayLike, pruned: ArrayLike, labels: ArrayLike, coverage: float = COVERAGE, seed: int = 0
) -> CalibrationRecord:
    """Calibration of both models from logits (n, classes) and labels (n,) of samples that shaped neither.

    Half of them, drawn by `seed`, set the conformal thresholds, on the other half sets are counted; all of them give
    the calibration errors. Intervals: those of a bounded mean (`mean_interval`) for sets; for calibration errors, which
    chance makes larger, a bootstrap of samples, the same ones of both models. Raises `InputError`.
    """
    models = {"dense": np.asarray(dense, np.float64), "pruned": np.asarray(pruned, np.float64)}
    truth = np.asarray(labels)
    _check(models["dense"], models["pruned"], truth)
    n, classes = models["dense"].shape
    order = np.random.default_rng(seed).permutation(n)
    fitting, counting = order[: n // 2], order[n // 2 :]
    sizes, covered, parts = {}, {}, {}
    for name, logits in models.items():
        threshold = threshold_of(logits[fitting], truth[fitting], coverage)
        shares = softmax(logits)
        sizes[name] = (shares[counting] >= threshold).sum(axis=1)
        covered[name] = _true(shares[counting], truth[counting]) >= threshold
        parts[name] = (shares.max(axis=1), shares.argmax(axis=1) == truth)
    drawn = np.random.default_rng(seed).integers(0, n, (_RESAMPLES, n))
    errors = {name: np.array([calibration_error(c[rows], r[rows]) for rows in drawn]) for name, (c, r) in parts.items()}
    value = {name: calibration_error(*both) for name, both in parts.items()}
    calibrations = {
        name: Calibration(
            _bootstrapped(value[name], errors[name], low=0.0),
            _scaled(sizes[name] / classes, lambda share: classes * share),
            _scaled(covered[name], lambda share: share),
        )
        for name in models
    }
    return CalibrationRecord(
        dense=calibrations["dense"],
        pruned=calibrations["pruned"],
        error_change=_bootstrapped(value["pruned"] - value["dense"], errors["pruned"] - errors["dense"], low=-1.0),
        set_size_change=_scaled(
            ((sizes["pruned"] - sizes["dense"]) / classes + 1) / 2, lambda share: classes * (2 * share - 1)
        ),
        coverage=coverage,
        samples=n,
    )


def _scaled(values: ArrayLike, back: Callable[[float], float]) -> Estimate:
    """The mean of numbers in [0, 1], and its interval, `back` in their own unit."""
    interval = mean_interval(values)
    return Estimate(back(interval.mean), back(interval.low), back(interval.high))


def _bootstrapped(value: float, resampled: Floats, low: float) -> Estimate:
    """The basic bootstrap interval, reflected at the value: resampling adds to an error that is never negative."""
    first, last = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value, max(low, min(2 * value - float(last), value)), max(2 * value - float(first), value))


def _true(shares: Floats, labels: ArrayLike) -> Floats:
    """The probability of each sample's true class, (n,)."""
    return np.asarray(shares[np.arange(len(shares)), np.asarray(labels)])


def _check(dense: Floats, pruned: Floats, labels: NDArray[np.generic]) -> None:
    if dense.ndim != 2 or dense.shape != pruned.shape or labels.shape != dense.shape[:1]:
        shapes = f"dense {dense.shape}, pruned {pruned.shape}, labels {labels.shape}"
        raise InputError(f"{shapes}; expected logits (n, classes) of both and labels (n,), in the same order")
    if len(dense) < 4 or not (np.isfinite(dense).all() and np.isfinite(pruned).all()):
        raise InputError(f"{len(dense)} samples, some logits perhaps not finite; expected 4 or more, all finite")
