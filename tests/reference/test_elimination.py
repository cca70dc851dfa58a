"""Greedy elimination against a slow one that refits the weights from scratch for every candidate."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pxcompress import elimination
from pxcompress.elimination import ConsumerStatistics, eliminate, invert_regularised
from pxcompress.state import seeded

RIDGE = 1e-6


def _problem(units: int, width: int, outputs: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Second moment of correlated features, weights (outputs, features) and output weights (outputs,)."""
    rng = np.random.default_rng(seed)
    features = units * width
    samples = rng.normal(size=(4 * features, features)) @ rng.normal(size=(features, features))
    return samples.T @ samples / len(samples), rng.normal(size=(outputs, features)), rng.uniform(0.1, 2, outputs)


def _loss(sigma: np.ndarray, weights: np.ndarray, power: np.ndarray, features: list[int]) -> float:
    """min over V of E sum_o w_o (W x - V x_S)_o^2: what remains after the best repair on the features S."""
    lost = [feature for feature in range(len(sigma)) if feature not in features]
    schur = sigma[np.ix_(lost, lost)]
    if features:
        cross = sigma[np.ix_(lost, features)]
        schur = schur - cross @ np.linalg.solve(sigma[np.ix_(features, features)], cross.T)
    return float(np.einsum("o,oi,ij,oj->", power, weights[:, lost], schur, weights[:, lost]))


def _slow(problems: list[tuple[np.ndarray, np.ndarray, np.ndarray]], units: int, width: int) -> list[float]:
    """Remove one unit at a time, always the one after which the best repair is best; cost at removal, never falling."""
    ridged = [(s + RIDGE * s.diagonal().mean() * np.eye(len(s)), w, p) for s, w, p in problems]
    left, scores, level, before = list(range(units)), [0.0] * units, 0.0, 0.0
    while left:
        totals = {}
        for unit in left:
            features = [u * width + j for u in left if u != unit for j in range(width)]
            totals[unit] = sum(_loss(*problem, features) for problem in ridged)
        best = min(left, key=lambda unit: totals[unit])
        level = max(level, totals[best] - before)
        scores[best], before = level, totals[best]
        left.remove(best)
    return scores


def _readers(problems: list[tuple[np.ndarray, np.ndarray, np.ndarray]], width: int) -> list[ConsumerStatistics]:
    return [
        ConsumerStatistics(
            invert_regularised(torch.from_numpy(sigma), RIDGE),
            torch.from_numpy(weights.T @ (power[:, None] * weights)),
            width,
        )
        for sigma, weights, power in problems
    ]


@pytest.mark.parametrize(("width", "consumers", "seed"), itertools.product([1, 3], [1, 2], range(3)))
def test_equals_refitting_from_scratch(width: int, consumers: int, seed: int) -> None:
    units = 7
    problems = [_problem(units, width, 5, 10 * seed + consumer) for consumer in range(consumers)]
    losses = eliminate(_readers(problems, width), units)
    np.testing.assert_allclose(losses.numpy(), _slow(problems, units, width), rtol=1e-6)


@pytest.mark.parametrize(("width", "seed"), itertools.product([1, 2], range(3)))
def test_errors_are_those_on_the_other_samples(width: int, seed: int) -> None:
    """A unit costs what refitting all removed inputs to one set of samples leaves of it on another set."""
    units = 6
    (sigma, weights, power), (other, _, _) = (_problem(units, width, 5, 20 + 2 * seed + place) for place in (0, 1))
    ridged = sigma + RIDGE * sigma.diagonal().mean() * np.eye(len(sigma))
    inverse = torch.from_numpy(np.linalg.inv(ridged))
    gram = torch.from_numpy(weights.T @ (power[:, None] * weights))
    reader = ConsumerStatistics(inverse.clone(), gram, width, check=inverse @ torch.from_numpy(other) @ inverse)
    eliminated: list[int] = []
    for unit in np.random.default_rng(seed).permutation(units)[: units - 1]:
        lost, remaining = (
            [u * width + j for u in part for j in range(width)]
            for part in ([unit], [u for u in range(units) if u not in (*eliminated, unit)])
        )
        folded = weights.copy()
        earlier = [u * width + j for u in eliminated for j in range(width)]
        left = [feature for feature in range(len(sigma)) if feature not in earlier]
        if earlier:
            folded[:, left] += (
                weights[:, earlier] @ np.linalg.solve(ridged[np.ix_(left, left)], ridged[np.ix_(left, earlier)]).T
            )
        predict = np.linalg.solve(ridged[np.ix_(remaining, remaining)], ridged[np.ix_(remaining, lost)]).T
        error = (
            other[np.ix_(lost, lost)]
            - predict @ other[np.ix_(remaining, lost)]
            - other[np.ix_(lost, remaining)] @ predict.T
            + predict @ other[np.ix_(remaining, remaining)] @ predict.T
        )
        expected = np.einsum("o,oi,ij,oj->", power, folded[:, lost], error, folded[:, lost])
        assert float(reader.saliency()[unit]) == pytest.approx(expected, rel=1e-6)
        reader.fold_(torch.tensor([unit]))
        eliminated.append(int(unit))


def test_a_copy_of_a_unit_is_free_once_and_dear_afterwards() -> None:
    with seeded(0):
        samples = torch.randn(100, 4, dtype=torch.float64)
    samples[:, 3] = samples[:, 0]
    sigma = samples.T @ samples / 100
    reader = ConsumerStatistics(invert_regularised(sigma, 1e-9), torch.eye(4, dtype=torch.float64))
    scores = eliminate([reader], 4)
    cheap = scores < 1e-6
    assert cheap.sum() == 1
    assert bool(cheap[0] | cheap[3])


def test_a_unit_nobody_reads_goes_first() -> None:
    sigma, weights, power = _problem(6, 1, 3, 0)
    weights[:, 2] = 0
    assert eliminate(_readers([(sigma, weights, power)], 1), 6).argmin() == 2


def test_going_in_blocks_loses_little(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [_problem(48, 1, 20, seed) for seed in range(6)]
    one_by_one = [eliminate(_readers([problem], 1), 48) for problem in problems]
    monkeypatch.setattr(elimination, "UNITS_PER_REMOVAL", 12)
    in_blocks = [eliminate(_readers([problem], 1), 48) for problem in problems]
    ratios = [
        _loss(*problem, blocks.argsort()[removed:].tolist()) / _loss(*problem, single.argsort()[removed:].tolist())
        for problem, single, blocks in zip(problems, one_by_one, in_blocks, strict=True)
        for removed in (8, 16, 24)
    ]
    assert max(ratios) > 1
    assert np.exp(np.log(ratios).mean()) < 1.1
