"""Removal equals masking, leaves the dense model as it was, and layers know their new sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import (
    CLASSES,
    CLASSIFIERS,
    Subject,
    count_rows,
    extreme_plan,
    plan_of,
    random_plan,
    randomised,
    silenced,
    snapshot,
)
from models import subject as subject_named
from odd_models import ODD, PartialGate
from timm.layers import SelectiveKernel
from torch import Tensor, nn

from pxcompress.cost.count import count_params
from pxcompress.errors import ModelError
from pxcompress.graph import REMOVAL_TOLERANCE, find_groups, is_depthwise, mask_units, prune, removal_error
from pxcompress.state import seeded
from pxcompress.types import Group, Plan, Pruned

PLANS: dict[str, Callable[[tuple[Group, ...]], Plan]] = {
    "seed0": lambda groups: random_plan(groups, 0),
    "seed1": lambda groups: random_plan(groups, 1),
    "all_but_one": extreme_plan,
}


def _assert_removal_is_exact(pruned: Pruned, inputs: Tensor) -> None:
    with torch.no_grad():
        slim, dense = pruned.model(inputs), pruned.dense(inputs)
    expected = silenced(pruned.dense, pruned.groups, pruned.plan, inputs)
    scale = expected.abs().max()
    assert float((slim - expected).abs().max() / scale) < 1e-4
    assert removal_error(pruned, inputs) < 1e-4
    assert float((slim - dense).abs().max() / dense.abs().max()) > 1e-2, "the plan removed nothing that matters"


@pytest.mark.parametrize("plan", PLANS)
def test_removal_equals_masking(subject: Subject, plan: str) -> None:
    chosen = PLANS[plan](subject.groups)
    pruned = prune(subject.model, subject.groups, chosen)
    assert count_params(pruned.model) < count_params(subject.model)
    _assert_removal_is_exact(pruned, subject.inputs)
    with torch.no_grad():
        assert pruned.model(subject.inputs).shape == (len(subject.inputs), CLASSES)


def test_every_group_can_be_pruned_alone(small: Subject) -> None:
    for group in small.groups:
        plan = plan_of({group.name: [0]})
        pruned = prune(small.model, [group], plan)
        assert removal_error(pruned, small.inputs) < 1e-4
        for member in group.members:
            before = count_rows(small.model.get_submodule(member.module), member.axis)
            after = count_rows(pruned.model.get_submodule(member.module), member.axis)
            assert before - after == member.index.shape[1], (group.name, member.module, member.axis)


def test_masking_changes_consumers_only(small: Subject) -> None:
    plan = random_plan(small.groups, 3)
    twin = mask_units(small.model, small.groups, plan)
    consumers = {member.module for group in small.groups for member in group.consumers}
    for name, value in twin.state_dict().items():
        module, _, parameter = name.rpartition(".")
        if module not in consumers or parameter != "weight":
            assert torch.equal(value, small.model.state_dict()[name]), name


def test_an_empty_plan_changes_nothing(small: Subject) -> None:
    pruned = prune(small.model, small.groups, plan_of({}))
    for name, value in pruned.model.state_dict().items():
        assert torch.equal(value, small.model.state_dict()[name]), name


def test_kept_rows_are_those_of_the_dense_model(small: Subject) -> None:
    """Surgery selects weights; it does not change them."""
    plan = random_plan(small.groups, 4)
    pruned = prune(small.model, small.groups, plan)
    for group in small.groups:
        units = plan.kept(group)
        for member in group.members:
            dense, slim = (model.get_submodule(member.module) for model in (small.model, pruned.model))
            owners = sum(other.module == member.module for one in small.groups for other in one.members)
            if member.axis == "out" and owners == 1:
                assert torch.equal(slim.weight, dense.weight[member.rows(units)])


# --- the dense model ---


def test_nothing_touches_the_dense_model(subject: Subject) -> None:
    model = copy.deepcopy(subject.model)
    model.train()
    next(iter(model.children())).eval()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    structure = find_groups(model, subject.example, CLASSIFIERS[subject.name])
    pruned = prune(model, structure.groups, random_plan(structure.groups, 2))
    mask_units(model, structure.groups, pruned.plan)
    assert snapshot(model) == before
    assert pruned.dense is model


def test_the_slim_model_inherits_modes_and_gradients(small: Subject) -> None:
    model = copy.deepcopy(small.model).train()
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    next(iter(model.children())).eval()
    slim = prune(model, small.groups, random_plan(small.groups, 2)).model
    assert [module.training for module in slim.modules()] == [module.training for module in model.modules()]
    assert [p.requires_grad for p in slim.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(parameter.grad is None for parameter in slim.parameters())
    assert not {id(p) for p in slim.parameters()} & {id(p) for p in model.parameters()}
    assert not {p.data_ptr() for p in slim.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert [name for name, _ in slim.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_the_slim_model_carries_no_hooks(small: Subject) -> None:
    slim = prune(small.model, small.groups, random_plan(small.groups, 2)).model
    for module in slim.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


# --- attributes that the layers themselves read ---


def test_layers_know_their_new_sizes(subject: Subject) -> None:
    slim = prune(subject.model, subject.groups, random_plan(subject.groups, 5)).model
    for name, module in slim.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups), name
            assert module.bias is None or module.bias.shape == (module.out_channels,), name
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features), name
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean.shape == module.weight.shape == (module.num_features,), name


def test_grouped_convolutions_are_pruned_and_stay_regular() -> None:
    subject = subject_named("resnext")
    slim = prune(subject.model, subject.groups, extreme_plan(subject.groups)).model
    grouped = 0
    for name, module in subject.model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module):
            after = slim.get_submodule(name)
            assert after.groups == module.groups
            assert after.in_channels == after.groups < module.in_channels
            assert after.out_channels == after.groups < module.out_channels
            grouped += 1
    assert grouped == 4


def test_depthwise_convolutions_stay_depthwise() -> None:
    subject = subject_named("mobilenetv2")
    slim = prune(subject.model, subject.groups, random_plan(subject.groups, 1)).model
    seen = 0
    for name, module in subject.model.named_modules():
        if is_depthwise(module):
            after = slim.get_submodule(name)
            assert after.groups == after.in_channels == after.out_channels
            seen += after.groups < module.groups
    assert seen >= 10


def test_heads_leave_whole_and_attention_knows() -> None:
    subject = subject_named("vit")
    dense = subject.model.blocks[0].attn
    slim = prune(subject.model, subject.groups, plan_of({"blocks.0.attn": (0, 2)})).model
    attention = slim.blocks[0].attn
    assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (2, 6, 12)
    assert attention.scale == dense.scale
    rows = torch.cat([torch.arange(start, start + 6) for start in (6, 18, 30, 42, 54, 66)])
    assert torch.equal(attention.qkv.weight, dense.qkv.weight[rows])
    assert torch.equal(attention.proj.weight, dense.proj.weight[:, rows[:12]])
    assert slim.blocks[1].attn.num_heads == 4


@pytest.mark.parametrize("fused", [True, False])
def test_pruned_attention_is_the_same_fused_and_unfused(fused: bool) -> None:
    subject = subject_named("vit")
    model = copy.deepcopy(subject.model)
    for block in model.blocks:
        block.attn.fused_attn = fused
    pruned = prune(model, subject.groups, random_plan(subject.groups, 7))
    assert removal_error(pruned, subject.inputs) < 1e-4


def test_removal_error_notices_a_wrong_surgery() -> None:
    subject = subject_named("resnet_basic")
    pruned = prune(subject.model, subject.groups, random_plan(subject.groups, 0))
    with torch.no_grad():
        pruned.model.fc.weight[:, 0] += 0.1
    assert removal_error(pruned, subject.inputs) > 1e-3


class Amplifier(nn.Module):
    """A network whose outputs show the rounding of float32 ten thousand times larger."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(32, 64), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return (1e4 * self.head(self.body(x.float()).relu())).sin()


