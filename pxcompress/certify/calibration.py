"""How far probabilities can be trusted, dense against pruned: calibration error and conformal sets, with intervals.

Functions of outputs (n, classes) and labels (n,) alone. Outputs are logits, or probabilities where a model ends in a
softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from pxcompress.certify.bounded import mean_interval
from pxcompress.certify.path import are_probabilities
from pxcompress.errors import InputError
from pxcompress.proof import Estimate

BINS = 15
"""Number of bins of equal width for the calibration error, as in Guo et al., 2017."""

COVERAGE = 0.9
"""Share of the samples whose true class a conformal set has to contain."""

LEAST_SAMPLES = 4
"""Fewest samples for which calibration is reported, since half of them are needed to set a threshold."""

_RESAMPLES = 300
_TEMPERATURES = (1 / 20, 20.0)
"""Range in which a temperature is searched."""

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
    """Calibration of the dense and the pruned model on the same `samples`, and the differences, pruned minus dense."""

    dense: Calibration
    pruned: Calibration
    error_change: Estimate
    set_size_change: Estimate
    coverage: float
    samples: int


def log_probabilities(outputs: ArrayLike) -> Floats:
    """Logarithms of the probabilities (n, classes) for outputs that are logits or already probabilities."""
    values = np.asarray(outputs, dtype=np.float64)
    if are_probabilities(values):
        values = np.log(np.maximum(values, np.finfo(np.float64).tiny))
    return np.asarray(log_softmax(values, axis=1))


def softmax(outputs: ArrayLike) -> Floats:
    """Probabilities (n, classes) for outputs that are logits or already probabilities."""
    return np.exp(log_probabilities(outputs))


def calibration_error(confidence: ArrayLike, right: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error: |mean confidence - accuracy| of bins of equal width, weighted by their samples.

    `confidence` (n,) are the probabilities of the predicted classes, `right` (n,) says which of these are true.
    """
    import torch
    from torchmetrics.functional.classification import binary_calibration_error

    shares = torch.from_numpy(np.array(confidence, dtype=np.float64))
    truth = torch.from_numpy(np.array(right, dtype=np.int64))
    return float(binary_calibration_error(shares, truth, bins, validate_args=False))


def fit_temperature(outputs: ArrayLike, labels: ArrayLike) -> float:
    """The temperature by which to divide logits (n, classes) so that the labels (n,) get the largest likelihood.

    It changes no prediction (temperature scaling; Guo et al., 2017). Raises `InputError`.
    """
    logs, truth = log_probabilities(outputs), np.asarray(labels)
    if not len(logs) or truth.shape != logs.shape[:1] or not np.isfinite(logs).all():
        raise InputError(f"{len(logs)} samples and labels {truth.shape}; expected as many of both, and finite outputs")

    def cost(logarithm: float) -> float:
        return -float(_true(np.asarray(log_softmax(logs / math.exp(logarithm), axis=1)), truth).mean())

    low, high = (math.log(end) for end in _TEMPERATURES)
    return math.exp(float(minimize_scalar(cost, bounds=(low, high), method="bounded").x))


def threshold_of(logits: ArrayLike, labels: ArrayLike, coverage: float = COVERAGE) -> float:
    """Smallest probability with which a class enters a conformal prediction set; 0 if there are too few samples.

    On further samples the true class is in the set with at least the chance `coverage`, however good the model is: the
    threshold is the probability of rank ceil((m + 1) coverage) among those of m true classes (Vovk et al., 2005;
    Sadinle et al., 2019).
    """
    true = np.sort(_true(softmax(logits), labels))[::-1]
    rank = math.ceil(round((len(true) + 1) * coverage, 9))
    return float(true[rank - 1]) if rank <= len(true) else 0.0


def compare_calibration(
    dense: ArrayLike, pruned: ArrayLike, labels: ArrayLike, coverage: float = COVERAGE, seed: int = 0
) -> CalibrationRecord:
    """Calibration of both models from outputs (n, classes) and labels (n,) of samples that were used for neither.

    Half of them, drawn by `seed`, set the conformal thresholds; sets are counted on the other half; all of them give
    the calibration errors. Intervals of set sizes and coverage are those of `mean_interval`; those of calibration
    errors, which chance makes larger, are a bootstrap with the same samples for both models. Raises `InputError`.
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
            _bootstrap_interval(value[name], errors[name], low=0.0),
            _scale_interval(sizes[name] / classes, lambda share: classes * share),
            _scale_interval(covered[name], lambda share: share),
        )
        for name in models
    }
    return CalibrationRecord(
        dense=calibrations["dense"],
        pruned=calibrations["pruned"],
        error_change=_bootstrap_interval(
            value["pruned"] - value["dense"], errors["pruned"] - errors["dense"], low=-1.0
        ),
        set_size_change=_scale_interval(
            ((sizes["pruned"] - sizes["dense"]) / classes + 1) / 2, lambda share: classes * (2 * share - 1)
        ),
        coverage=coverage,
        samples=n,
    )


def _scale_interval(values: ArrayLike, back: Callable[[float], float]) -> Estimate:
    """The mean and its interval for numbers in [0, 1], converted to their own unit by the function `back`."""
    interval = mean_interval(values)
    return Estimate(back(interval.mean), back(interval.low), back(interval.high))


def _bootstrap_interval(value: float, resampled: Floats, low: float) -> Estimate:
    """The basic bootstrap interval around `value`: percentiles reflected at it, because resampling makes such errors
    larger.
    """
    first, last = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value, max(low, min(2 * value - float(last), value)), max(2 * value - float(first), value))


def _true(shares: Floats, labels: ArrayLike) -> Floats:
    """The probability of each sample's true class, (n,)."""
    return np.asarray(shares[np.arange(len(shares)), np.asarray(labels)])


def _check(dense: Floats, pruned: Floats, labels: NDArray[np.generic]) -> None:
    if dense.ndim != 2 or dense.shape != pruned.shape or labels.shape != dense.shape[:1]:
        shapes = f"dense {dense.shape}, pruned {pruned.shape}, labels {labels.shape}"
        raise InputError(f"{shapes}; expected outputs (n, classes) of both and labels (n,), in the same order")
    if len(dense) < LEAST_SAMPLES or not (np.isfinite(dense).all() and np.isfinite(pruned).all()):
        raise InputError(
            f"{len(dense)} samples, some outputs perhaps not finite; expected {LEAST_SAMPLES} or more, all finite"
        )
