"""PLRP against a slow float64 version that knows layers as matrices, and the promises it makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import SMALL, Subject, batches_of, randomised
from models import subject as subject_named
from test_rules import matrix, reference
from torch import Tensor, nn

from pxcompress.attribution import Composite, RelevancePruning, attributed, parse_composite
from pxcompress.attribution.plrp import LARGEST_RATIO, find_surviving
from pxcompress.attribution.rules import AlphaBeta, Epsilon, Gamma, Rule, ZPlus
from pxcompress.errors import InputError, ModelError
from pxcompress.scorers import SCORERS
from pxcompress.state import seeded

COMPOSITES = ("epsilon", "gamma(0.25)", "zplus", "alphabeta(2;1)")
RULES: dict[str, Rule] = dict(zip(COMPOSITES, (Epsilon(), Gamma(0.25), ZPlus(), AlphaBeta(2.0, 1.0)), strict=True))


class Images(nn.Sequential):
    """Two strided convolutions and two linear layers on images."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(27, 6),
            nn.ReLU(),
            nn.Linear(6, 3),
        )


class Sequences(nn.Sequential):
    """The same on sequences."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(4, 5, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(5, 3, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(15, 3),
        )


NETS = {"images": (Images, (2, 8, 8)), "sequences": (Sequences, (4, 12))}


def dropped(relevance: Tensor, share: float) -> set[int]:
    """Positions that go, one by one, smallest first."""
    places = {place for place, value in enumerate(relevance.tolist()) if value == 0}
    for sign, part in ((1, share), (-1, share / 2)):
        sizes = sorted((sign * value, place) for place, value in enumerate(relevance.tolist()) if sign * value > 0)
        mass, held = sum(size for size, _ in sizes), 0.0
        for size, place in sizes:
            held += size
            if held > part * mass:
                break
            places.add(place)
    return places


def lambda_of(relevance: Tensor, places: set[int]) -> Tensor:
    result = relevance.clone()
    result[list(places)] = 0
    for sign in (1, -1):
        mass, left = ((sign * each).clamp(min=0).sum() for each in (relevance, result))
        if left > 0:
            result[sign * result > 0] *= mass / left
    return result


@torch.no_grad()
def slow(net: nn.Sequential, rule: Rule, x: Tensor, share: float, variant: str) -> Tensor:
    """Relevance of one input x of the class that wins, layer by layer, by the definitions."""
    inputs = [x]
    for layer in net:
        inputs.append(layer(inputs[-1][None])[0])
    relevance = torch.where(inputs[-1] == inputs[-1].max(), inputs[-1], 0.0)
    for place in reversed(range(len(net))):
        layer, a = net[place], inputs[place]
        if not hasattr(layer, "weight"):
            relevance = relevance.reshape(a.shape)
            continue
        zeros = torch.zeros(1, *a.shape, dtype=a.dtype)
        bias = layer(zeros).flatten()
        weight = matrix(
            lambda value, layer=layer, bias=bias: layer(value) - bias.view(1, *layer(value).shape[1:]), a.shape
        )
        plain = reference(rule, weight, bias, a.flatten(), relevance.flatten())
        if place and variant == "lambda":
            plain = lambda_of(plain, dropped(plain, share))
        elif place:
            rest = a.flatten().clone()
            places = list(dropped(plain, share))
            rest[places] = 0
            ratio = ((weight @ a.flatten() + bias) / (weight @ rest + bias)).clamp(-LARGEST_RATIO, LARGEST_RATIO)
            # what an output z has, z m, its smaller version z' keeps where the ratio z / z' is not cut
            scaled = relevance.flatten() * ratio * (weight @ rest + bias) / (weight @ a.flatten() + bias)
            plain = reference(rule, weight, bias, rest, scaled)
            plain[places] = 0
        relevance = plain.reshape(a.shape)
    return relevance


def relevances(net: nn.Module, composite: str | Composite, x: Tensor, pruning: RelevancePruning | None) -> Tensor:
    chosen = composite if isinstance(composite, Composite) else parse_composite(composite)
    with attributed(net, chosen, x[:1], pruning) as twin:
        x = x.clone().requires_grad_()
        out = twin.model(x)
        start = (out == out.amax(1, keepdim=True)).to(out)
        (m,) = torch.autograd.grad(out, x, start)
    return (x * m).detach()


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("variant", ["lambda", "m"])
@pytest.mark.parametrize("name", list(NETS))
def test_as_the_slow_version(name: str, variant: str, composite: str) -> None:
    build, shape = NETS[name]
    with seeded(2):
        net = build().double().eval()
        x = torch.randn(3, *shape, dtype=torch.float64)
    for share in (0.05, 0.3, 0.7):
        result = relevances(net, composite, x, RelevancePruning(share, variant))
        for row, one in zip(result, x, strict=True):
            expected = slow(net, RULES[composite], one, share, variant)
            assert torch.allclose(row, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_what_survives(share: float) -> None:
    relevance = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    masks = find_surviving(relevance, share)
    for row, stays in zip(relevance, masks, strict=True):
        assert not stays[row == 0].any()
        for sign, part in ((1, share), (-1, share / 2)):
            sizes = (sign * row.double()).clamp(min=0)
            pruned = sizes[~stays]
            assert pruned.sum() <= part * sizes.sum() * (1 + 1e-12)
            smallest = sizes[stays & (sizes > 0)].min()
            assert pruned.max() <= smallest
            assert pruned.sum() + smallest > part * sizes.sum()


def hidden_mass(net: nn.Module, x: Tensor, pruning: RelevancePruning) -> list[tuple[Tensor, Tensor]]:
    """Positive and negative relevance, (samples, 2), that each layer but the first would hand back, and does."""
    masses = []

    def spied(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spy(self: Rule, layer: object, a: Tensor, z: Tensor, m: Tensor, shape: torch.Size) -> Tensor:
            hidden = original(self, layer, a, z, m, shape)
            plain = self.rule.multiplier(layer, a, z, m, shape)
            pair = [layer.by_sample((a * each).double()) for each in (plain, hidden)]
            masses.append(tuple(torch.stack([r.clamp(min=0).sum(1), r.clamp(max=0).sum(1)], 1) for r in pair))
            return hidden

        return spy

    from pxcompress.attribution import plrp

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plrp.PrunedRule, "multiplier", spied(plrp.PrunedRule.multiplier))
        relevances(net, "epsilon", x, pruning)
    return masses


@pytest.mark.parametrize("name", SMALL)
def test_lambda_conserves_each_signs_mass(name: str) -> None:
    subject = subject_named(name)
    masses = hidden_mass(subject.model, subject.inputs, RelevancePruning(0.4))
    assert len(masses) >= 3
    for before, after in masses:
        assert torch.allclose(after, before, rtol=1e-6, atol=1e-6 * float(before.abs().max()))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("variant", ["lambda", "m"])
def test_samples_do_not_meet(name: str, variant: str) -> None:
    subject: Subject = subject_named(name)
    together = relevances(subject.model, "epsilon", subject.inputs[:3], RelevancePruning(0.2, variant))
    alone = torch.cat(
        [
            relevances(subject.model, "epsilon", one, RelevancePruning(0.2, variant))
            for one in subject.inputs[:3].split(1)
        ]
    )
    assert torch.isfinite(together).all()
    close = torch.nn.functional.cosine_similarity(together.flatten(1), alone.flatten(1))
    assert (close > 0.99).all()  # rounding moves what is just at the threshold
    plain = relevances(subject.model, "epsilon", subject.inputs[:3], None)
    assert not torch.allclose(together, plain, rtol=1e-2)
    assert torch.equal(relevances(subject.model, "epsilon", subject.inputs[:3], RelevancePruning(0.0, variant)), plain)


class TokensFirst(nn.Module):
    """nn.MultiheadAttention works on (tokens, samples, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, stride=8)
        self.block = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT
        return self.head((tokens + self.block(tokens, tokens, tokens)[0]).mean(1))


