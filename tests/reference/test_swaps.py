"""Swaps around a plan: against exhaustive search, and against the damage that least squares leaves on samples."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SMALL, FlattenCNN, batches_of, random_plan, randomised
from models import subject as subject_named
from torch import Tensor

from pxcompress import InputError, Recipe, compress_module
from pxcompress.elimination import Reader, eliminate
from pxcompress.planning.swaps import _changes, damage, divergence, swapped, swapped_plan
from pxcompress.run import Run
from pxcompress.scorers.lrp_residual import LRPResidual
from pxcompress.scorers.magnitude import Magnitude
from pxcompress.stages import shrink
from pxcompress.state import seeded


def readers_of(units: int, widths: tuple[int, ...], seed: int) -> list[Reader]:
    """Readers of one group with correlated features: A = Sigma^-1, G = W^T W."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for width in widths:
        features = units * width
        samples = torch.randn(3 * features, features, generator=draw, dtype=torch.float64)
        mixed = samples @ torch.randn(features, features, generator=draw, dtype=torch.float64)
        weights = torch.randn(4, features, generator=draw, dtype=torch.float64)
        found.append(Reader(torch.linalg.inv(mixed.T @ mixed / len(mixed)), weights.T @ weights, width))
    return found


CASES = given(st.integers(3, 7), st.sampled_from([(1,), (1, 1), (2,), (3, 1)]), st.integers(0, 10_000), st.data())
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def test_damage_is_what_least_squares_leaves() -> None:
    """E |W_P (x_P - B x_S)|^2 with B fitted on the very samples of which Sigma is the second moment."""
    with seeded(1):
        samples = torch.randn(400, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
        weights = torch.randn(5, 6, dtype=torch.float64)
    reader = Reader(torch.linalg.inv(samples.T @ samples / 400), weights.T @ weights)
    for gone in ([0], [1, 4], [0, 2, 3, 5]):
        kept = [unit for unit in range(6) if unit not in gone]
        fit = torch.linalg.lstsq(samples[:, kept], samples[:, gone]).solution
        error = (samples[:, gone] - samples[:, kept] @ fit) @ weights[:, gone].T
        assert damage([reader], gone) == pytest.approx(float(error.square().sum(1).mean()), rel=1e-9)


@SETTINGS
@CASES
def test_swaps_end_where_no_swap_helps(units: int, widths: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    readers = readers_of(units, widths, seed)
    count = data.draw(st.integers(1, units - 1))
    start = data.draw(st.permutations(range(units)))[:count]
    before = [(reader.inverse.clone(), reader.weights.clone()) for reader in readers]
    found = swapped(readers, start)
    assert len(set(found)) == count
    assert found == tuple(sorted(found))
    least = damage(readers, found)
    assert least <= damage(readers, start)
    every = {gone: damage(readers, gone) for gone in combinations(range(units), count)}
    neighbours = [value for gone, value in every.items() if len(set(gone) - set(found)) == 1]
    assert least <= min(neighbours) * (1 + 1e-6)
    assert least >= min(every.values()) * (1 - 1e-9)
    assert all(torch.equal(reader.inverse, old) for reader, (old, _) in zip(readers, before, strict=True))
    assert all(torch.equal(reader.weights, old) for reader, (_, old) in zip(readers, before, strict=True))


@SETTINGS
@CASES
def test_changes_are_differences_of_damage(units: int, widths: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    readers = readers_of(units, widths, seed)
    gone = sorted(data.draw(st.permutations(range(units)))[: data.draw(st.integers(1, units - 1))])
    kept = [unit for unit in range(units) if unit not in gone]
    now = damage(readers, gone)
    change: Tensor = sum(_changes(reader, torch.tensor(gone), torch.tensor(kept)) for reader in readers)
    for place, back in enumerate(gone):
        for other, out in enumerate(kept):
            after = damage(readers, [out if unit == back else unit for unit in gone])
            assert float(change[place, other]) == pytest.approx(after - now, rel=1e-6, abs=1e-7 * max(now, after))


def test_swaps_find_the_best_set_where_the_greedy_order_misses_it() -> None:
    """How often each ends at the best of all sets, over 100 small groups."""
    hits = {"greedy": 0, "swaps": 0}
    for seed in range(100):
        order = eliminate(readers_of(7, (1, 1), seed), 7).argsort(stable=True).tolist()
        readers = readers_of(7, (1, 1), seed)
        best = min(damage(readers, gone) for gone in combinations(range(7), 4))
        for name, gone in (("greedy", order[:4]), ("swaps", swapped(readers, order[:4]))):
            hits[name] += damage(readers, gone) <= best * (1 + 1e-9)
    assert hits["swaps"] > hits["greedy"]
    assert hits["swaps"] >= 90


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("scorer", [Magnitude(), LRPResidual(metric="weights")], ids=["other", "own"])
def test_damage_of_a_plan_never_rises(name: str, scorer: object) -> None:
    subject = subject_named(name)
    batches, plan = batches_of(subject.inputs, 3), random_plan(subject.groups, 4)
    judge = scorer if isinstance(scorer, LRPResidual) else LRPResidual()
    refined = swapped_plan(subject.model, subject.groups, plan, batches, scorer)
    fell = 0
    for group, readers in judge.readers(subject.model, subject.groups, batches):
        old, new = plan.removed[group.name], refined.removed[group.name]
        assert len(set(new)) == len(old)
        if old:
            assert damage(readers, new) <= damage(readers, old)
            fell += damage(readers, new) < damage(readers, old)
    assert fell > 0
    assert swapped_plan(subject.model, subject.groups, refined, batches, scorer).removed == refined.removed


@pytest.mark.parametrize("rounds", [1, 3])
def test_refined_runs_keep_the_widths(rounds: int) -> None:
    subject = subject_named("flatten_cnn")
    with seeded(0):
        batches = batches_of(torch.randn(96, 3, 32, 32), 32)
    plain, refined = (
        compress_module(
            subject.model,
            subject.example,
            batches,
            0.5,
            scorer="random",
            round_to=1,
            rounds=rounds,
            refine=refine,
            repair=("fold",),
        ).pruned.whole.plan
        for refine in ("none", "swaps")
    )
    widths = [{name: len(units) for name, units in plan.removed.items()} for plan in (plain, refined)]
    assert plain.removed != refined.removed
    assert (refined.cost_planned, refined.cost_dense) == (plain.cost_planned, plain.cost_dense)
    assert widths[0] == widths[1]


def test_unknown_refinement() -> None:
    with pytest.raises(InputError, match="did you mean swaps"):
        Recipe("net", 0.5, refine="swap")


def test_divergence_is_the_mean_over_samples_one_by_one() -> None:
    subject, other = subject_named("flatten_cnn"), randomised(FlattenCNN()).eval()
    expected = 0.0
    for x in subject.inputs.split(1):
        p, q = (model(x).double().softmax(1)[0].tolist() for model in (subject.model, other))
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(subject.inputs)
    assert divergence(subject.model, other, batches_of(subject.inputs, 4)) == pytest.approx(expected)
    assert divergence(subject.model, subject.model, batches_of(subject.inputs, 4)) == 0


@pytest.mark.parametrize("name", ["flatten_cnn", "conv1d"])
@pytest.mark.parametrize("seed", range(3))
def test_a_refined_model_is_never_further_from_the_dense_one_on_samples_not_searched_on(name: str, seed: int) -> None:
    subject = subject_named(name)
    with seeded(seed):
        parts = {
            role: batches_of(torch.randn(12, *subject.inputs.shape[1:]), 6) for role in ("score", "repair", "select")
        }
    recipe = Recipe("mine", 0.6, scorer="magnitude", round_to=1, repair=("fold", "least-squares"))
    found = []
    for refine in ("none", "swaps"):
        pruned = shrink(subject.model, subject.example, Run(recipe.but(refine=refine), parts)).pruned
        found.append(divergence(subject.model, pruned.model, parts["select"]))
    assert found[1] <= found[0] * (1 + 1e-6)
