from __future__ import annotations

import copy

import pytest
import torch
from models import Subject, extreme_plan, kept_counts, plan_of, random_plan, snapshot
from models import subject as subject_named
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from pxcompress.clock import Clock
from pxcompress.cost.count import (
    count_macs,
    count_params,
    list_uncounted,
    macs_by_module,
    macs_meter,
    params_by_module,
    params_meter,
)
from pxcompress.graph import prune
from pxcompress.notes import silent
from pxcompress.preparation import prepare
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.types import Plan


@pytest.mark.parametrize("plan", ["seed3", "seed4", "all_but_one"])
def test_predicted_costs_are_those_of_the_pruned_model(subject: Subject, plan: str) -> None:
    groups = subject.groups
    chosen: Plan = extreme_plan(groups) if plan == "all_but_one" else random_plan(groups, int(plan[-1]))
    slim = prune(subject.model, groups, chosen).model
    widths = kept_counts(groups, chosen)
    assert macs_meter(subject.model, groups, subject.example)(widths) == count_macs(slim, subject.example)
    assert params_meter(subject.model, groups)(widths) == sum(parameter.numel() for parameter in slim.parameters())


def test_the_dense_cost_is_that_of_the_dense_model(subject: Subject) -> None:
    macs, params = (
        macs_meter(subject.model, subject.groups, subject.example),
        params_meter(subject.model, subject.groups),
    )
    whole = {group.name: group.units for group in subject.groups}
    assert macs({}) == macs(whole) == count_macs(subject.model, subject.example)
    assert params({}) == params(whole) == count_params(subject.model)


def test_every_unit_has_a_price(small: Subject) -> None:
    macs, params = macs_meter(small.model, small.groups, small.example), params_meter(small.model, small.groups)
    for group in small.groups:
        for meter in (macs, params):
            costs = [meter({group.name: width}) for width in range(1, group.units + 1)]
            assert costs == sorted(costs)
            assert len(set(costs)) == len(costs), f"a unit of {group.name} is free"


def test_meters_do_not_look_at_the_model_again() -> None:
    """A meter is a pure function: what happens to the model later does not change its answers."""
    subject = subject_named("resnet_basic")
    model = copy.deepcopy(subject.model)
    macs, params = macs_meter(model, subject.groups, subject.example), params_meter(model, subject.groups)
    widths = kept_counts(subject.groups, random_plan(subject.groups, 0))
    before = macs(widths), params(widths)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(torch.zeros(1, 1, 1, 1))
    assert (macs(widths), params(widths)) == before


def test_costs_by_module_add_up(subject: Subject) -> None:
    by_module = macs_by_module(subject.model, subject.example)
    assert sum(by_module.values()) == count_macs(subject.model, subject.example)
    assert all(macs > 0 for macs in by_module.values())
    assert set(by_module) <= {name for name, _ in subject.model.named_modules()}
    params = params_by_module(subject.model)
    assert sum(sum(each.values()) for each in params.values()) == count_params(subject.model)


def test_counting_leaves_the_model_as_it_was(small: Subject) -> None:
    model = copy.deepcopy(small.model).train()
    before = snapshot(model)
    count_macs(model, small.example)
    macs_meter(model, small.groups, small.example)({})
    params_meter(model, small.groups)({})
    assert snapshot(model) == before


def test_macs_are_those_of_one_sample(small: Subject) -> None:
    assert count_macs(small.model, small.inputs) == count_macs(small.model, small.example)


# --- hand arithmetic ---


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(7, 5), (1, 7), 7 * 5),
        (nn.Linear(7, 5, bias=False), (1, 3, 7), 3 * 7 * 5),
        (nn.Conv1d(4, 6, 5), (1, 4, 12), 8 * 6 * 4 * 5),
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 12), 10 * 12 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, stride=2), (1, 3, 11, 11), 5 * 5 * 8 * 3 * 9),
        (nn.Conv2d(8, 12, 3, groups=4), (1, 8, 5, 5), 3 * 3 * 12 * 2 * 9),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (1, 8, 5, 5), 5 * 5 * 8 * 9),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 27 * 3 * 2 * 8),
        (nn.BatchNorm2d(4), (1, 4, 3, 3), 0),
        (nn.ReLU(), (1, 4), 0),
    ],
)
def test_layers_by_hand(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count_macs(layer, torch.randn(shape)) == macs
    assert count_macs(nn.Sequential(nn.Identity(), layer), torch.randn(shape)) == macs


def _gates(kind: str) -> int:
    return {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_by_hand(kind: str) -> None:
    """Every gate reads the input and the last state at each of 7 steps; the second layer reads both directions."""
    layer, gates = getattr(nn, kind), _gates(kind)
    assert count_macs(layer(5, 6, batch_first=True), torch.randn(1, 7, 5)) == 7 * gates * 6 * (5 + 6)
    deep = layer(5, 6, 2, batch_first=True, bidirectional=True)
    assert count_macs(deep, torch.randn(1, 7, 5)) == 7 * 2 * gates * 6 * ((5 + 6) + (12 + 6))
    cell = getattr(nn, f"{kind}Cell")(5, 6)
    assert count_macs(cell, torch.randn(1, 5)) == gates * 6 * (5 + 6)


class _Products(nn.Module):
    """What PyTorch's counter knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(5, 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        row = self.bilinear(x, x[:, :1].expand(-1, 6))
        distances = torch.cdist(x[:, None], x[:, None].expand(-1, 3, -1))
        matrix = torch.ones(8, 5, device=x.device)
        return row.sum() + distances.sum() + (matrix @ x[0]).sum() + torch.dot(x[0], x[0])


def test_products_by_hand() -> None:
    assert macs_by_module(_Products(), torch.randn(1, 5)) == {"bilinear": 4 * 5 * 6, "": 3 * 5 + 8 * 5 + 5}


def test_a_deformable_convolution_by_hand() -> None:
    ops = pytest.importorskip("torchvision.ops")
    layer = ops.DeformConv2d(4, 6, 3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x.new_zeros(len(x), 18, 8, 8))

    assert macs_by_module(Net(), torch.randn(1, 4, 10, 10)) == {"layer": 8 * 8 * 6 * 4 * 9}
    assert list_uncounted(Net(), torch.randn(1, 4, 10, 10)) == {}


class _Fourier(nn.Module):
    """A layer of a kind that nothing counts, twice."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(x).abs()


def test_what_nothing_counts_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), _Fourier(), nn.ReLU(), nn.Sequential(_Fourier()))
    assert list_uncounted(model, torch.randn(1, 3, 8, 8)) == {"_fft_r2c": ("1", "3.0")}
    assert set(macs_by_module(model, torch.randn(1, 3, 8, 8))) == {"0"}


