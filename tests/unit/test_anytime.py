"""Tests that stop when they like: validity under the worst stopping, equality to a slow version, the error budget."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxcompress.certify.anytime import Budget, certify_anytime, stake_budget, stopping_time
from pxcompress.certify.learn_then_test import BETS, e_process, log_wealth
from pxcompress.certify.path import Candidate, RiskLimit, certify
from pxcompress.certify.path import CertificateRow as Row
from pxcompress.errors import InputError

DRAWN = settings(deadline=None, derandomize=True, database=None, max_examples=40)


def test_wealth_step_by_step() -> None:
    values, alpha = np.random.default_rng(0).random(30) * 0.5, 0.3
    parts = [1 / len(BETS)] * len(BETS)
    wealth = []
    for loss in values:
        parts = [part * (1 + bet / (1 - alpha) * (alpha - loss)) for part, bet in zip(parts, BETS, strict=True)]
        wealth.append(sum(parts))
    assert np.exp(log_wealth(values, alpha)) == pytest.approx(wealth)
    assert e_process(values, alpha) == pytest.approx(min(1, 1 / max(wealth)))
    stack = np.stack([values, values[::-1]])
    assert log_wealth(stack, alpha)[1] == pytest.approx(log_wealth(values[::-1], alpha))


@pytest.mark.parametrize("alpha", [0.03, 0.3])
def test_whoever_stops_at_the_best_moment_is_wrong_at_most_with_delta(alpha: float) -> None:
    values = (np.random.default_rng(3).random((1500, 600)) < alpha).astype(float)
    wealth = log_wealth(values, alpha).max(axis=-1)
    for delta in (0.05, 0.2):
        assert (wealth >= -math.log(delta)).mean() <= delta + 3 * math.sqrt(delta * (1 - delta) / 1500)


@DRAWN
@given(seed=st.integers(0, 999), rate=st.sampled_from([0.0, 0.02, 0.1, 0.3]), models=st.integers(1, 3))
def test_the_stop_is_the_first_moment_at_which_the_path_is_decided(seed: int, rate: float, models: int) -> None:
    rng, limit = np.random.default_rng(seed), RiskLimit(alpha=0.1, delta=0.05, anytime=True)
    path = [(rng.random(200) < rate * (step + 1) / models).astype(float) for step in range(models)]
    stop = stopping_time(path, limit)

    def decided(n: int) -> bool:
        for row in path:
            if limit.p_value(row[:n]) <= limit.delta:
                continue
            return bool(e_process(1 - row[:n], 1 - limit.alpha) <= limit.delta)
        return True

    assert decided(stop) or stop == 200
    assert stop == 1 or not decided(stop - 1)


def test_the_choice_at_the_stop_is_kept_with_more_samples() -> None:
    rng, limit = np.random.default_rng(4), RiskLimit(alpha=0.1, anytime=True)
    path = [(rng.random(2000) < rate).astype(float) for rate in (0, 0.03, 0.2)]
    stop = stopping_time(path, limit)
    assert stop < 300
    for n in (stop, 2000):
        rows = [Candidate(str(step), -step, row[:n]) for step, row in enumerate(path)]
        assert certify(rows, limit).chosen == 1


def test_what_is_left() -> None:
    first = stake_budget(0.05, 0.0, 0, 1000)
    assert (first.stake, first.left_after) == (0.025, 0.05)
    failed = Budget(0.05, 0.05, 0.025, 0, 300, 1000, lost=True)
    assert failed.left_after == 0.025
    assert "LEFT for other tests: 700 samples, and a budget of 0.025" in failed.words
    second = stake_budget(0.05, 0.025, 300, 1000)
    assert (second.left, second.stake, second.begins) == (0.025, 0.0125, 300)
    for lost, begins in ((0.05, 10), (0.0, 1000)):
        with pytest.raises(InputError, match="nothing is left of these samples"):
            stake_budget(0.05, lost, begins, 1000)


def test_adaptive_reuse_keeps_one_error_budget() -> None:
    """Four tests, each of a model chosen after the one before, whose risk is just above alpha: any pass is an error."""
    rng, errors, draws = np.random.default_rng(5), 0, 400
    for _ in range(draws):
        begins, lost, wrong = 0, 0.0, False
        samples = rng.random((1500, 2))
        for _ in range(4):
            if begins >= 1500:
                break
            budget = stake_budget(0.2, lost, begins, 1500)
            limit = RiskLimit(alpha=0.0999, delta=budget.stake, anytime=True)
            lucky = samples[:begins].mean(axis=0).argmin() if begins else 0  # what did best so far
            path = [np.zeros(1500 - begins), (samples[begins:, lucky] < 0.1).astype(float)]
            stop = stopping_time(path, limit)
            passed = limit.p_value(path[1][:stop]) <= limit.delta
            wrong |= passed
            lost += 0 if passed else budget.stake
            begins += stop
        errors += wrong
    assert errors / draws <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / draws)


@DRAWN
@given(seed=st.integers(0, 999), cuts=st.lists(st.integers(0, 200), max_size=3), grouped=st.booleans())
def test_to_go_on_is_to_have_had_all_samples_at_once(seed: int, cuts: list[int], grouped: bool) -> None:
    """Whatever the pieces in which samples come: the same sums, p-values and capitals."""
    rng = np.random.default_rng(seed)
    limit = RiskLimit(alpha=0.1, delta=1e-9, anytime=True)  # nothing is decided early
    table = (rng.random((2, 200)) < [[0.05], [0.12]]).astype(float)
    groups = rng.integers(0, 3, 200)
    budget = Budget(0.05, 0.05, 1e-9, 0, 0, 200)

    def run(first: int, last: int, before: tuple[Row, ...] = ()) -> tuple[Row, ...]:
        masks = {str(each): groups[first:last] == each for each in range(3)} if grouped else {}
        rows = [Candidate(str(step), -step, row[first:last]) for step, row in enumerate(table)]
        return certify_anytime(rows, limit, budget, masks, before)[0].rows

    ends = sorted({*cuts, 200})
    rows: tuple[Row, ...] = ()
    for first, last in itertools.pairwise([0, *ends]):
        rows = run(first, last, rows)
    for piece, whole in zip(rows, run(0, 200), strict=True):
        pairs = zip(piece.classes, whole.classes, strict=True) if grouped else [(piece, whole)]
        for one, other in pairs:
            assert (one.n, one.errors) == (other.n, other.errors)
            assert one.p_value == pytest.approx(other.p_value)
            assert one.capital == pytest.approx(other.capital)
        assert piece.p_value == pytest.approx(whole.p_value)
        assert (piece.n, piece.errors) == (200, whole.errors)


def test_every_group_has_to_pass_and_the_test_stops_where_the_last_one_does() -> None:
    rng, limit = np.random.default_rng(6), RiskLimit(alpha=0.1, anytime=True)
    rare = np.arange(3000) % 10 == 0
    losses = (rng.random(3000) < np.where(rare, 0.2, 0.01)).astype(float)
    masks = {"often": ~rare, "rare": rare}
    assert limit.p_value(losses) <= limit.delta
    rows = [Candidate("dense", 2, 0 * losses), Candidate("small", 1, losses)]
    budget = Budget(0.05, 0.05, 0.05, 0, 0, 3000)
    certificate, used = certify_anytime(rows, limit, budget, masks)
    assert certificate.chosen == 0
    assert certificate.rows[1].weakest.name == "rare"
    assert used.lost
    good = [rows[0], rows[1]._replace(losses=losses * ~rare)]
    certificate, used = certify_anytime(good, limit, budget, masks)
    assert certificate.chosen == 1
    assert rare[used.ends - 1], "it ends with a sample of the group that takes longest"
    assert stopping_time([0 * losses, losses * ~rare], limit) < used.ends


def test_a_group_just_above_alpha_passes_at_most_with_delta() -> None:
    rng, limit, draws = np.random.default_rng(7), RiskLimit(alpha=0.1, delta=0.1, anytime=True), 400
    budget, passed = Budget(0.1, 0.1, 0.1, 0, 0, 400), 0
    for _ in range(draws):
        groups = rng.random(400) < 0.4
        losses = (rng.random(400) < np.where(groups, 0.1, 0.01)).astype(float)
        masks = {"bad": groups, "good": ~groups}
        passed += certify_anytime([Candidate("one", 1, losses)], limit, budget, masks)[0].chosen is not None
    assert passed / draws <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / draws)
