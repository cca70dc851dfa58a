from __future__ import annotations

import copy

import pytest
import timm
import torch
from models import CLASSES, plan_of, snapshot
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pxcompress.graph import find_groups, prune, removal_error
from pxcompress.models.rewrite import ExplicitAttention, plain
from pxcompress.state import seeded


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def _drawn(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0, 0.5)
    return attention.eval()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 7}, {"bias": False}])
@pytest.mark.parametrize("need_weights", [True, False])
def test_explicit_attention_has_the_numbers_of_multihead_attention(
    batch_first: bool, sizes: dict[str, int], need_weights: bool
) -> None:
    with seeded(0):
        attention = _drawn(nn.MultiheadAttention(12, 3, batch_first=batch_first, **sizes))
        query = torch.randn(2, 4, 12)
        key, value = torch.randn(2, 6, sizes.get("kdim", 12)), torch.randn(2, 6, sizes.get("vdim", 12))
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    parts = [query, key, value] if batch_first else [part.transpose(0, 1) for part in (query, key, value)]
    explicit = ExplicitAttention(attention)
    for mask in (None, torch.arange(6)[None] > torch.arange(4)[:, None] + 1, torch.arange(24.0).reshape(4, 6) / 10):
        given = {"attn_mask": mask, "need_weights": need_weights}
        if mask is None or mask.dtype == torch.bool:
            given["key_padding_mask"] = padding
        expected, weights = attention(*parts, **given)
        found, found_weights = explicit(*parts, **given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert (weights is None) == (found_weights is None)
        if weights is not None:
            torch.testing.assert_close(found_weights, weights, rtol=1e-5, atol=1e-6)


def test_heads_of_multihead_attention_can_go() -> None:
    with seeded(1):
        model, inputs = Encoder().eval(), torch.randn(4, 5, 6)
    _drawn(model.attention)
    before = snapshot(model)
    twin = plain(model)
    assert snapshot(model) == before
    assert torch.allclose(twin(inputs), model(inputs), atol=1e-6)
    groups = {group.name: group for group in find_groups(twin, inputs[:1], ("head",)).groups}
    assert (groups["attention"].kind, groups["attention"].units) == ("head", 3)
    pruned = prune(twin, tuple(groups.values()), plan_of({"attention": (0, 2)}), inputs[:1])
    assert pruned.model.attention.num_heads == 1
    assert pruned.model.attention.q.weight.shape == (4, 12)
    assert removal_error(pruned, inputs) < 1e-5


@pytest.mark.parametrize(
    "layer",
    [
        StdConv2d(4, 6, 3, bias=True),
        ScaledStdConv2d(4, 6, 3, stride=2),
        ScaledStdConv2dSame(4, 6, 3, stride=2),
        StdConv2d(4, 6, 3, dilation=2, groups=2),
        parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
        parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_convolutions_hold_the_weights_they_compute_with(layer: nn.Module) -> None:
    """Weight standardisation: without it no channel could go, since every weight depends on all of its row."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), copy.deepcopy(layer), nn.ReLU(), nn.Conv2d(6, CLASSES, 3)).eval()
    inputs = torch.randn(2, 3, 19, 19)
    twin = plain(model)
    assert type(twin[1]).forward is nn.Conv2d.forward or "Same" in type(twin[1]).__name__
    assert torch.allclose(twin(inputs), model(inputs), atol=1e-5)
    structure = find_groups(twin, inputs[:1], ("3",))
    assert {group.name for group in structure.groups} == {"0", "1"}


def test_a_linear_layer_with_a_parametrization_is_plain_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, CLASSES)).eval()
    inputs = torch.randn(2, 3)
    assert torch.allclose(plain(model)(inputs), model(inputs), atol=1e-6)
    assert {group.name for group in find_groups(plain(model), inputs[:1]).groups} == {"0", "1"}


def test_a_model_in_plain_layers_is_the_same_object() -> None:
    model = timm.create_model("resnet10t")
    assert plain(model) is model


class Scaled(nn.Conv2d):
    """More than a convolution: what it adds behind cannot be seen in its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * 2, self.bias) + 1


class Odd(nn.Conv2d):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * scale, self.bias)


@pytest.mark.parametrize("kind", [Scaled, Odd])
def test_a_convolution_that_does_something_else_stays(kind: type[nn.Conv2d]) -> None:
    layer = kind(3, 4, 3)
    assert type(plain(nn.Sequential(layer))[0]) is kind
