"""`collect` and `collect_moments` against slow versions: one sample at a time, one row at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import CLASSES, Subject, batches_of, plan_of, snapshot
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.layout.rows import complement, list_removed_rows, members_by_module, rows_first, unit_view, unit_weights
from pxcompress.passes.collect import Start, Statistic, collect
from pxcompress.passes.moments import collect_moments
from pxcompress.state import seeded
from pxcompress.types import Group, Member

FAMILIES = (
    "flatten_cnn",
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


def _without_inplace(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return twin


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
    model = _without_inplace(subject.model)
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
    model = _without_inplace(small.model)
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


def test_relevance_of_a_linear_head_by_hand() -> None:
    """At the classifier's input the gradient of logit y is row y of its weight."""
    subject = subject_named("grouped")
    group = next(group for group in subject.groups if group.name == "conv3")
    result = collect(
        subject.model, [group], batches_of(subject.inputs, 4), lambda a, m: (a * m).sum(2), STARTS["label"]
    )
    model = _without_inplace(subject.model)
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


# --- moments ---


def _inputs_of(model: nn.Module, name: str, inputs: Tensor) -> Tensor:
    seen: list[Tensor] = []
    twin = _without_inplace(model)
    twin.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        twin(inputs)
    return seen[0]


def _features(model: nn.Module, name: str, index: Tensor, inputs: Tensor) -> np.ndarray:
    """Input features of a layer, (features, samples and positions), in float64."""
    value = _inputs_of(model, name, inputs)
    rows = value.movedim(-1, 0) if isinstance(model.get_submodule(name), nn.Linear) else value.movedim(1, 0)
    rows = rows.flatten(1).double().numpy()
    return np.stack([np.concatenate([rows[row] for row in unit.tolist()]) for unit in index])


@pytest.mark.parametrize(
    ("name", "layer", "width"),
    [
        ("flatten_cnn", "fc1", 9),
        ("flatten_cnn", "fc1", 1),
        ("flatten_cnn", "conv2", 1),
        ("conv1d", "inner", 1),
        ("resnext", "layer2.0.conv2", 1),
        ("vit", "blocks.1.attn.proj", 1),
        ("vit", "blocks.0.mlp.fc2", 1),
    ],
)
@pytest.mark.parametrize("size", [1, 4])
def test_moments_are_those_of_numpy(name: str, layer: str, width: int, size: int) -> None:
    subject = subject_named(name)
    module = subject.model.get_submodule(layer)
    rows = module.weight.shape[1] * getattr(module, "groups", 1)
    index = torch.arange(rows).reshape(-1, width)
    result = collect_moments(subject.model, {layer: index}, batches_of(subject.inputs, size))[layer].whole
    features = _features(subject.model, layer, index, subject.inputs)
    second = features @ features.T / features.shape[1]
    assert result.second.dtype == result.mean.dtype == torch.float64
    assert np.allclose(result.mean, features.mean(1), rtol=1e-4, atol=1e-6)
    assert np.allclose(result.second, second, rtol=1e-4, atol=1e-6 * abs(second).max())
    assert np.allclose(result.covariance, np.cov(features, bias=True), rtol=1e-3, atol=1e-5 * abs(second).max())


