from __future__ import annotations

import pytest
import torch
from models import CLASSES, extreme_plan, plan_of, random_plan, snapshot
from timm.layers import LayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from pxcompress.graph import find_groups, prune, removal_error
from pxcompress.models.response_norm import ExplicitResponseNorm, explicit_response_norm
from pxcompress.models.rewrite import rewrite_plain
from pxcompress.state import seeded

CHANNELS = 6


class GRN(nn.Module):
    """As in the code of the paper."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, dim)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * (size / (size.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + x


class Affine(nn.Module):
    """Does what a response norm does whose weight is zero, as it is at first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(CHANNELS)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + x * self.weight + self.bias


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem, self.fc1 = nn.Conv2d(3, 4, 3), nn.Linear(4, CHANNELS)
        self.grn, self.fc2 = norm, nn.Linear(CHANNELS, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).permute(0, 2, 3, 1))
        return self.head((x + self.fc2(self.grn(torch.relu(self.fc1(x))))).mean((1, 2)))


NORMS = {
    "timm": lambda: GlobalResponseNorm(CHANNELS),
    "timm, channels first": lambda: GlobalResponseNorm(CHANNELS, channels_last=False),
    "timm, another epsilon": lambda: GlobalResponseNorm(CHANNELS, eps=0.3),
    "the paper's": lambda: GRN(CHANNELS),
}


def _drawn(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("at_first", [True, False])
def test_the_explicit_norm_computes_the_same(name: str, at_first: bool) -> None:
    with seeded(0):
        norm, inputs = NORMS[name](), torch.randn(2, CHANNELS, 5, CHANNELS)
        norm = norm if at_first else _drawn(norm)
    before, drawn = snapshot(norm), torch.get_rng_state()
    explicit = explicit_response_norm(norm)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert isinstance(explicit, ExplicitResponseNorm)
    torch.testing.assert_close(explicit(inputs), norm(inputs))
    assert snapshot(norm) == before
    assert [parameter.requires_grad for parameter in explicit.parameters()] == [True, True, False]


@pytest.mark.parametrize("other", [Affine(), nn.LayerNorm(CHANNELS), LayerNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)])
def test_other_layers_with_a_weight_and_a_bias_stay(other: nn.Module) -> None:
    assert explicit_response_norm(other) is None
    model = Net(other)
    assert rewrite_plain(model) is model


@pytest.mark.parametrize("name", ["timm", "the paper's"])
def test_channels_that_it_spans_go_exactly(name: str) -> None:
    with seeded(1):
        model, inputs = _drawn(Net(NORMS[name]())).eval(), torch.randn(3, 3, 8, 8)
    twin = rewrite_plain(model, lambda net: net(inputs))
    torch.testing.assert_close(twin(inputs), model(inputs))
    groups = {group.name: group for group in find_groups(twin, inputs[:1]).groups}
    assert {(member.module, member.axis) for member in groups["fc1"].members} == {
        ("fc1", "out"),
        ("grn.mean", "in"),
        ("grn.weight", "out"),
        ("grn.bias", "out"),
        ("fc2", "in"),
    }
    for plan in (random_plan(list(groups.values()), 0), extreme_plan(list(groups.values()))):
        assert removal_error(prune(twin, list(groups.values()), plan), inputs) < 1e-6


def test_the_divisor_stays_that_of_the_dense_model() -> None:
    with seeded(2):
        model, inputs = _drawn(Net(GlobalResponseNorm(CHANNELS))).eval(), torch.randn(3, 3, 8, 8)
    twin = rewrite_plain(model)
    slim = prune(twin, find_groups(twin, inputs[:1]).groups, plan_of({"fc1": (0, 3)})).model
    assert slim.grn.mean.weight.tolist() == [pytest.approx([1 / CHANNELS] * (CHANNELS - 2))]
