"""Clean-up is free of loss, and goes on until no unit is dead."""

from __future__ import annotations

import pytest
import torch
from models import FlattenCNN, Subject, plan_of
from models import subject as subject_named
from torch import nn

from pxcompress.graph import find_groups, prune
from pxcompress.layout.rows import complement
from pxcompress.planning.dead_paths import remove_dead_paths
from pxcompress.planning.limits import Limits
from pxcompress.state import seeded
from pxcompress.types import Group, Pruned

FREE = Limits("none", 1, 0.0)


def _cleaned(model: nn.Module, groups: tuple[Group, ...], example: torch.Tensor, limits: Limits = FREE) -> Pruned:
    bare = prune(model, groups, plan_of({group.name: () for group in groups}))

    def meter(widths: object) -> float:
        return float(sum(widths.values()))  # type: ignore[attr-defined]

    return remove_dead_paths(bare, example, meter, limits)


def _silenced(subject: Subject, seed: int) -> tuple[nn.Module, dict[str, set[int]]]:
    """A copy in which about a third of each group's units is read by nobody."""
    silent = {}
    model = prune(subject.model, subject.groups, plan_of({})).model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in subject.groups:
            units = torch.randperm(group.units, generator=generator)[: group.units // 3].tolist()
            silent[group.name] = set(units)
            for member in group.consumers:
                module = model.get_submodule(member.module)
                groups = getattr(module, "groups", 1)
                weight = module.weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # type: ignore[operator]
                weight[member.rows(units)] = 0
                module.weight.copy_(weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1))  # type: ignore[operator]
    return model, silent


def test_units_that_nobody_reads_go_and_outputs_stay(subject: Subject) -> None:
    model, silent = _silenced(subject, 3)
    cleaned = _cleaned(model, subject.groups, subject.example)
    for group in subject.groups:
        assert silent[group.name] <= set(cleaned.plan.removed[group.name])
    assert cleaned.plan.cost_planned == sum(len(cleaned.plan.kept(group)) for group in subject.groups)
    with torch.no_grad():
        torch.testing.assert_close(cleaned.model(subject.inputs), model(subject.inputs), rtol=1e-4, atol=1e-4)


def test_a_live_model_stays_as_it_is(small: Subject) -> None:
    cleaned = _cleaned(small.model, small.groups, small.example)
    assert not any(cleaned.plan.removed.values())


def test_constants_go_into_the_next_bias_and_paths_fall_one_after_the_other() -> None:
    with seeded(1):
        model = FlattenCNN().eval()
        inputs = torch.randn(8, 3, 12, 12)
    with torch.no_grad():
        model.conv1.weight[5] = 0  # constant, positive after BatchNorm and ReLU
        model.conv1.bias[5] = 2.0
        model.fc2.weight[:, 3] = 0  # nobody reads neuron 3, which alone reads channel 4 of conv2
        alone = complement(10, torch.tensor([3]))
        model.fc1.weight[alone[:, None], torch.arange(36, 45)[None]] = 0
    before = model(inputs)
    groups = find_groups(model, inputs[:1], ["fc2"]).groups
    cleaned = _cleaned(model, groups, inputs[:1])
    assert cleaned.plan.removed == {"conv1": (5,), "conv2": (4,), "fc1": (3,)}
    torch.testing.assert_close(cleaned.model(inputs), before)


def test_a_constant_in_front_of_zero_padding_stays() -> None:
    """Beyond the border it would be zero, not the constant."""
    with seeded(1):
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(45, 2)
        ).eval()
        inputs = torch.randn(8, 3, 5, 5)
    with torch.no_grad():
        model[0].weight[1:3] = 0
        model[0].bias[1], model[0].bias[2] = 2.0, -2.0  # a constant, and zero after the ReLU
    cleaned = _cleaned(model, find_groups(model, inputs[:1], ["5"]).groups, inputs[:1])
    assert cleaned.plan.removed["0"] == (2,)


@pytest.mark.parametrize(("round_to", "width"), [(1, 3), (2, 4), (4, 4), (8, 3)])
def test_widths_stay_aligned(round_to: int, width: int) -> None:
    """Groups with fewer than two steps are not aligned."""
    subject = subject_named("flatten_cnn")
    model = prune(subject.model, subject.groups, plan_of({})).model
    with torch.no_grad():
        model.get_submodule("conv2").weight[:, :5] = 0  # type: ignore[operator,index]
    cleaned = _cleaned(model, subject.groups, subject.example, Limits("none", round_to, 0.0))
    group = next(group for group in subject.groups if group.name == "conv1")
    assert len(cleaned.plan.kept(group)) == width


def test_one_unit_stays_where_all_are_dead() -> None:
    subject = subject_named("flatten_cnn")
    model = prune(subject.model, subject.groups, plan_of({})).model
    with torch.no_grad():
        model.get_submodule("conv2").weight.zero_()  # type: ignore[operator]
    cleaned = _cleaned(model, subject.groups, subject.example)
    assert len(cleaned.plan.removed["conv1"]) == 7
    torch.testing.assert_close(cleaned.model(subject.inputs), model(subject.inputs))
