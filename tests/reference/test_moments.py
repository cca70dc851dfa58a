"""`collect_moments` against NumPy, whatever the batches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from models import Subject, batches_of, snapshot, without_inplace
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.layout.rows import members_by_module
from pxcompress.passes.moments import collect_moments
from pxcompress.state import seeded


def _inputs_of(model: nn.Module, name: str, inputs: Tensor) -> Tensor:
    seen: list[Tensor] = []
    twin = without_inplace(model)
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
