"""Least squares against explicit rows, and what it promises about outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import Subject, batches_of, plan_of, random_plan
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.graph import find_groups, prune
from pxcompress.repair.fold import Fold
from pxcompress.repair.least_squares import LeastSquares, _Layer, _patches, _refit_, _Sums
from pxcompress.state import seeded


def _error(model: nn.Module, dense: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((model(inputs) - dense(inputs)).square().mean())


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), groups=2),
        nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular"),
        nn.Linear(4, 6),
    ],
    ids=["strided", "grouped", "circular", "linear"],
)
def test_rows_are_what_the_layer_reads(module: nn.Module) -> None:
    """The weights times the rows are the layer's output."""
    shape = {nn.Conv2d: (2, 4, 7, 8), nn.Conv1d: (2, 4, 9), nn.Linear: (2, 5, 4)}[type(module)]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    groups = getattr(module, "groups", 1)
    with torch.no_grad():
        output = module(inputs)
        output = output.movedim(-1, 1) if isinstance(module, nn.Linear) else output
        rows = _patches(inputs, module)
        taps = rows.ndim - output.ndim
        rows = rows.flatten(rows.ndim - taps) if taps else rows[..., None]
        rows = rows.movedim(1, -2).unflatten(-2, (groups, -1)).flatten(-2)  # n, positions ..., groups, inputs
        weight = module.weight.flatten(1).unflatten(0, (groups, -1))
        again = torch.einsum("...gi,goi->...go", rows, weight).flatten(-2) + module.bias
    torch.testing.assert_close(again.movedim(-1, 1), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ridge", [1e-4, 1e-1, 10.0])
def test_the_update_is_that_of_a_ridge_regression(ridge: float) -> None:
    """Around weighted means; the ridge as rows of its own in an ordinary least-squares problem."""
    with seeded(0):
        x, r = torch.randn(50, 4).double() + 1, torch.randn(50, 3).double()
        weights = torch.rand(50).double()
    layer = _Layer("fc", nn.Linear(4, 3), torch.arange(3), 50)
    sums = _Sums.of(layer)
    sums.add_(x[None], r[None], weights)
    found = sums.update(ridge)[0]
    share = weights / weights.sum()
    mean_x, mean_r = share @ x, share @ r
    centred, lack = (x - mean_x) * share.sqrt()[:, None], (r - mean_r) * share.sqrt()[:, None]
    level = ridge * centred.square().sum(0).mean()
    rows = torch.cat([centred, level.sqrt() * torch.eye(4).double()])
    slow = torch.linalg.lstsq(rows, torch.cat([lack, torch.zeros(4, 3).double()])).solution.T
    torch.testing.assert_close(found[:, :-1], slow, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found[:, -1], mean_r - slow @ mean_x, rtol=1e-6, atol=1e-9)
    rest = r - F.linear(x, found[:, :-1], found[:, -1])
    assert sums.error(sums.update(ridge)) == pytest.approx(float((weights[:, None] * rest.square()).sum()))


def test_a_layer_that_no_ridge_makes_better_stays() -> None:
    with seeded(1):
        layer = _Layer("fc", nn.Linear(4, 3), torch.arange(3), 8)
        before = layer.slim.weight.detach().clone()
        parts = [_Sums.of(layer) for _ in range(2)]
        for sign, part in zip((1.0, -1.0), parts, strict=True):  # what one half asks for is wrong in the other
            x = torch.randn(1, 200, 4).double()
            part.add_(x, sign * x[:, :, :3], torch.ones(200).double())
    _refit_(layer, *parts)
    assert torch.equal(layer.slim.weight, before)


def test_copies_of_removed_units_give_all_of_it_back() -> None:
    with seeded(2):
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(45, 4)
        )
        inputs = torch.randn(40, 3, 7, 7)
    with torch.no_grad():
        for unit, other in ((1, 2), (4, 5)):
            model[0].weight[unit], model[0].bias[unit] = model[0].weight[other], model[0].bias[other]
    groups = find_groups(model.eval(), inputs[:1], ["5"]).groups
    pruned = prune(model, groups, plan_of({"0": (1, 4)}), inputs[:1])
    bare = _error(pruned.model, model, inputs)
    LeastSquares(waves=99)(pruned, batches_of(inputs, 10))
    assert _error(pruned.model, model, inputs) < 1e-4 * bare


@pytest.mark.parametrize("name", ["flatten_cnn", "grouped", "resnet_basic", "vit", "conv1d"])
@pytest.mark.parametrize("weighting", ["relevance", "none"])
def test_outputs_come_closer_than_after_the_fold(name: str, weighting: str) -> None:
    subject: Subject = subject_named(name)
    with seeded(3):
        inputs = torch.randn(64, *subject.inputs.shape[1:])
    pruned = prune(subject.model, subject.groups, random_plan(subject.groups, 1), subject.example)
    Fold()(pruned, batches_of(inputs, 16))
    folded = _error(pruned.model, subject.model, inputs)
    LeastSquares(waves=99, weighting=weighting)(pruned, batches_of(inputs, 16))
    assert _error(pruned.model, subject.model, inputs) <= folded * 1.01


def test_layers_before_the_first_loss_stay() -> None:
    subject = subject_named("flatten_cnn")
    pruned = prune(subject.model, subject.groups, plan_of({"fc1": (0, 3)}), subject.example)
    before = {name: value.clone() for name, value in pruned.model.state_dict().items()}
    LeastSquares()(pruned, batches_of(subject.inputs, 4))
    changed = {name for name, value in pruned.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= {"fc2.weight", "fc2.bias"}