def test_samples_are_told_apart_where_tokens_come_first() -> None:
    with seeded(0):
        net, x = randomised(TokensFirst()).double().eval(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    together = relevances(net, "epsilon", x, RelevancePruning(0.5))
    alone = torch.cat([relevances(net, "epsilon", one, RelevancePruning(0.5)) for one in x.split(1)])
    assert torch.allclose(together, alone, rtol=1e-9)


class Halved(nn.Module):
    """Runs the first half of its samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        half = self.second(self.first(x)[: (len(x) + 1) // 2])
        return half.repeat(2, 1)[: len(x)]


def test_a_layer_that_mixes_samples_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be told apart into 5 samples"):
        relevances(Halved(), "epsilon", torch.randn(5, 4), RelevancePruning(0.1))


@pytest.mark.parametrize(("share", "variant"), [(-0.1, "lambda"), (1.0, "lambda"), (0.5, "mu")])
def test_bad_settings_are_refused(share: float, variant: str) -> None:
    with pytest.raises(InputError, match="pruned relevance"):
        RelevancePruning(share, variant)


def test_the_scorer_denoises() -> None:
    subject = subject_named("resnet_basic")
    batches = batches_of(subject.inputs, 4)
    plain, none, denoised = (
        SCORERS.build(text)(subject.model, subject.groups, batches) for text in ("lrp", "lrp:plrp=0", "lrp:plrp=0.3")
    )
    for name, values in plain.items():
        assert torch.equal(values, none[name])
        assert not torch.allclose(values, denoised[name], rtol=1e-3)
    zeros = [sum(int((values == 0).sum()) for values in each.values()) for each in (plain, denoised)]
    assert zeros[1] >= zeros[0]
