"""What `benchmarks/certify.py` compares with: bounds against exact ones, testing against closed testing."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_certify import errors_of, exact_tail

from pxcompress.certify.learn_then_test import binomial, fixed_sequence

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
methods = pytest.importorskip("certify_methods")


@settings(deadline=None)
@given(st.integers(1, 300), st.sampled_from([0.01, 0.05, 0.2]), st.sampled_from([0.01, 0.05, 0.3]))
def test_max_errors_is_the_last_that_passes(n, alpha, delta):
    passing = [errors for errors in range(n + 1) if binomial(errors_of(errors, n), alpha) <= delta]
    assert methods.max_errors(n, alpha, delta) == max(passing, default=None)


@pytest.mark.parametrize("bound", sorted(methods.BOUNDS))
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_p_values_are_valid_at_the_edge(bound, alpha):
    """P(p <= delta) <= delta where the risk equals alpha; 4000 draws, 3 standard errors."""
    values = (np.random.default_rng(1).random((4000, 250)) < alpha).astype(float)
    p_values = methods.BOUNDS[bound](values, alpha)
    for delta in (0.02, 0.05, 0.1, 0.5):
        assert (p_values <= delta).mean() <= delta + 3 * math.sqrt(delta * (1 - delta) / 4000)
    assert ((p_values >= 0) & (p_values <= 1)).all()


@pytest.mark.parametrize("bound", sorted(methods.BOUNDS))
def test_p_values_work_on_stacks_and_fall_with_the_losses(bound):
    stack = np.stack([errors_of(count, 400).astype(float) for count in (0, 4, 20, 60)])
    p_values = methods.BOUNDS[bound](stack, 0.1)
    assert p_values == pytest.approx([float(methods.BOUNDS[bound](row, 0.1)) for row in stack])
    assert (np.diff(p_values) >= 0).all()
    assert p_values[0] < 0.05 < p_values[-1]


def test_exact_beats_hoeffding_bentkus_beats_hoeffding():
    values = errors_of(20, 1000).astype(float)
    bounds = (binomial, methods.hoeffding_bentkus, methods.hoeffding)
    p_values = [float(bound(values, 0.03)) for bound in bounds]
    assert p_values == sorted(p_values)


def test_hoeffding_bentkus_from_the_paper():
    """h1(a, b) = a log(a/b) + (1-a) log((1-a)/(1-b)), p = min(exp(-n h1), e P(Bin <= ceil(n mean)))."""
    values, alpha = np.array([0.5] * 30 + [0.0] * 70), 0.3
    h1 = 0.15 * math.log(0.15 / alpha) + 0.85 * math.log(0.85 / (1 - alpha))
    expected = min(math.exp(-100 * h1), math.e * float(exact_tail(15, 100, alpha)))
    assert float(methods.BOUNDS["hoeffding-bentkus"](values, alpha)) == pytest.approx(expected)


p_lists = st.lists(st.sampled_from([0.0, 0.001, 0.02, 0.025, 0.04, 0.05, 0.2, 1.0]), min_size=1, max_size=5)


@given(p_lists)
def test_one_path_is_the_fixed_sequence_under_every_testing(p_values):
    for testing in methods.TESTING.values():
        rejected = testing([range(len(p_values))], np.array(p_values), 0.05)
        assert rejected.tolist() == [i < fixed_sequence(p_values, 0.05) for i in range(len(p_values))]


@given(p_lists, p_lists)
def test_graph_of_two_paths_hands_all_to_the_other_once_one_has_passed(first, second):
    chains = [range(len(first)), range(len(first), len(first) + len(second))]
    rejected = methods.TESTING["graph"](chains, np.array(first + second), 0.05)
    passed = [fixed_sequence(p_values, 0.025) for p_values in (first, second)]
    if passed[0] == len(first):
        passed[1] = fixed_sequence(second, 0.05)
    if passed[1] == len(second):
        passed[0] = fixed_sequence(first, 0.05)
    expected = [i < passed[0] for i in range(len(first))] + [i < passed[1] for i in range(len(second))]
    assert rejected.tolist() == expected
    assert not (methods.TESTING["bonferroni"](chains, np.array(first + second), 0.05) & ~rejected).any()


def closed_test(p_values, delta):
    """Holm's procedure from its definition: reject i where every set that contains i is rejected by Bonferroni."""
    m = len(p_values)
    sets = [s for size in range(1, m + 1) for s in itertools.combinations(range(m), size)]
    return [all(min(p_values[j] for j in s) <= delta / len(s) for s in sets if i in s) for i in range(m)]


@given(st.lists(st.floats(0.0001, 0.2), min_size=2, max_size=5))
def test_graphical_with_even_shares_is_holm(p_values):
    m = len(p_values)
    transitions = (np.ones((m, m)) - np.eye(m)) / (m - 1)
    delta = 0.0712345
    assert methods.graphical(p_values, np.full(m, 1 / m), transitions, delta).tolist() == closed_test(p_values, delta)


def test_three_paths_chance_of_any_false_choice():
    """Every model but the first of each path sits at the edge: the share of wrong certificates stays below delta."""
    rng, draws, delta = np.random.default_rng(3), 4000, 0.1
    chains = [range(0, 3), range(3, 6), range(6, 9)]
    p = rng.random((draws, 9))
    p[:, [0, 3, 6]] = 1e-6
    wrong = [methods.TESTING["graph"](chains, row, delta)[[1, 2, 4, 5, 7, 8]].any() for row in p]
    assert 0.5 * delta < np.mean(wrong) <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)
