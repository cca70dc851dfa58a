"""Calibration of probabilities: by hand on tiny tables, coverage that holds, intervals that hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pxcompress.certify.calibration import (
    calibration_error,
    compare_calibration,
    fit_temperature,
    softmax,
    threshold_of,
)
from pxcompress.errors import InputError


def drawn(seed: int, n: int, sharpness: float = 1.0, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels that are drawn from their softmax; sharper logits are surer than they ought to be."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, classes))
    shares = softmax(logits)
    labels = (shares.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    return sharpness * logits, labels


def test_calibration_error_by_hand() -> None:
    confidence = [0.9, 0.4, 0.6, 0.8]
    right = [1, 1, 0, 0]
    assert calibration_error(confidence, right, 2) == pytest.approx((abs(0.4 - 1) + abs(2.3 - 1)) / 4)
    assert calibration_error(confidence, right, 1) == pytest.approx((2.7 - 2) / 4)
    assert calibration_error([1.0, 1.0], [1, 1]) == 0


def test_probabilities_are_judged_like_their_logits() -> None:
    logits, labels = drawn(3, 300)
    assert compare_calibration(logits, softmax(logits), labels).error_change.value == pytest.approx(0, abs=1e-9)
    assert softmax(softmax(logits)) == pytest.approx(softmax(logits))


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_a_temperature_undoes_what_made_logits_too_sharp(sharpness: float) -> None:
    logits, labels = drawn(4, 4000, sharpness)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(sharpness, rel=0.1)
    assert fit_temperature(softmax(logits), labels) == pytest.approx(temperature, rel=1e-3)
    record = compare_calibration(logits, logits / temperature, labels)
    assert record.pruned.error.value < 0.03
    if sharpness != 1:
        assert record.error_change.high < 0


def test_a_temperature_needs_samples() -> None:
    with pytest.raises(InputError, match="0 samples"):
        fit_temperature(np.zeros((0, 3)), [])


def test_threshold_is_the_rank_of_the_true_classes() -> None:
    shares = np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]])
    labels = [0, 0, 0, 1]
    assert threshold_of(np.log(shares), labels, 0.6) == pytest.approx(0.6)  # rank ceil(5 x 0.6) = 3 of .9 .8 .6 .3
    assert threshold_of(np.log(shares), labels, 0.8) == pytest.approx(0.3)
    assert threshold_of(np.log(shares), labels, 0.9) == 0


def test_sets_hold_the_true_class_as_often_as_asked() -> None:
    """Mean over 200 draws of 60 + 60 samples, at 80 %; 3 standard errors, however wrong the probabilities are."""
    shares = []
    for seed in range(200):
        logits, labels = drawn(seed, 120, sharpness=3)
        threshold = threshold_of(logits[:60], labels[:60], 0.8)
        shares.append((softmax(logits[60:])[np.arange(60), labels[60:]] >= threshold).mean())
    assert np.mean(shares) >= 0.8 - 3 * np.std(shares) / math.sqrt(200)
    assert np.mean(shares) <= 0.8 + 1 / 61 + 3 * np.std(shares) / math.sqrt(200)


def test_a_model_that_is_too_sure_is_told_from_a_calibrated_one() -> None:
    logits, labels = drawn(0, 1000)
    record = compare_calibration(logits, 3 * logits, labels)
    assert record.samples == 1000
    assert record.dense.error.value < 0.05 < record.pruned.error.value
    assert record.error_change.low > 0
    assert record.error_change.value == pytest.approx(record.pruned.error.value - record.dense.error.value)
    assert record.dense.covered.value == pytest.approx(0.9, abs=0.05)
    for each in (record.dense, record.pruned):
        for estimate in (each.error, each.set_size, each.covered):
            assert estimate.low <= estimate.value <= estimate.high
    assert 1 <= record.dense.set_size.value <= 5


def test_the_same_model_twice_differs_in_nothing() -> None:
    logits, labels = drawn(1, 200)
    record = compare_calibration(logits, logits, labels)
    assert record.dense == record.pruned
    assert (record.error_change.value, record.error_change.low, record.error_change.high) == (0, 0, 0)
    assert record.set_size_change.low <= record.set_size_change.value == 0 <= record.set_size_change.high
    assert compare_calibration(logits + 7, logits, labels).dense.error.value == pytest.approx(record.dense.error.value)


def test_a_model_that_knows_less_has_larger_sets() -> None:
    logits, labels = drawn(2, 1500)
    blurred = logits + 3 * np.random.default_rng(9).normal(size=logits.shape)
    change = compare_calibration(logits, blurred, labels).set_size_change
    assert 0 < change.low < change.value < change.high


@pytest.mark.parametrize(
    ("pruned", "labels", "words"),
    [
        (np.zeros((9, 3)), np.zeros(10, int), r"pruned \(9, 3\)"),
        (np.zeros((10, 3)), np.zeros(9, int), r"labels \(9,\)"),
        (np.full((10, 3), np.nan), np.zeros(10, int), "finite"),
    ],
)
def test_arrays_that_do_not_fit(pruned: np.ndarray, labels: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=words):
        compare_calibration(np.zeros((10, 3)), pruned, labels)
