"""`collect` against a slow version: one sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import CLASSES, Subject, batches_of, snapshot, without_inplace
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.passes.collect import Start, Statistic, collect
from pxcompress.state import seeded
from pxcompress.types import Group, Member

FAMILIES = (
    "conv1d",
    "grouped",
    "resnet_basic",
    "resnext",
    "densenet",
    "efficientnet",
    "vit",
    "convnext",
)


STATISTICS: dict[str, Statistic] = {
    "relevance": lambda a, m: (a * m).sum(2).abs(),
    "squared": lambda a, m: (a * m).sum(2).square(),
    "multiplier": lambda a, m: m.square().mean(2),
    "positive": lambda a, m: (a * m).clamp(min=0).sum(2),
}


STARTS: dict[str, Start] = {
    "label": lambda logits, labels: nn.functional.one_hot(labels, CLASSES).to(logits.dtype),
    "loss": lambda logits, labels: logits.softmax(1) - nn.functional.one_hot(labels, CLASSES),
    "ones": lambda logits, labels: torch.ones_like(logits),
}


def _read(model: nn.Module, group: Group, sample: Tensor) -> tuple[Tensor, list[tuple[Tensor, Member]]]:
    """Logits of one sample, and the distinct tensors that the group's consumers read, in the order of reading."""
    seen: list[tuple[Tensor, Member]] = []
    handles = []
    for member in group.consumers:

        def record(module: nn.Module, args: tuple[Tensor, ...], member: Member = member) -> None:
            if not any(args[0] is tensor for tensor, _ in seen):
                seen.append((args[0], member))

        handles.append(model.get_submodule(member.module).register_forward_pre_hook(record))
    logits = model(sample)
    for handle in handles:
        handle.remove()
    return logits, seen


def _unit(value: Tensor, module: nn.Module, rows: Tensor) -> Tensor:
    """All values of one sample that belong to one unit, row by row, flat."""
    if isinstance(module, nn.Linear):
        return torch.stack([value[0, ..., row] for row in rows]).flatten()
    return torch.stack([value[0, row] for row in rows]).flatten()


def _slow(subject: Subject, group: Group, statistic: Statistic, start: Start) -> np.ndarray:
    model = without_inplace(subject.model)
    total: np.ndarray | float = 0.0
    for inputs, labels in batches_of(subject.inputs, 1):
        logits, seen = _read(model, group, inputs.clone().requires_grad_())
        gradients = torch.autograd.grad(logits, [tensor for tensor, _ in seen], start(logits.detach(), labels))
        cuts = []
        for (tensor, member), gradient in zip(seen, gradients, strict=True):
            module = model.get_submodule(member.module)
            values = [
                statistic(_unit(tensor.detach(), module, rows)[None, None], _unit(gradient, module, rows)[None, None])
                for rows in member.index
            ]
            cuts.append([float(value) for value in values])
        total = total + np.array(cuts)
    return np.asarray(total) / len(subject.inputs)


def _close(result: Tensor, expected: np.ndarray) -> bool:
    return result.shape == expected.shape and np.allclose(
        result.numpy(), expected, rtol=1e-3, atol=1e-5 * abs(expected).max()
    )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("statistic", "start"), [("relevance", "label"), ("squared", "loss")])