def test_covariances_survive_a_large_mean() -> None:
    """Late features of a trained network vary little around a large mean; E[x x^T] - E[x] E[x]^T must not cancel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = 100 + torch.randn(64, 4)
        model = nn.Sequential(nn.Identity(), nn.Linear(4, 2))
    result = collect_moments(model, {"1": torch.arange(4).unsqueeze(1)}, batches_of(inputs, 16))["1"].whole
    expected = np.cov(inputs.double().numpy().T, bias=True)
    assert np.allclose(result.covariance, expected, atol=1e-4)


@pytest.mark.parametrize("size", [1, 5, 32])
def test_halves_are_runs_of_neighbours_whatever_the_batches(size: int) -> None:
    with seeded(0):
        inputs, model = torch.randn(30, 4), nn.Sequential(nn.Identity(), nn.Linear(4, 2))
    seen = collect_moments(model, {"1": torch.arange(4).unsqueeze(1)}, batches_of(inputs, size))["1"]
    first = torch.tensor([sample // 4 % 2 == 0 for sample in range(30)])
    for half, chosen in zip(seen.halves, (first, ~first), strict=True):
        assert half.count == int(chosen.sum())
        assert np.allclose(half.covariance, np.cov(inputs[chosen].double().numpy().T, bias=True), atol=1e-6)
    assert seen.samples == 30
    assert [(fit is seen.halves[0], check is seen.halves[1]) for fit, check in seen.folds] == [
        (True, True),
        (False, False),
    ]


def test_moments_take_rows_in_any_order() -> None:
    subject = subject_named("flatten_cnn")
    straight = torch.arange(8).unsqueeze(1)
    parts = batches_of(subject.inputs, 4)
    shuffle = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    result = collect_moments(subject.model, {"conv2": straight[shuffle]}, parts)["conv2"].whole
    expected = collect_moments(subject.model, {"conv2": straight}, parts)["conv2"].whole
    assert torch.allclose(result.mean, expected.mean[shuffle])
    assert torch.allclose(result.second, expected.second[shuffle][:, shuffle])


def test_moments_leave_the_model_as_it_was(small: Subject) -> None:
    model = copy.deepcopy(small.model).train()
    before = snapshot(model)
    consumers = members_by_module(small.groups, "in")
    layouts = {}
    for name in consumers:
        module = model.get_submodule(name)
        layouts[name] = torch.arange(module.weight.shape[1] * getattr(module, "groups", 1)).unsqueeze(1)
    assert set(collect_moments(model, layouts, batches_of(small.inputs, 4))) == set(layouts)
    assert snapshot(model) == before


# --- geometry ---


@pytest.mark.parametrize(
    ("module", "shape", "rows", "positions"),
    [
        (nn.Linear(6, 2), (3, 6), 6, 1),
        (nn.Linear(6, 2), (3, 5, 6), 6, 5),
        (nn.Linear(6, 2), (3, 4, 5, 6), 6, 20),
        (nn.Conv1d(6, 2, 1), (3, 6, 7), 6, 7),
        (nn.Conv2d(6, 2, 1), (3, 6, 4, 5), 6, 20),
        (nn.Conv3d(6, 2, 1), (3, 6, 2, 3, 4), 6, 24),
    ],
)
def test_rows_come_first_and_units_own_theirs(
    module: nn.Module, shape: tuple[int, ...], rows: int, positions: int
) -> None:
    value = torch.randn(shape)
    result = rows_first(value, module)
    assert result.shape == (3, rows, positions)
    for row in range(rows):
        expected = value[..., row] if isinstance(module, nn.Linear) else value[:, row]
        assert torch.equal(result[:, row].flatten(), expected.flatten())
    for index in (torch.arange(rows).reshape(3, 2), torch.tensor([[5, 0], [2, 3]]), torch.tensor([[4]])):
        view = unit_view(value, module, index)
        assert view.shape == (3, len(index), index.shape[1] * positions)
        for unit, owned in enumerate(index):
            assert torch.equal(view[:, unit], result[:, owned].flatten(1))


def test_units_weights(small: Subject) -> None:
    """The weights whose removal a unit's removal causes: zero them and the layer does not see the unit any more."""
    for group in small.groups:
        for member in group.members:
            module = small.model.get_submodule(member.module)
            result = unit_weights(small.model, member)
            if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                assert result is None
                continue
            groups = getattr(module, "groups", 1)
            for unit, rows in enumerate(member.index.tolist()):
                if member.axis == "out":
                    expected = module.weight[rows]
                else:
                    width, outputs = module.weight.shape[1], module.weight.shape[0] // groups
                    expected = torch.cat(
                        [
                            module.weight[
                                (row // width) * outputs : (row // width + 1) * outputs, row % width
                            ].flatten()
                            for row in rows
                        ]
                    )
                assert torch.equal(result[unit].sort().values, expected.detach().flatten().sort().values)


def test_members_by_module_and_removed_rows() -> None:
    subject = subject_named("densenet")
    readers = members_by_module(subject.groups, "in")
    name = "features.transition1.conv"
    first, second = readers[name][0], readers[name][1]
    plan = plan_of({first[0].name: (1, 3), second[0].name: (0,)})
    expected = sorted([*first[1].index[[1, 3]].flatten().tolist(), *second[1].index[0].tolist()])
    assert list_removed_rows(readers[name], plan).tolist() == expected
    assert list_removed_rows((), plan).tolist() == []
    assert list_removed_rows(readers[name], plan_of({})).tolist() == []


@pytest.mark.parametrize(("rows", "expected"), [([], [0, 1, 2, 3]), ([0, 2], [1, 3]), ([3, 0, 1, 2], [])])
def test_others(rows: list[int], expected: list[int]) -> None:
    assert complement(4, torch.tensor(rows, dtype=torch.int64)).tolist() == expected


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
