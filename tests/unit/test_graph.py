from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import (
    CLASSES,
    CLASSIFIERS,
    FAMILIES,
    GroupedNet,
    Subject,
    conv_like,
    extreme_plan,
    plan_of,
    random_plan,
    randomised,
    snapshot,
)
from models import subject as subject_named
from odd_models import ODD, PartialGate, Raises, Uncopyable
from timm.layers import SelectiveKernel
from torch import Tensor, nn

from pxcompress.cost.count import count_params
from pxcompress.errors import ModelError
from pxcompress.graph import REMOVAL_TOLERANCE, find_groups, is_depthwise, mask_units, prune, removal_error
from pxcompress.state import seeded
from pxcompress.types import Group, Plan, Pruned, Structure

PLANS: dict[str, Callable[[tuple[Group, ...]], Plan]] = {
    "seed0": lambda groups: random_plan(groups, 0),
    "seed1": lambda groups: random_plan(groups, 1),
    "all_but_one": extreme_plan,
}


def _silenced(model: nn.Module, groups: tuple[Group, ...], plan: Plan, inputs: Tensor) -> Tensor:
    """Outputs of `model` while hooks zero the removed units where they are read: an oracle that touches no weight."""
    twin = copy.deepcopy(model)
    for group in groups:
        removed = plan.removed.get(group.name, ())
        for member in group.consumers if removed else ():
            module = twin.get_submodule(member.module)
            rows = member.index[list(removed)].flatten()

            def zero(layer: nn.Module, args: tuple[Tensor, ...], rows: Tensor = rows) -> tuple[Tensor]:
                value = args[0].clone()
                if isinstance(layer, nn.Linear):
                    value[..., rows] = 0
                else:
                    value[:, rows] = 0
                return (value,)

            module.register_forward_pre_hook(zero)
    with torch.no_grad():
        return twin(inputs)


def _assert_removal_is_exact(pruned: Pruned, inputs: Tensor) -> None:
    with torch.no_grad():
        slim, dense = pruned.model(inputs), pruned.dense(inputs)
    expected = _silenced(pruned.dense, pruned.groups, pruned.plan, inputs)
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
            before = _rows(small.model.get_submodule(member.module), member.axis)
            after = _rows(pruned.model.get_submodule(member.module), member.axis)
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
        kept = plan.kept(group)
        for member in group.members:
            dense, slim = (model.get_submodule(member.module) for model in (small.model, pruned.model))
            owners = sum(other.module == member.module for one in small.groups for other in one.members)
            if member.axis == "out" and owners == 1:
                assert torch.equal(slim.weight, dense.weight[member.rows(kept)])


def _rows(module: nn.Module, axis: str) -> int:
    return module.weight.shape[0] if axis == "out" else module.weight.shape[1] * getattr(module, "groups", 1)


# --- what find_groups says ---


def test_units_own_equal_and_disjoint_rows(subject: Subject) -> None:
    owned: dict[tuple[str, str], list[int]] = {}
    for group in subject.groups:
        assert group.units >= 1
        assert group.members
        assert group.consumers, f"{group.name} is read by nobody"
        for member in group.members:
            assert member.index.shape[0] == group.units
            assert member.index.dtype == torch.int64
            owned.setdefault((member.module, member.axis), []).extend(member.index.flatten().tolist())
    for (module, axis), rows in owned.items():
        assert len(rows) == len(set(rows)), f"{module} {axis}: two units own the same row"
        assert min(rows) >= 0
        assert max(rows) < _rows(subject.model.get_submodule(module), axis)


def test_a_layer_produces_for_groups_wholly_or_not_at_all(subject: Subject) -> None:
    for name, module in conv_like(subject.model):
        rows = [
            member.index.numel()
            for group in subject.groups
            for member in group.members
            if (member.module, member.axis) == (name, "out")
        ]
        assert sum(rows) in (0, _rows(module, "out")), name