def test_a_norm_is_known_to_multiply_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), GlobalResponseNorm(4, channels_last=False))
    assert list_uncounted(model, torch.randn(1, 3, 8, 8)) == {}
    assert set(macs_by_module(model, torch.randn(1, 3, 8, 8))) == {"0"}


def test_everything_is_counted(subject: Subject) -> None:
    assert list_uncounted(subject.model, subject.example) == {}


def test_a_run_says_what_its_price_leaves_out() -> None:
    inputs = torch.randn(6, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), _Fourier(), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(144, 5)).eval()
    clock = Clock(silent)
    prepare(model, inputs[:1], Run(Recipe("mine", 0.1, round_to=1), {}, clock))
    assert clock.notes == ["_fft_r2c, in 1, counts as 0 MACs: nothing is known of what it multiplies"]


def test_attention_by_hand() -> None:
    """dim 24, 4 heads of 6, 17 tokens: q k^T and a v are 4 * 17 * 17 * 6 each, a block's own; fc1 is 96 wide."""
    subject = subject_named("vit")
    tokens, dim, hidden = 17, 24, 96
    scores = 2 * 4 * tokens * tokens * 6
    block = {"attn": scores, "attn.qkv": tokens * dim * 3 * dim, "attn.proj": tokens * dim * dim}
    block |= {"mlp.fc1": tokens * dim * hidden, "mlp.fc2": tokens * hidden * dim}
    expected = {f"blocks.{place}.{name}": macs for place in (0, 1) for name, macs in block.items()}
    expected |= {"patch_embed.proj": 16 * 24 * 3 * 64, "head": 24 * 5}
    assert macs_by_module(subject.model, subject.example) == expected


def test_removing_a_head_by_hand() -> None:
    subject = subject_named("vit")
    meter = macs_meter(subject.model, subject.groups, subject.example)
    one_head = 2 * 17 * 17 * 6 + 17 * 24 * 3 * 6 + 17 * 6 * 24
    assert meter({}) - meter({"blocks.0.attn": 3}) == one_head
    params = params_meter(subject.model, subject.groups)
    assert params({}) - params({"blocks.0.attn": 3}) == 24 * 3 * 6 + 3 * 6 + 6 * 24


def test_attention_of_pytorch_counts_on_its_fast_path() -> None:
    """In eval mode PyTorch runs the whole layer as one operator, which its own counter takes for nothing."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    tokens, width, hidden = 5, 8, 12
    products = 2 * tokens * tokens * width
    assert count_macs(layer, torch.randn(1, tokens, width)) == tokens * width * (4 * width + 2 * hidden) + products


def test_fused_and_unfused_attention_cost_the_same() -> None:
    subject = subject_named("vit")
    model = copy.deepcopy(subject.model)
    for block in model.blocks:
        block.attn.fused_attn = not block.attn.fused_attn
    assert macs_by_module(model, subject.example) == macs_by_module(subject.model, subject.example)


def test_removing_a_channel_by_hand() -> None:
    """conv2 of the flatten net: 6 channels from 8, 3 x 3 taps, 15 x 15 outputs; each feeds nine inputs of fc1."""
    subject = subject_named("flatten_cnn")
    macs = macs_meter(subject.model, subject.groups, subject.example)
    params = params_meter(subject.model, subject.groups)
    assert macs({}) - macs({"conv2": 5}) == 8 * 9 * 225 + 9 * 10
    assert params({}) - params({"conv2": 5}) == 8 * 9 + 1 + 9 * 10
    # Both ends of one layer at once: what is left is the product of what stays.
    assert macs({"conv1": 4, "conv2": 3}) == 32 * 32 * 4 * 27 + 225 * 3 * 4 * 9 + 27 * 10 + 10 * 5


class _Twice(nn.Module):
    """A layer used twice, and a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)) @ torch.ones(4, 3)


def test_a_layer_used_twice_costs_twice_and_is_stored_once() -> None:
    model = _Twice()
    assert macs_by_module(model, torch.randn(1, 4)) == {"layer": 32, "": 12}
    assert count_params(model) == 16


def test_a_shared_parameter_counts_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    assert count_params(model) == 16 + 4 + 4
    assert sum(sum(each.values()) for each in params_by_module(model).values()) == 24


def test_plans_of_other_groups_do_not_matter() -> None:
    subject = subject_named("resnet_basic")
    plan = plan_of({})
    assert macs_meter(subject.model, subject.groups, subject.example)(kept_counts(subject.groups, plan)) == count_macs(
        subject.model, subject.example
    )
