"""Heads that own more than rows of linear layers: biases by position, scales, norms; and attention narrower than its
input."""

from __future__ import annotations

import copy
import functools
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import CLASSES, batches_of, kept_counts, plan_of, randomised, silenced, snapshot
from torch import Tensor, nn

from pxcompress.cost.count import count_macs, count_params, macs_meter, params_meter
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.parity import verify_parity
from pxcompress.graph import (
    AttentionLayout,
    attention_layouts,
    find_groups,
    prune,
    register_attention,
    removal_error,
)
from pxcompress.planning.rounds import groups_left, prune_further
from pxcompress.repair import REPAIRS
from pxcompress.scorers import SCORERS
from pxcompress.state import seeded
from pxcompress.types import Group, Plan

Subject = tuple[nn.Module, tuple[Group, ...], Tensor]

FAMILIES: Mapping[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)
    },
    "swinv2_tiny_window8_256": {
        "img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)
    },
    "beit_base_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4},
    "eva02_tiny_patch14_224": {"img_size": 28, "embed_dim": 16, "depth": 2, "num_heads": 4},
    "levit_128s": {"img_size": 64, "embed_dim": (16, 24), "key_dim": 4, "depth": (1, 1), "num_heads": (2, 3)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 12, 16), "num_heads": (1, 2, 3, 4)},
    "twins_svt_small": {
        "img_size": 32, "depths": (1, 2, 1, 2), "embed_dims": (8, 8, 12, 16), "num_heads": (1, 2, 3, 4),
        "wss": (2, 2, 2, 2),
    },
    "xcit_nano_12_p16_224": {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 4, "cls_attn_layers": 1},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 12, 16), "num_heads": (1, 2, 3, 4)},
    "tiny_vit_5m_224": {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 4)},
}  # fmt: skip


@functools.cache
def _subject(name: str) -> Subject:
    side = FAMILIES[name].get("img_size", 32)
    with seeded(1):
        model = randomised(timm.create_model(name, num_classes=CLASSES, **FAMILIES[name])).eval()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter)
        inputs = torch.randn(6, 3, side, side)
    return model, find_groups(model, inputs[:1]).groups, inputs


