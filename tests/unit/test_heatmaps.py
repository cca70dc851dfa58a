"""Heatmaps and what is said of them: small cases by hand, slow versions, properties."""

from __future__ import annotations

import math

import pytest
import torch
from models import SMALL, snapshot
from models import subject as subject_named
from scipy.stats import spearmanr
from torch import Tensor, nn

from pxcompress.errors import InputError
from pxcompress.explain.heatmaps import METHODS, SHARES, Method, choose_share, heatmaps, trade_off
from pxcompress.explain.metrics import (
    SIMILARITIES,
    cosine,
    gini,
    mass_accuracy,
    pixel_flipping,
    rank_accuracy,
    rank_correlation,
    top_overlap,
)
from pxcompress.state import seeded


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(SIMILARITIES))
def test_a_map_is_like_itself_and_its_multiples(name: str) -> None:
    maps = noise(5, 40)
    assert torch.allclose(SIMILARITIES[name](maps, 3 * maps), torch.ones(5, dtype=torch.float64))
    assert (SIMILARITIES[name](maps, noise(5, 40, seed=1)) < 0.9).all()
    assert torch.equal(SIMILARITIES[name](maps, -maps) <= 0, torch.tensor([True] * 5))


def test_similarities_by_hand() -> None:
    first, second = torch.tensor([[1.0, 0.0, 0.0, 1.0]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert cosine(first, second).item() == pytest.approx(0.5)
    assert top_overlap(torch.tensor([[1.0, 0.0, 0.5, 0.7]]), torch.tensor([[9.0, 0.0, 0.0, 1.0]])).item() == 1
    assert cosine(first, 0 * first).item() == rank_correlation(first, 0 * first).item() == 0


def test_rank_correlation_is_spearmans() -> None:
    first, second = noise(4, 30).round(decimals=1), noise(4, 30, seed=1).round(decimals=1)  # with ties
    expected = [spearmanr(a, b).statistic for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    assert torch.allclose(rank_correlation(first, second), torch.tensor(expected))


def test_gini_is_half_the_mean_difference_over_the_mean() -> None:
    maps = noise(3, 25)
    sizes = maps.abs().double()
    slow = (sizes[:, :, None] - sizes[:, None, :]).abs().mean((1, 2)) / (2 * sizes.mean(1))
    assert torch.allclose(gini(maps), slow)
    single = torch.zeros(1, 10)
    assert gini(single).item() == 0
    single[0, 3] = -2
    assert gini(single).item() == pytest.approx(0.9)
    assert gini(torch.ones(1, 7)).item() == pytest.approx(0, abs=1e-12)


def test_accuracies_by_hand() -> None:
    maps = torch.tensor([[4.0, 1.0, -9.0, 3.0], [-1.0, -1.0, 0.0, 0.0]])
    masks = torch.tensor([[True, False, True, False], [False] * 4])
    assert mass_accuracy(maps, masks)[0].item() == pytest.approx(0.5)
    assert rank_accuracy(maps, masks)[0].item() == pytest.approx(0.5)
    assert math.isnan(mass_accuracy(maps, masks)[1])
    assert math.isnan(rank_accuracy(maps, masks)[1])


class Summed(nn.Module):
    """Two classes that differ by the sum of the pixels, each with its weight."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        total = (x.flatten(1) * self.weights).sum(1)
        return torch.stack([total, torch.zeros_like(total)], 1)


def test_pixel_flipping_by_hand() -> None:
    weights, x = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.ones(1, 1, 2, 2)
    values = [6, 3, 1, 0, 0]  # the largest goes first
    heights = torch.tensor(values, dtype=torch.float64).sigmoid()
    expected = float(torch.trapezoid(heights, dx=0.25))

    def judge(values: Tensor) -> Tensor:
        return Summed(weights)(values).softmax(1)[:, 0]

    area = pixel_flipping(judge, x, weights[None], steps=4)
    assert area.item() == pytest.approx(expected)
    assert pixel_flipping(judge, x, -weights[None], steps=4).item() > expected


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", list(METHODS))
def test_heatmaps_have_the_inputs_positions_and_leave_the_model(name: str, method: str) -> None:
    subject = subject_named(name)
    before = snapshot(subject.model)
    targets = torch.tensor([0, 1, 2])
    maps = heatmaps(
        subject.model, subject.inputs[:3], targets, Method(method, "gamma", 0.1 if METHODS[method] else 0.0)
    )
    assert maps.shape == (3, *subject.inputs.shape[2:])
    assert torch.isfinite(maps).all()
    assert snapshot(subject.model) == before


def test_heatmaps_add_up_to_the_logit_without_biases() -> None:
    with seeded(0):
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5, bias=False)
        ).eval()
    x, targets = noise(40, 3, 6, 6), torch.arange(40) % 5  # more than a chunk
    logits = net(x).detach().gather(1, targets[:, None])[:, 0]
    assert torch.allclose(heatmaps(net, x, targets, Method()).sum((1, 2)), logits, rtol=1e-3, atol=1e-4)


def test_the_chosen_share_has_the_best_trade_off() -> None:
    subject = subject_named("flatten_cnn")
    targets = torch.zeros(6, dtype=torch.int64)
    share_chosen = choose_share(subject.model, subject.inputs, targets, "plrp-lambda", "gamma")

    def maps(share: float) -> Tensor:
        return heatmaps(subject.model, subject.inputs, targets, Method("plrp-lambda", "gamma", share)).flatten(1)

    worth = {share: trade_off(maps(share), maps(0.0)) for share in (0.0, *SHARES)}
    assert worth[0.0] == pytest.approx(0, abs=1e-6)
    assert share_chosen == max(worth, key=lambda share: worth[share])
    assert choose_share(subject.model, subject.inputs, targets, "lrp", "gamma") == 0


@pytest.mark.parametrize("options", [{"name": "plrp"}, {"composite": "nothing"}, {"name": "plrp-m", "share": 1.0}])
def test_bad_methods_are_refused(options: dict) -> None:
    with pytest.raises(InputError):
        Method(**options)
