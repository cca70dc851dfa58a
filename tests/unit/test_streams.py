"""Residual streams of transformers: rotated exactly, narrowed as zeroing does it, plain LayerNorms again."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pxcompress.cost.count import count_macs, count_params, macs_meter, params_meter
from pxcompress.directions import find_directions, rotate_streams_
from pxcompress.graph import find_groups, make_rotatable, prune, removal_error, restore_layer_norms
from pxcompress.graph.rotation import DirectionNorm, rotate_
from pxcompress.graph.streams import Stream
from pxcompress.graph.tracing import trace_streams
from pxcompress.models.loading import classifier_names
from pxcompress.planning.limits import Limits, align_width
from pxcompress.types import Group, Plan, Structure

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
MODELS = {
    "ViT": lambda: VisionTransformer(**SMALL),
    "no class token": lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg"),
    "CLIP": lambda: VisionTransformer(**SMALL, pre_norm=True),
    "features": lambda: VisionTransformer(**{**SMALL, "num_classes": 0}, reg_tokens=2, init_values=0.5),
    "SigLIP": lambda: VisionTransformer(**SMALL, class_token=False, global_pool="map"),
    "DeiT-3": lambda: VisionTransformer(**SMALL, init_values=0.5, no_embed_class=True),
    "BEiT": lambda: Beit(**SMALL, init_values=0.5, use_rel_pos_bias=True),
    "EVA": lambda: Eva(**SMALL, use_rot_pos_emb=True, swiglu_mlp=True, qkv_fused=True),
}


def model_of(label: str) -> nn.Module:
    """Weights, gains and biases are all drawn, in float64."""
    torch.manual_seed(0)
    model = MODELS[label]().eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def groups_of(model: nn.Module) -> Structure:
    example = IMAGE[:1].to(next(model.parameters()))
    return find_groups(model, example, classifier_names(model, example), prove=False)


def plan_of(group: Group, units: int) -> Plan:
    return Plan({group.name: tuple(range(group.units - units, group.units))}, "", "", 0.0, 0.0, 0.0)


def error(model: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        expected: Tensor = model(IMAGE.double())
        return float((other(IMAGE.double()) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("label", MODELS)
def test_full_width_gives_the_dense_outputs_and_removal_is_zeroing(label: str) -> None:
    model = model_of(label)
    twin = make_rotatable(model, IMAGE[:1].double())
    structure = groups_of(twin)
    groups = [group for group in structure.groups if group.kind == "direction"]
    assert [group.units for group in groups] == [23] * (2 if label == "CLIP" else 1)
    for group in groups:
        basis, _ = torch.linalg.qr(torch.randn(23, 23, dtype=torch.float64))
        rotate_(twin, group, basis)
    assert error(model, twin) < 1e-5
    whole = restore_layer_norms(prune(twin, groups, Plan({}, "", "", 0.0, 0.0, 0.0)))
    assert error(model, whole.model) < 1e-5
    pruned = prune(twin, structure.groups, plan_of(groups[-1], 8))
    assert removal_error(pruned, IMAGE.double()) < 1e-10
    narrowed = copy.deepcopy(pruned.model)
    assert error(narrowed, restore_layer_norms(pruned).model) < 1e-10
    norms = [module for module in pruned.model.modules() if isinstance(module, nn.LayerNorm)]
    assert not any(isinstance(norm, DirectionNorm) for norm in norms)
    assert (16,) in {norm.normalized_shape for norm in norms}


def test_heads_neurons_and_directions_go_together() -> None:
    twin = make_rotatable(model_of("BEiT"), IMAGE[:1].double())
    groups = groups_of(twin).groups
    removed = {group.name: tuple(range(group.units // 2)) for group in groups}
    pruned = prune(twin, groups, Plan(removed, "", "", 0.0, 0.0, 0.0))
    assert {group.kind for group in groups} == {"head", "neuron", "direction"}
    assert removal_error(pruned, IMAGE.double()) < 1e-10


def test_prices_are_those_of_the_narrowed_model() -> None:
    twin = make_rotatable(model_of("ViT").float(), IMAGE[:1])
    groups = groups_of(twin).groups
    widths = {group.name: group.units // 2 for group in groups}
    removed = {group.name: tuple(range(group.units // 2, group.units)) for group in groups}
    slim = restore_layer_norms(prune(twin, groups, Plan(removed, "", "", 0.0, 0.0, 0.0))).model
    assert macs_meter(twin, groups, IMAGE[:1])(widths) == count_macs(slim, IMAGE[:1])
    assert params_meter(twin, groups)(widths) == count_params(slim)


def test_a_width_is_aligned_with_the_dimension_that_the_mean_takes() -> None:
    group = Group("stream", "direction", 95, ())
    widths = {align_width(group, width, Limits(round_to=8)) for width in range(96)}
    assert {width + 1 for width in widths} == {16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96}


def test_what_cannot_be_rotated_stays_and_says_why() -> None:
    post_norm = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    )
    model = nn.Sequential(nn.Linear(8, 16), post_norm, nn.Linear(16, 3)).eval()
    example = torch.randn(1, 4, 8)
    assert trace_streams(model, example) == []
    convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=3).eval()
    example = torch.randn(1, 3, 32, 32)
    assert make_rotatable(convnext, example) is convnext
    reasons = {layer.name: layer.reason for layer in find_groups(convnext, example, ("head.fc",), prove=False).fixed}
    assert "depthwise convolution" in reasons["stem.0"]


def test_the_best_directions_lose_less_than_any_others() -> None:
    draw = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 12, 12, generator=draw, dtype=torch.float64)
    covariance, price = (factor @ factor.T for factor in factors)

    def lost(basis: Tensor, count: int) -> float:
        reads = covariance @ basis[:, :count]
        left = covariance - reads @ torch.linalg.solve(basis[:, :count].T @ reads, reads.T)
        return float((price * left).sum())

    best = find_directions(covariance, price)
    assert torch.allclose(best.T @ best, torch.eye(12, dtype=torch.float64))
    for count in (3, 6, 9):
        floor = torch.linalg.eigvals(covariance @ price).real.sort().values[: 12 - count].sum()
        assert lost(best, count) == pytest.approx(float(floor), rel=1e-4)
        assert lost(torch.linalg.eigh(covariance)[1].flip(1), count) > 1.01 * lost(best, count)


def test_rotating_by_relevance_changes_no_output() -> None:
    model = model_of("ViT").float()
    twin = make_rotatable(model, IMAGE[:1])
    before = copy.deepcopy(twin.state_dict())
    rotate_streams_(twin, groups_of(twin).groups, [(IMAGE, torch.zeros(2, dtype=torch.int64))] * 2)
    with torch.no_grad():
        assert torch.allclose(twin(IMAGE), model(IMAGE), atol=1e-4)
    assert not torch.allclose(before["head.weight"], twin.head.weight)


def test_a_stream_is_read_from_the_graph() -> None:
    (stream,) = trace_streams(model_of("DeiT-3"), IMAGE[:1].double())
    assert isinstance(stream, Stream)
    assert stream.width == 24
    assert set(stream.tables) == {"cls_token", "pos_embed"}
    assert dict(stream.scales) == {
        f"blocks.{block}.{scale}.gamma": f"blocks.{block}.{writer}"
        for block in (0, 1)
        for scale, writer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2"))
    }
    assert {norm.name: norm.readers for norm in stream.norms}["norm"] == ("head",)