def test_collect_is_the_mean_over_samples(name: str, statistic: str, start: str) -> None:
    subject = subject_named(name)
    result = collect(subject.model, subject.groups, batches_of(subject.inputs, 4), STATISTICS[statistic], STARTS[start])
    assert list(result) == [group.name for group in subject.groups]
    for group in subject.groups[:: 1 + len(subject.groups) // 5]:
        assert result[group.name].dtype == torch.float64
        assert _close(result[group.name], _slow(subject, group, STATISTICS[statistic], STARTS[start])), group.name


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("start", STARTS)
def test_collect_takes_any_statistic_and_start(statistic: str, start: str) -> None:
    subject = subject_named("flatten_cnn")
    result = collect(subject.model, subject.groups, batches_of(subject.inputs, 4), STATISTICS[statistic], STARTS[start])
    for group in subject.groups:
        assert _close(result[group.name], _slow(subject, group, STATISTICS[statistic], STARTS[start])), group.name


def test_without_a_start_there_is_no_backward_pass(small: Subject) -> None:
    seen: list[tuple[int, bool]] = []

    def mean(a: Tensor, m: Tensor) -> Tensor:
        seen.append((m.numel(), torch.is_grad_enabled()))
        return a.mean(2)

    result = collect(small.model, small.groups, batches_of(small.inputs, 4), mean)
    assert set(seen) == {(0, False)}
    model = without_inplace(small.model)
    for group in small.groups:
        total = 0.0
        for sample in small.inputs.split(1):
            with torch.no_grad():
                tensors = _read(model, group, sample)[1]
            units = [
                [_unit(tensor, model.get_submodule(member.module), rows).mean() for rows in member.index]
                for tensor, member in tensors
            ]
            total = total + np.array(units)
        assert _close(result[group.name], total / len(small.inputs))


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_batches_do_not_matter(small: Subject, size: int) -> None:
    """Neither their size (a last short one included) nor their order."""
    run = (STATISTICS["relevance"], STARTS["loss"])
    whole = collect(small.model, small.groups, batches_of(small.inputs, 6), *run)
    for parts in (batches_of(small.inputs, size), batches_of(small.inputs, size)[::-1]):
        result = collect(small.model, small.groups, parts, *run)
        for name in whole:
            assert torch.allclose(result[name], whole[name], rtol=1e-4, atol=1e-6 * float(whole[name].abs().max()))


def test_backward_passes_take_a_few_samples_at_a_time(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def start(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(len(logits))
        return STARTS["label"](logits, labels)

    batches = batches_of(small.inputs, 4)
    whole = collect(small.model, small.groups, batches, STATISTICS["relevance"], STARTS["label"])
    monkeypatch.setattr("pxcompress.passes.parts.NUMBERS_AT_ONCE", 3 * small.inputs[0].numel())
    parts = collect(small.model, small.groups, batches, STATISTICS["relevance"], start)
    assert seen == [size for inputs, _ in batches for size in map(len, inputs.split(3))]
    assert max(seen) == 3
    for name, values in whole.items():
        torch.testing.assert_close(parts[name], values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["conv1d", "resnet_basic", "vit"])
def test_activations_are_differences_from_the_origin(name: str) -> None:
    """One origin for every cut and unit; multipliers do not know it."""
    subject = subject_named(name)
    parts = batches_of(subject.inputs, 4)

    def product(a: Tensor, m: Tensor) -> Tensor:
        return (a * m).sum(2)

    plain = collect(subject.model, subject.groups, parts, product, STARTS["label"])
    slope = collect(subject.model, subject.groups, parts, lambda a, m: m.sum(2), STARTS["label"])
    origin = {
        key: torch.randn(value.shape, generator=torch.Generator().manual_seed(3)).double()
        for key, value in plain.items()
    }
    result = collect(subject.model, subject.groups, parts, product, STARTS["label"], origin)
    for key, value in result.items():
        assert torch.allclose(
            value, plain[key] - origin[key] * slope[key], rtol=1e-3, atol=1e-5 * float(plain[key].abs().max())
        )


def test_cuts_of_a_residual_stream() -> None:
    """The stem of the 1-D net is read by `inner`, and after the addition (averaged) by the head: two tensors."""
    subject = subject_named("conv1d")
    result = collect(
        subject.model, subject.groups, batches_of(subject.inputs, 6), STATISTICS["relevance"], STARTS["label"]
    )
    assert {name: tuple(value.shape) for name, value in result.items()} == {"stem": (2, 8), "inner": (1, 12)}


def test_one_tensor_with_two_readers_is_one_cut() -> None:
    """The first block's convolution and its shortcut read the same tensor; its gradient is that of both together."""
    subject = subject_named("resnet_basic")
    group = subject.groups[0]
    assert len(group.consumers) == 2
    result = collect(subject.model, [group], batches_of(subject.inputs, 3), STATISTICS["relevance"], STARTS["label"])
    assert result[group.name].shape == (1, group.units)


class ChangedInPlace(nn.Module):
    """Two layers read one tensor, the second of them after a ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.before, self.after = nn.Linear(4, 6), nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.before(x) + self.after(x.relu_())


def test_a_tensor_that_is_changed_in_place_is_another_cut() -> None:
    with seeded(0):
        net, inputs = ChangedInPlace().eval(), torch.randn(5, 4)
    units = torch.arange(6)[:, None]
    members = (Member("first", "out", units), Member("before", "in", units), Member("after", "in", units))
    group = Group("first", "neuron", 6, members)
    result = collect(net, [group], batches_of(inputs, 2), lambda a, m: a.sum(2))["first"]
    with torch.no_grad():
        values = net.first(inputs).double()
    torch.testing.assert_close(result, torch.stack([values.mean(0), values.relu().mean(0)]))


def test_relevance_of_a_linear_head_by_hand() -> None:
    """At the classifier's input the gradient of logit y is row y of its weight."""
    subject = subject_named("grouped")
    group = next(group for group in subject.groups if group.name == "conv3")
    result = collect(
        subject.model, [group], batches_of(subject.inputs, 4), lambda a, m: (a * m).sum(2), STARTS["label"]
    )
    model = without_inplace(subject.model)
    with torch.no_grad():
        features = torch.relu(model.conv3(torch.relu(model.conv2(torch.relu(model.conv1(subject.inputs)))))).mean(
            (2, 3)
        )
        expected = (features * model.fc.weight[torch.arange(6) % CLASSES]).mean(0)
    assert torch.allclose(result["conv3"][0].float(), expected, rtol=1e-4, atol=1e-6)


def test_collect_leaves_the_model_as_it_was(small: Subject) -> None:
    model = copy.deepcopy(small.model).train()
    before = snapshot(model)
    collect(model, small.groups, batches_of(small.inputs, 4), STATISTICS["relevance"], STARTS["loss"])
    collect(model, small.groups, batches_of(small.inputs, 4), lambda a, m: a.mean(2))
    assert snapshot(model) == before


def test_collect_leaves_the_batches_as_they_were() -> None:
    subject = subject_named("grouped")
    parts = batches_of(subject.inputs.clone(), 3)
    values = [inputs.clone() for inputs, _ in parts]
    collect(subject.model, subject.groups, parts, STATISTICS["relevance"], STARTS["loss"])
    for (inputs, _), value in zip(parts, values, strict=True):
        assert torch.equal(inputs, value)
        assert inputs.grad is None
        assert not inputs.requires_grad


def test_collect_works_inside_no_grad_and_leaves_it_so() -> None:
    subject = subject_named("grouped")
    run = (subject.groups, batches_of(subject.inputs, 3), STATISTICS["relevance"], STARTS["loss"])
    expected = collect(subject.model, *run)
    with torch.no_grad():
        result = collect(subject.model, *run)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_a_failing_statistic_leaves_no_hooks() -> None:
    model = copy.deepcopy(subject_named("grouped").model).train()
    before = snapshot(model)

    def fails(a: Tensor, m: Tensor) -> Tensor:
        raise ArithmeticError("statistic")

    with pytest.raises(ArithmeticError):
        collect(model, subject_named("grouped").groups, batches_of(subject_named("grouped").inputs, 3), fails)
    assert snapshot(model) == before


def test_a_start_gets_detached_logits_and_the_labels_of_its_batch() -> None:
    subject = subject_named("grouped")
    seen: list[tuple[Tensor, Tensor]] = []

    def start(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append((logits, labels))
        return torch.ones_like(logits)

    parts = batches_of(subject.inputs, 4)
    statistic: Callable[[Tensor, Tensor], Tensor] = STATISTICS["relevance"]
    collect(subject.model, subject.groups, parts, statistic, start)
    assert len(seen) == 2
    for (logits, labels), (inputs, expected) in zip(seen, parts, strict=True):
        assert not logits.requires_grad
        assert torch.equal(labels, expected)
        with torch.no_grad():
            assert torch.allclose(logits, subject.model(inputs.detach()), atol=1e-5)
