"""Losses of any task: risks by hand, intervals of means that hold and are shorter than Hoeffding's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from pxcompress.certify.bounded import mean_interval, path_losses
from pxcompress.certify.path import RISKS, Candidate, RiskLimit, certify, losses
from pxcompress.choices import LOSS_RISKS
from pxcompress.errors import InputError


def test_risks_of_losses_by_hand() -> None:
    table = np.array([[0.0, 0.5], [0.25, 0.25], [1.0, 0.0]])
    assert [row.tolist() for row in path_losses("mean-loss", table)] == [[0, 0.25, 1], [0.5, 0.25, 0]]
    assert [row.tolist() for row in path_losses("loss-increase", table)] == [[0, 0, 0], [0.5, 0, -1]]


def test_errors_of_any_task_have_the_risks_of_a_classifier() -> None:
    wrong = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    dense, pruned = wrong.T
    for risk in ("negative-flips", "accuracy-drop", "top1-error"):
        rows = path_losses(risk, wrong)
        assert rows[1].tolist() == losses(risk, 1 - dense, 1 - pruned, [1] * 4).tolist()


@pytest.mark.parametrize(
    ("risk", "table", "words"),
    [
        ("mean-loss", [[0, 1.5]], "divide them by the largest possible one"),
        ("mean-loss", [[0, float("nan")]], r"outside of \[0, 1\]"),
        ("negative-flips", [[0, 0.5]], "--risk mean-loss or loss-increase"),
        ("disagreement", [[0, 1]], "cannot be told"),
    ],
)
def test_tables_that_fit_no_risk(risk: str, table: list[list[float]], words: str) -> None:
    with pytest.raises(InputError, match=words):
        path_losses(risk, table)


@pytest.mark.parametrize("risk", LOSS_RISKS)
def test_losses_are_no_classes(risk: str) -> None:
    with pytest.raises(InputError, match="give a table of them"):
        losses(risk, [0], [1], [1])
    assert RISKS[risk].bound == "betting"


def test_zeros_and_ones_have_the_exact_interval() -> None:
    values = np.arange(80) < 7
    exact = binomtest(7, 80).proportion_ci(0.9, method="exact")
    assert mean_interval(values, 0.1) == pytest.approx((7 / 80, exact.low, exact.high))
    assert mean_interval(np.zeros(50))[:2] == (0, 0)
    assert mean_interval(np.ones(50))[::2] == (1, 1)
    assert mean_interval([])[1:] == (0, 1)


def test_intervals_hold_and_beat_hoeffding() -> None:
    """300 draws of 200 numbers with a known mean, at 90 %; 3 standard errors."""
    rng, draws, n = np.random.default_rng(0), 300, 200
    intervals = [mean_interval(rng.beta(2, 8, n), 0.1) for _ in range(draws)]
    misses = np.mean([not each.low <= 0.2 <= each.high for each in intervals])
    assert misses <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / draws)
    assert np.mean([each.high - each.low for each in intervals]) < 0.6 * 2 * math.sqrt(math.log(2 / 0.1) / (2 * n))
    assert all(each.low <= each.mean <= each.high for each in intervals)


def test_an_interval_is_the_mirror_of_the_other_side() -> None:
    values = np.random.default_rng(1).beta(2, 8, 100)
    one, other = mean_interval(values), mean_interval(1 - values)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low))


def test_a_path_of_bounded_losses_is_certified_and_keeps_its_promise() -> None:
    """The second model's true mean, 0.2, is just above alpha: to certify it is an error, at most one in ten."""
    rng, wrong, first, draws = np.random.default_rng(2), 0, 0, 300
    limit = RiskLimit("mean-loss", 0.1999, 0.1)
    for _ in range(draws):
        table = np.stack([rng.beta(1, 9, 300), rng.beta(2, 8, 300)], axis=1)
        path = [Candidate(str(step), -step, row) for step, row in enumerate(path_losses("mean-loss", table))]
        chosen = certify(path, limit).chosen
        wrong += chosen == 1
        first += chosen is not None
    assert wrong / draws <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / draws)
    assert first == draws
