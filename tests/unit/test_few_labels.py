"""Labels only where models disagree: the same losses and p-values as with all labels, for every path and any labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from pxcompress import choices
from pxcompress.certify.few_labels import (
    MISSING,
    NEITHER,
    check_few_labels,
    completed_labels,
    pessimistic_losses,
    random_order,
    samples_to_label,
)
from pxcompress.certify.path import RISKS, Candidate, RiskLimit, certify, losses
from pxcompress.errors import InputError

DRAWN = settings(deadline=None, derandomize=True, database=None, max_examples=80)
SPLIT = "5e"
FEW = sorted(name for name in RISKS if RISKS[name].zero_where_equal)
seeds = st.integers(0, 10_000)


def path_of(seed: int, n: int = 300, models: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Predicted classes (models, n) of ever worse models, and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=n)
    rates = np.linspace(0.05, 0.2, models)
    wrong = rng.random((models, n)) < rates[:, None]
    return np.where(wrong, rng.integers(4, size=(models, n)), labels), labels


def certificate_of(limit: RiskLimit, predicted: np.ndarray, labels: np.ndarray):
    dense = predicted[0]
    rows = [losses(limit.risk, dense, pruned, labels) for pruned in predicted]
    return certify([Candidate(str(place), -place, row) for place, row in enumerate(rows)], limit)


@pytest.mark.parametrize("risk", FEW)
@DRAWN
@given(seed=seeds)
def test_p_values_equal_those_of_full_labels(risk: str, seed: int) -> None:
    predicted, labels = path_of(seed)
    to_label = samples_to_label(risk, predicted, random_order(300, SPLIT), anytime=False)
    few = completed_labels(predicted[0], {int(place): int(labels[place]) for place in to_label})
    limit = RiskLimit(risk, 0.1)
    assert certificate_of(limit, predicted, few) == certificate_of(limit, predicted, labels)
    assert len(to_label) == (0 if risk == "disagreement" else (predicted != predicted[0]).any(axis=0).sum()) < 300


@pytest.mark.parametrize("risk", FEW)
@DRAWN
@given(seed=seeds)
def test_which_class_it_is_where_no_model_is_right_does_not_matter(risk: str, seed: int) -> None:
    predicted, labels = path_of(seed)
    nobody = np.where((predicted == labels).any(axis=0), labels, NEITHER)
    limit = RiskLimit(risk, 0.1)
    assert certificate_of(limit, predicted, nobody) == certificate_of(limit, predicted, labels)


@DRAWN
@given(seed=seeds, anytime=st.booleans())
def test_every_disagreement_is_asked_for_once_in_the_order_of_the_test(seed: int, anytime: bool) -> None:
    predicted, _ = path_of(seed)
    order = random_order(300, SPLIT)
    to_label = samples_to_label("negative-flips", predicted, order, anytime=anytime)
    differs = predicted[1:] != predicted[0]
    assert sorted(to_label) == np.flatnonzero(differs.any(axis=0)).tolist()
    rank = np.argsort(order)
    key = [(0 if anytime else int(differs[:, place].argmax()), int(rank[place])) for place in to_label]
    assert key == sorted(key)


def test_the_order_is_that_of_the_split() -> None:
    assert sorted(random_order(50, "ab")) == list(range(50))
    assert random_order(50, "ab").tolist() == random_order(50, "ab").tolist() != random_order(50, "ac").tolist()


@DRAWN
@given(seed=seeds, share=st.floats(0, 1))
def test_missing_answers_count_as_the_worst_and_never_lower_a_binomial_p_value(seed: int, share: float) -> None:
    predicted, labels = path_of(seed, models=2)
    dense, pruned = predicted
    missing = (np.random.default_rng(seed).random(300) < share) & (dense != pruned)
    some = np.where(missing, MISSING, labels)
    values = pessimistic_losses("negative-flips", dense, pruned, some)
    exact = losses("negative-flips", dense, pruned, labels)
    assert values.tolist() == np.where(missing, 1, exact).tolist()
    assert RiskLimit(alpha=0.1).p_value(values) == pytest.approx(binom.cdf(values.sum(), 300, 0.1))
    assert RiskLimit(alpha=0.1).p_value(values) >= RiskLimit(alpha=0.1).p_value(exact)


def test_a_missing_label_changes_nothing_where_the_models_agree_or_none_is_needed() -> None:
    assert pessimistic_losses("accuracy-drop", [0, 0], [0, 1], [MISSING, MISSING]).tolist() == [0, 1]
    assert pessimistic_losses("disagreement", [0, 0], [0, 1], [MISSING, MISSING]).tolist() == [0, 1]


def test_top1_error_needs_every_label() -> None:
    for risk in choices.RISKS:
        if risk in FEW:
            check_few_labels(risk)
            assert losses(risk, [2, 2], [2, 2], [2, 0]).tolist() == [0, 0]
            continue
        assert losses(risk, [2, 2], [2, 2], [2, 0]).any()
        with pytest.raises(InputError, match="the label of every sample; give --data with labels"):
            check_few_labels(risk)