@pytest.fixture(params=FAMILIES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return _subject(request.param)


def _heads(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    return tuple(group for group in groups if group.kind == "head")


def _halved(groups: tuple[Group, ...]) -> Plan:
    """Every other unit goes, from the first on; one at least stays."""
    return plan_of({group.name: range(0, group.units - 1, 2) for group in groups})


def test_every_head_can_go(subject: Subject) -> None:
    model, groups, _ = subject
    attention = {
        name: part for name, part in model.named_modules() if {"num_heads", "proj"} <= {*vars(part), *part._modules}
    }
    assert attention
    assert {group.name for group in _heads(groups)} == set(attention)
    assert all(group.units == attention[group.name].num_heads for group in _heads(groups))


def test_removal_equals_masking(subject: Subject) -> None:
    model, groups, inputs = subject
    before = snapshot(model)
    plan = _halved(_heads(groups))
    pruned = prune(model, groups, plan)
    with torch.no_grad():
        slim, dense = pruned.model(inputs), model(inputs)
    expected = silenced(model, groups, plan, inputs)
    assert float((slim - expected).abs().max() / expected.abs().max()) < 1e-4
    assert float((slim - dense).abs().max() / dense.abs().max()) > 1e-3
    assert removal_error(pruned, inputs) < 1e-4
    assert snapshot(model) == before


def test_costs_are_those_of_the_slim_model(subject: Subject) -> None:
    model, groups, inputs = subject
    plan = _halved(groups)
    slim = prune(model, groups, plan).model
    widths = kept_counts(groups, plan)
    assert params_meter(model, groups)(widths) == count_params(slim)
    assert macs_meter(model, groups, inputs[:1])(widths) == count_macs(slim, inputs[:1])


def test_rounds_lead_where_one_cut_leads(subject: Subject) -> None:
    model, groups, inputs = subject
    first = prune(model, groups, plan_of({group.name: range(group.units // 3) for group in groups}))
    plan = plan_of({group.name: range(group.units // 2) for group in groups})
    twice = prune_further(first, groups_left(first), plan).model
    once = prune(model, groups, plan).model
    with torch.no_grad():
        assert torch.equal(twice(inputs), once(inputs))


def test_a_plan_and_a_state_rebuild_the_slim_model(subject: Subject) -> None:
    model, groups, inputs = subject
    plan = _halved(groups)
    slim = prune(model, groups, plan).model
    other = copy.deepcopy(model)
    again = find_groups(other, torch.zeros_like(inputs[:1]), prove=False).groups
    named = tuple(group for group in again if group.name in plan.removed)
    rebuilt = prune(other, named, plan).model
    nn.init.zeros_(next(rebuilt.parameters()))
    rebuilt.load_state_dict(slim.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt(inputs), slim(inputs))


def test_a_narrow_model_is_copied_and_pickled() -> None:
    model, groups, inputs = _subject("pvt_v2_b0")
    slim = prune(model, groups, _halved(groups)).model
    file = io.BytesIO()
    torch.save(slim, file)
    file.seek(0)
    with torch.no_grad():
        expected = slim(inputs)
        assert torch.equal(copy.deepcopy(slim)(inputs), expected)
        assert torch.equal(torch.load(file, weights_only=False)(inputs), expected)
    assert [type(part).__name__ for part in slim.modules()] == [type(part).__name__ for part in model.modules()]


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "levit_128s", "pvt_v2_b0"])
def test_relevance_and_fold_work_on_such_heads(name: str) -> None:
    model, groups, inputs = _subject(name)
    with seeded(2):
        batches = batches_of(torch.randn(32, *inputs.shape[1:]), 16)
    scores = SCORERS.build("lrp")(model, groups, batches)
    for group in _heads(groups):
        assert scores[group.name].shape == (group.units,)
        assert scores[group.name].isfinite().all()
        assert group.units == 1 or scores[group.name].std() > 0
    pruned = prune(model, groups, _halved(_heads(groups)))
    with torch.no_grad():
        dense = model(batches[0][0])
        before = float((pruned.model(batches[0][0]) - dense).square().mean())
    REPAIRS.build("fold")(pruned, batches)
    with torch.no_grad():
        assert float((pruned.model(batches[0][0]) - dense).square().mean()) < before


class ByWidth(nn.Module):
    """Attention that takes the width of its input for that of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = 4, 0.5
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def scale_of(self, width: int) -> float:
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        size = width // self.num_heads
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, size).permute(2, 0, 3, 1, 4)
        weights = (q * self.scale_of(width) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, width))


class ScaledByWidth(ByWidth):
    """Its scale too, as in torchvision's Swin: another number where there are fewer heads."""

    def __init__(self) -> None:
        super().__init__()
        del self.scale

    def scale_of(self, width: int) -> float:
        return (width // self.num_heads) ** -0.5


def _around(attention: nn.Module) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(16), attention, nn.Flatten(), nn.Linear(64, CLASSES)).eval()


def test_a_narrow_model_exports(tmp_path: Path) -> None:
    with seeded(0):
        model, inputs = _around(ByWidth()), torch.randn(5, 4, 16)
    groups = find_groups(model, inputs[:1]).groups
    pruned = prune(model, groups, plan_of({"1": (0, 2, 3)}))
    assert removal_error(pruned, inputs) < 1e-5
    export_onnx(pruned.model, inputs[:1], tmp_path / "model.onnx", {})
    assert verify_parity(pruned.model, tmp_path / "model.onnx", [inputs]).passed


def test_a_scale_that_follows_the_width_keeps_the_heads() -> None:
    with seeded(0):
        structure = find_groups(_around(ScaledByWidth()), torch.randn(1, 4, 16))
    assert not _heads(structure.groups)
    reason = next(layer.reason for layer in structure.fixed if layer.name == "1")
    assert reason.startswith("its units cannot be removed: RuntimeError: shape '[2, 4, 3, 2, 8]' is invalid")


class Toy(nn.Module):
    """Attention with names of its own: what belongs to a head lies together, a table of biases has heads last."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.inner = 4, 16
        self.to_qkv, self.to_out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.by_position = nn.Parameter(torch.randn(4, 4, 4))  # queries, keys, heads: all alike in number

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (self.n_head, 3, self.inner // self.n_head)).transpose(1, 2).unbind(3)
        weights = (q @ k.transpose(-2, -1) + self.by_position.permute(2, 0, 1)).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


TOY = AttentionLayout(
    "toy",
    projections=("to_qkv",),
    outputs=("to_out",),
    counts=("n_head",),
    rows="heads",
    widths=("inner",),
    tables=("by_position",),
)


@pytest.fixture
def forgetting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that a test registers are forgotten after it."""
    monkeypatch.setattr(attention_layouts, "ATTENTION_LAYOUTS", dict(attention_layouts.ATTENTION_LAYOUTS))


def _toy() -> tuple[nn.Module, Tensor]:
    with seeded(0):
        return _around(Toy()), torch.randn(5, 4, 16)


@pytest.mark.usefixtures("forgetting")
def test_a_registered_family_loses_heads() -> None:
    model, inputs = _toy()
    assert not _heads(find_groups(model, inputs[:1]).groups)
    register_attention(TOY)
    groups = find_groups(model, inputs[:1]).groups
    assert [(group.name, group.units) for group in _heads(groups)] == [("1", 4)]
    pruned = prune(model, groups, plan_of({"1": (0, 2, 3)}))
    assert removal_error(pruned, inputs) < 1e-5
    assert (pruned.model[1].n_head, pruned.model[1].to_qkv.out_features) == (1, 12)
    assert pruned.model[1].by_position.shape == (4, 4, 1)
    other = prune(model, groups, plan_of({"1": (1,)}))
    again = prune_further(other, groups_left(other), plan_of({"1": (1, 3)}))
    assert removal_error(again.whole, inputs) < 1e-5


@pytest.mark.usefixtures("forgetting")
@pytest.mark.parametrize("wrong", [{"rows": "blocks"}, {"tables": ()}, {"counts": ("inner",)}, {"widths": ()}])
def test_a_record_that_does_not_fit_keeps_the_heads_and_says_why(wrong: dict[str, Any]) -> None:
    model, inputs = _toy()
    register_attention(replace(TOY, **wrong))
    structure = find_groups(model, inputs[:1])
    assert not _heads(structure.groups)
    reason = next(layer.reason for layer in structure.fixed if layer.name == "1")
    assert re.search(r"cannot be removed: \w+Error: .+|differ by \S+ of|changes", reason)


@pytest.mark.usefixtures("forgetting")
def test_a_family_is_registered_once_and_the_last_one_counts() -> None:
    register_attention(TOY)
    with pytest.raises(ValueError, match="'toy' is registered twice"):
        register_attention(TOY)
    register_attention(replace(TOY, name="other"))
    layout = attention_layouts.layout_of(Toy())
    assert layout is not None
    assert layout.name == "other"