def test_rounding_is_no_wrong_surgery() -> None:
    with seeded(0):
        model, inputs = Amplifier().eval(), torch.randn(16, 32)
    structure = find_groups(model, inputs[:1], ("head",))
    pruned = prune(model, structure.groups, plan_of({"body": range(0, 64, 2)}))
    with torch.no_grad():
        slim, reference = pruned.model(inputs), mask_units(model, structure.groups, pruned.plan)(inputs)
    assert float((slim - reference).abs().max()) > REMOVAL_TOLERANCE
    assert removal_error(pruned, inputs) < 1e-9
    with torch.no_grad():
        pruned.model.head.weight[:, 0] += 1e-6
    assert removal_error(pruned, inputs) > REMOVAL_TOLERANCE


def test_float64_reaches_recurrent_layers_and_buffers() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("offset", torch.randn(8))
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.net = Amplifier()

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(len(x), 4, 8)
            state[:] = self.lstm(x.unflatten(1, (4, 8)) + self.offset)[0]
            return self.net(state.flatten(1).to(self.offset.dtype))

    with seeded(0):
        model, inputs = Recurrent().eval(), torch.randn(16, 32)
    groups = find_groups(model, inputs[:1], ("net.head",)).groups
    assert [group.name for group in groups] == ["net.body"]
    assert removal_error(prune(model, groups, random_plan(groups, 0)), inputs) < 1e-9


