"""What torch-pruning gets wrong on graphs it was not made for: each of these once hung, was refused, or lost groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from models import CLASSES, extreme_plan, random_plan
from timm.layers import EcaModule, GluMlp
from torch import Tensor, nn

from pxcompress.graph import find_groups, prune, removal_error
from pxcompress.state import seeded


class Eca(nn.Module):
    """A gate from a convolution along the channels: torch-pruning takes the channels for a length, and never ends."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 8, 3, padding=2)
        self.gate = EcaModule(kernel_size=3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.gate(self.outer(torch.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


class Windows(nn.Module):
    """Attention in windows: reshapes of which none is a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)
        self.qkv, self.proj, self.num_heads = nn.Linear(8, 24), nn.Linear(8, 8), 4
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).permute(0, 2, 3, 1))
        n, height, width, channels = x.shape
        windows = x.view(n, height // 4, 4, width // 4, 4, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, channels)
        q, k, v = self.qkv(windows).reshape(len(windows), 16, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        windows = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(windows), 16, -1)
        windows = self.proj(windows)
        x = x + windows.view(n, height // 4, width // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        x = x + self.fc2(torch.relu(self.fc1(x)))
        return self.head(x.mean((1, 2)))


class GatedTokens(nn.Module):
    """A gated MLP, its two halves from one layer, behind a position embedding: units own a row of both halves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(6, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.mlp = GluMlp(8, 16, act_layer=nn.SiLU)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        return self.head((x + self.mlp(x)).mean(1))


class Halves(nn.Module):
    """Both halves of a chunk are used, one goes through a block (CSPNet): they lose the same places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.join = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.relu(self.stem(x)).chunk(2, dim=1)
        x = torch.cat([left, right + torch.relu(self.block(right))], dim=1)
        return self.head(torch.relu(self.join(x)).mean((2, 3)))


class PartialResidual(nn.Module):
    """Blocks that grow, of which the first channels are a residual (ReXNet): torch-pruning goes round and round."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = (4, 6, 8, 10)
        self.stem = nn.Conv2d(3, 4, 3)
        steps = list(zip(self.widths, self.widths[1:], strict=False))
        self.inner = nn.ModuleList(nn.Conv2d(before, 9, 1) for before, _ in steps)
        self.outer = nn.ModuleList(nn.Conv2d(9, after, 1) for _, after in steps)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for width, inner, outer in zip(self.widths, self.inner, self.outer, strict=False):
            y = outer(torch.relu(inner(x)))
            x = torch.cat([y[:, :width] + x, y[:, width:]], dim=1)
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """A model, the shape of its inputs, and units of each group that must be found."""

    build: type[nn.Module]
    shape: tuple[int, ...]
    units: Mapping[str, int]


CASES = {
    "gate along channels": Case(Eca, (3, 10, 10), {"inner": 12}),
    "windows": Case(Windows, (3, 8, 8), {"": 4, "fc1": 16}),
    "gated MLP": Case(GatedTokens, (5, 6), {"mlp.fc1": 8}),
    "halves": Case(Halves, (3, 8, 8), {"stem": 4, "join": 6}),
    "partial residual": Case(PartialResidual, (3, 8, 8), {"inner.0": 9, "inner.1": 9, "inner.2": 9}),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_are_found_and_exact(name: str) -> None:
    case = CASES[name]
    with seeded(0):
        model, inputs = case.build().eval(), torch.randn(4, *case.shape)
    groups = find_groups(model, inputs[:1], ("head",)).groups
    assert {group.name: group.units for group in groups if group.name in case.units} == dict(case.units)
    for plan in (random_plan(groups, 0), random_plan(groups, 1), extreme_plan(groups)):
        assert removal_error(prune(model, groups, plan), inputs) < 1e-5


def test_units_that_cannot_be_followed_to_an_end_stay_with_a_reason() -> None:
    structure = find_groups(PartialResidual().eval(), torch.randn(1, 3, 8, 8), ("head",))
    assert all(layer.reason.strip() for layer in structure.fixed)
    assert {layer.name for layer in structure.fixed} & {"stem", "outer.0", "outer.1"}


def test_masking_gives_the_dense_model_its_weights_back() -> None:
    """The oracle runs on the dense model itself: no copy of it, and not a bit of it changed."""
    with seeded(0):
        model, inputs = Windows().eval(), torch.randn(4, 3, 8, 8)
    groups = find_groups(model, inputs[:1], ("head",)).groups
    before = {name: value.clone() for name, value in model.state_dict().items()}
    removal_error(prune(model, groups, extreme_plan(groups)), inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
