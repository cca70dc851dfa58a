"""Scores of layers made comparable."""

from __future__ import annotations

import pytest
import torch
from groups import make_group, price_by_count
from torch import Tensor

from pxcompress.planning.limits import Limits
from pxcompress.planning.order import NORMALISATIONS
from pxcompress.planning.plan import make_plan

PRICES = torch.full((17,), 3.0).double()


def _random_scores(seed: int) -> Tensor:
    return torch.randn(17, generator=torch.Generator().manual_seed(seed)).double() * 3


@pytest.mark.parametrize("name", NORMALISATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_normalising_keeps_the_order(name: str, seed: int) -> None:
    scores = _random_scores(seed)
    before = scores.clone()
    after = NORMALISATIONS[name](scores, PRICES[: len(scores)])
    assert torch.equal(scores, before), "changed its argument"
    assert torch.equal(torch.argsort(after), torch.argsort(scores))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mean", lambda s: s.abs().mean()),
        ("max", lambda s: s.abs().max()),
        ("sum", lambda s: s.abs().sum()),
        ("norm", lambda s: s.square().sum().sqrt()),
    ],
)
def test_each_normalisation_brings_its_size_to_one(name: str, size: object) -> None:
    for seed in range(3):
        after = NORMALISATIONS[name](_random_scores(seed), PRICES)
        assert float(size(after)) == pytest.approx(1)  # type: ignore[operator]
        assert torch.allclose(after, NORMALISATIONS[name](7 * _random_scores(seed), PRICES))
        assert torch.equal(after.sign(), _random_scores(seed).sign())


def test_none_changes_nothing_and_uniform_gives_ranks() -> None:
    scores = torch.tensor([3.0, -1.0, 3.0, 2.0]).double()
    assert torch.equal(NORMALISATIONS["none"](scores, PRICES[:4]), scores)
    assert NORMALISATIONS["uniform"](scores, PRICES[:4]).tolist() == [0.625, 0.125, 0.875, 0.375]


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_scores_of_zero_stay_finite(name: str) -> None:
    assert torch.isfinite(NORMALISATIONS[name](torch.zeros(5).double(), torch.zeros(5).double())).all()


def test_uniform_takes_the_same_share_of_every_group() -> None:
    groups = [make_group("a", 10), make_group("b", 40), make_group("c", 100)]
    scores = {group.name: 10.0**place * torch.rand(group.units) for place, group in enumerate(groups)}
    plan = make_plan(groups, scores, price_by_count(groups), 0.3, Limits("uniform", 1, 0.0))
    assert {name: len(units) for name, units in plan.removed.items()} == {"a": 3, "b": 12, "c": 30}