# --- what cannot be handled ---


@pytest.mark.parametrize("name", ODD)
def test_what_is_offered_can_be_removed(name: str) -> None:
    """Whatever `find_groups` lists is removable exactly; the rest is fixed with a reason, or the model refused."""
    build, shape = ODD[name]
    with seeded(2):
        model, inputs = randomised(build()).eval(), torch.randn(4, *shape)
    try:
        structure = find_groups(model, inputs[:1])
    except ModelError:
        return
    for seed in range(2):
        plan = random_plan(structure.groups, seed)
        pruned = prune(model, structure.groups, plan)
        with torch.no_grad():
            slim = pruned.model(inputs)
        expected = silenced(model, structure.groups, plan, inputs)
        assert float((slim - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("paths", [2, 3])
def test_a_channel_of_selective_kernels_is_in_every_path(paths: int) -> None:
    with seeded(0):
        kernels = SelectiveKernel(4, 6, [3, 5, 7][:paths], rd_channels=3, split_input=False)
        model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), kernels, nn.Conv2d(6, CLASSES, 9))).eval()
        inputs = torch.randn(3, 3, 11, 11)
    groups = find_groups(model, inputs[:1]).groups
    rows = {m.module: m.index.tolist() for group in groups if group.units == 6 for m in group.members}
    assert rows["1.attn.fc_select"] == [[channel + 6 * path for path in range(paths)] for channel in range(6)]
    alone = [f"1.paths.{path}.{layer}" for path in range(paths) for layer in ("conv", "bn")]
    for name in (*alone, "1.attn.fc_reduce", "2"):
        assert rows[name] == [[channel] for channel in range(6)]
    for seed in range(2):
        assert removal_error(prune(model, groups, random_plan(groups, seed)), inputs) < 1e-5


def test_sizes_of_a_split_follow_in_every_round() -> None:
    with seeded(0):
        model, inputs = PartialGate().eval(), torch.randn(2, 3, 12, 12)
    for sizes, removed in (((5, 3, 2), {"fc1": (1,)}), ((3, 2, 1), {"fc1": (0,), "conv": (1,)})):
        groups = find_groups(model, inputs[:1]).groups
        pruned = prune(model, groups, plan_of(removed))
        assert pruned.model.sizes == sizes
        assert sum(model.sizes) == len(model.fc1.weight), "the dense model keeps its own sizes"
        assert removal_error(pruned, inputs) < 1e-6
        model = pruned.model