def test_every_layer_is_in_a_group_or_accounted_for(subject: Subject) -> None:
    """Outputs that no group owns are those of a layer named as fixed."""
    owned = {member.module for group in subject.groups for member in group.members if member.axis == "out"}
    fixed = {layer.name for layer in subject.structure.fixed}
    loose = [name for name, _ in conv_like(subject.model) if name not in owned | fixed]
    assert not loose


def test_names_are_unique_and_roots_exist(subject: Subject) -> None:
    names = [group.name for group in subject.groups] + [layer.name for layer in subject.structure.fixed]
    assert len(names) == len(set(names))
    modules = dict(subject.model.named_modules())
    assert set(names) <= set(modules)
    for group in subject.groups:
        assert group.members[0].module == (f"{group.name}.proj" if group.kind == "head" else group.name)


def test_fixed_layers_say_why(subject: Subject) -> None:
    for layer in subject.structure.fixed:
        assert layer.reason.strip()
        assert "\n" not in layer.reason
        assert layer.units == subject.model.get_submodule(layer.name).weight.shape[0]


def test_the_classifier_stays(subject: Subject) -> None:
    reasons = {layer.name: layer.reason for layer in subject.structure.fixed}
    assert "classes" in reasons[CLASSIFIERS[subject.name][0]]
    assert not any(
        member.module in CLASSIFIERS[subject.name] and member.axis == "out"
        for group in subject.groups
        for member in group.members
    )


def test_the_classifier_stays_even_when_nobody_names_it(small: Subject) -> None:
    """Its outputs are the model's outputs: torch-pruning would cut a classifier called fc."""
    structure = find_groups(small.model, small.example)
    pruned = prune(small.model, structure.groups, extreme_plan(structure.groups))
    with torch.no_grad():
        assert pruned.model(small.inputs).shape[1] == CLASSES


def test_groups_come_in_the_order_of_the_model(subject: Subject) -> None:
    order = {name: place for place, (name, _) in enumerate(subject.model.named_modules())}
    places = [order[group.name] for group in subject.groups]
    assert places == sorted(places)


def test_finding_is_deterministic(small: Subject) -> None:
    assert _described(find_groups(small.model, small.example, CLASSIFIERS[small.name])) == _described(small.structure)


def test_finding_does_not_depend_on_the_example_values_or_modes(small: Subject) -> None:
    model = copy.deepcopy(small.model).train().requires_grad_(False)
    structure = find_groups(model, torch.zeros_like(small.example), CLASSIFIERS[small.name])
    assert _described(structure) == _described(small.structure)


def test_finding_and_pruning_work_without_gradients(small: Subject) -> None:
    with torch.no_grad():
        structure = find_groups(small.model, small.example, CLASSIFIERS[small.name])
        pruned = prune(small.model, structure.groups, random_plan(structure.groups, 0))
        assert not torch.is_grad_enabled()
    assert _described(structure) == _described(small.structure)
    assert removal_error(pruned, small.inputs) < 1e-4


def _described(structure: Structure) -> list[object]:
    groups = [
        (
            group.name,
            group.kind,
            group.units,
            [(member.module, member.axis, member.index.tolist()) for member in group.members],
        )
        for group in structure.groups
    ]
    return [*groups, *((layer.name, layer.units, layer.reason) for layer in structure.fixed)]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("resnet_basic", {"channel"}),
        ("vit", {"head", "neuron"}),
        ("flatten_cnn", {"channel", "neuron"}),
        ("conv1d", {"channel"}),
    ],
)
def test_kinds(name: str, kinds: set[str]) -> None:
    assert {group.kind for group in subject_named(name).groups} == kinds


def test_flattened_channels_own_all_their_positions() -> None:
    group = next(group for group in subject_named("flatten_cnn").groups if group.name == "conv2")
    reader = next(member for member in group.consumers if member.module == "fc1")
    assert torch.equal(reader.index, torch.arange(54).reshape(6, 9))


