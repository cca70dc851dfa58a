"""Which units a model has, which layers they own, and which layers stay."""

from __future__ import annotations

import copy

import pytest
import torch
from models import (
    CLASSES,
    CLASSIFIERS,
    FAMILIES,
    GroupedNet,
    Subject,
    conv_like,
    count_rows,
    extreme_plan,
    random_plan,
)
from models import subject as subject_named
from odd_models import PartialGate, Raises, Uncopyable
from torch import Tensor, nn

from pxcompress.errors import ModelError
from pxcompress.graph import find_groups, is_depthwise, prune, removal_error
from pxcompress.state import seeded
from pxcompress.types import Structure


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
        assert max(rows) < count_rows(subject.model.get_submodule(module), axis)


def test_a_layer_produces_for_groups_wholly_or_not_at_all(subject: Subject) -> None:
    for name, module in conv_like(subject.model):
        rows = [
            member.index.numel()
            for group in subject.groups
            for member in group.members
            if (member.module, member.axis) == (name, "out")
        ]
        assert sum(rows) in (0, count_rows(module, "out")), name


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
    assert describe(find_groups(small.model, small.example, CLASSIFIERS[small.name])) == describe(small.structure)


def test_finding_does_not_depend_on_the_example_values_or_modes(small: Subject) -> None:
    model = copy.deepcopy(small.model).train().requires_grad_(False)
    structure = find_groups(model, torch.zeros_like(small.example), CLASSIFIERS[small.name])
    assert describe(structure) == describe(small.structure)


def test_finding_and_pruning_work_without_gradients(small: Subject) -> None:
    with torch.no_grad():
        structure = find_groups(small.model, small.example, CLASSIFIERS[small.name])
        pruned = prune(small.model, structure.groups, random_plan(structure.groups, 0))
        assert not torch.is_grad_enabled()
    assert describe(structure) == describe(small.structure)
    assert removal_error(pruned, small.inputs) < 1e-4


def describe(structure: Structure) -> list[object]:
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


def test_is_depthwise() -> None:
    assert is_depthwise(nn.Conv2d(4, 4, 3, groups=4))
    assert is_depthwise(nn.Conv1d(4, 4, 3, groups=4))
    assert is_depthwise(nn.Conv2d(4, 8, 3, groups=4))
    assert not is_depthwise(nn.Conv2d(8, 4, 3, groups=4))
    assert not is_depthwise(nn.Conv2d(4, 4, 3, groups=2))
    assert not is_depthwise(nn.Conv2d(1, 1, 3))
    assert not is_depthwise(nn.Linear(4, 4))


def test_two_models_do_not_share_state() -> None:
    """torch-pruning's pruners leak settings of earlier models into later ones through mutable defaults."""
    first, second = subject_named("resnet_basic"), subject_named("vit")
    alone = describe(find_groups(second.model, second.example, CLASSIFIERS["vit"]))
    find_groups(first.model, first.example, CLASSIFIERS["resnet_basic"])
    prune(first.model, first.groups, extreme_plan(first.groups))
    assert describe(find_groups(second.model, second.example, CLASSIFIERS["vit"])) == alone


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


def test_groups_of_one_layer_are_tried_apart() -> None:
    with seeded(0):
        structure = find_groups(HalfGate().eval(), torch.randn(1, 3, 12, 12))
    assert not structure.groups
    assert {layer.name for layer in structure.fixed} >= {"stem", "part"}


def test_inner_layers_can_be_kept_by_name() -> None:
    structure = find_groups(GroupedNet(), torch.randn(1, 3, 32, 32), ("fc", "conv3"))
    assert "conv3" in {layer.name for layer in structure.fixed}
    assert "conv3" not in {group.name for group in structure.groups}