def test_residual_streams_are_one_group() -> None:
    groups = {group.name: group for group in subject_named("conv1d").groups}
    assert set(groups) == {"stem", "inner"}
    members = {(member.module, member.axis) for member in groups["stem"].members}
    assert members == {("stem", "out"), ("bn", "out"), ("inner", "in"), ("outer", "out"), ("head", "in")}


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


def test_is_depthwise() -> None:
    assert is_depthwise(nn.Conv2d(4, 4, 3, groups=4))
    assert is_depthwise(nn.Conv1d(4, 4, 3, groups=4))
    assert is_depthwise(nn.Conv2d(4, 8, 3, groups=4))
    assert not is_depthwise(nn.Conv2d(8, 4, 3, groups=4))
    assert not is_depthwise(nn.Conv2d(4, 4, 3, groups=2))
    assert not is_depthwise(nn.Conv2d(1, 1, 3))
    assert not is_depthwise(nn.Linear(4, 4))


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


def test_two_models_do_not_share_state() -> None:
    """torch-pruning's pruners leak settings of earlier models into later ones through mutable defaults."""
    first, second = subject_named("resnet_basic"), subject_named("vit")
    alone = _described(find_groups(second.model, second.example, CLASSIFIERS["vit"]))
    find_groups(first.model, first.example, CLASSIFIERS["resnet_basic"])
    prune(first.model, first.groups, extreme_plan(first.groups))
    assert _described(find_groups(second.model, second.example, CLASSIFIERS["vit"])) == alone


# --- what cannot be handled ---


@pytest.mark.parametrize("broken", [Raises, Uncopyable])
def test_a_model_that_cannot_be_traced_is_one_line(broken: type[nn.Module]) -> None:
    with pytest.raises(ModelError) as caught:
        find_groups(broken(), torch.randn(1, 4), ())
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) > len("model cannot be traced")


def test_a_wrong_input_shape_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="does not run on the example: RuntimeError: Given groups=1"):
        find_groups(FAMILIES["grouped"](), torch.randn(1, 7, 32, 32), ())


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
        expected = _silenced(model, structure.groups, plan, inputs)
        assert float((slim - expected).abs().max() / expected.abs().max()) < 1e-4


def test_units_that_own_different_layers_are_groups_of_their_own() -> None:
    with seeded(0):
        model, inputs = PartialGate().eval(), torch.randn(2, 3, 12, 12)
    groups = {group.name: group for group in find_groups(model, inputs[:1]).groups}
    rows = {
        name: {(m.module, m.axis): m.index.tolist() for m in group.members if m.module != "sizes"}
        for name, group in groups.items()
    }
    assert rows["fc1"] == {("fc1", "out"): [[0, 6], [1, 7], [2, 8], [3, 9]], ("fc2", "in"): [[0], [1], [2], [3]]}
    read = {("fc1", "out"): [[4, 10], [5, 11]], ("conv", "out"): [[0], [1]], ("fc2", "in"): [[4], [5]]}
    assert rows["conv"] == read


class HalfGate(nn.Module):
    """Cuts its channels in two halves, of which a convolution reads one: both have to lose as many."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        half = x.shape[1] // 2
        return self.head(torch.cat([torch.relu(self.part(x[:, :half])), x[:, half:]], 1).mean((2, 3)))


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


def test_groups_of_one_layer_are_tried_apart() -> None:
    with seeded(0):
        structure = find_groups(HalfGate().eval(), torch.randn(1, 3, 12, 12))
    assert not structure.groups
    assert {layer.name for layer in structure.fixed} >= {"stem", "part"}


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


def test_inner_layers_can_be_kept_by_name() -> None:
    structure = find_groups(GroupedNet(), torch.randn(1, 3, 32, 32), ("fc", "conv3"))
    assert "conv3" in {layer.name for layer in structure.fixed}
    assert "conv3" not in {group.name for group in structure.groups}
