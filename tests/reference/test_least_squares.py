"""`least-squares` against ridge regression over every sample and position, written down in numpy."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Subject, batches_of, plan_of, randomised
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.graph import find_groups, prune
from pxcompress.repair import REPAIRS, least_squares
from pxcompress.repair.fold import Fold
from pxcompress.repair.least_squares import LAYERS_TOGETHER, RIDGES, LeastSquares
from pxcompress.state import evaluating, seeded
from pxcompress.types import Group, Plan, Pruned

SIZE = 5
"""Samples of a batch."""

ALL = 10**6
"""Rows: every sample and position of any subject."""


class GeometryNet(nn.Module):
    """Every geometry of a convolution at once: stride, dilation, padding by zeros, by a reflection and as "same"."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 12, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), bias=False)
        self.conv3 = nn.Conv2d(12, 8, 3, padding=1, groups=2, padding_mode="reflect")
        self.conv4 = nn.Conv2d(8, 6, (2, 3), padding="same")
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = torch.relu(layer(x))
        return self.fc(x.mean((2, 3)))


def _geometry() -> Subject:
    with seeded(2):
        model, inputs = randomised(GeometryNet()).eval(), torch.randn(6, 3, 16, 12)
    return Subject("geometry", model, find_groups(model, inputs[:1], ("fc",)), inputs[:1], inputs)


def _half(groups: Sequence[Group]) -> Plan:
    """Removes every second unit."""
    return plan_of({group.name: range(0, group.units - 1, 2) for group in groups})


def _folded(name: str, samples: int = 18) -> tuple[Pruned, Tensor]:
    """A subject without every second unit, folded; inputs (samples, ...)."""
    subject = _geometry() if name == "geometry" else subject_named(name)
    with seeded(5):
        inputs = torch.randn(samples, *subject.inputs.shape[1:])
    pruned = prune(subject.model, subject.groups, _half(subject.groups))
    return Fold()(pruned, batches_of(inputs, SIZE)), inputs


# --- the reference ---


def _seen(model: nn.Module, names: Sequence[str], inputs: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Input, output and gradient of the decision's margin at the output, by layer."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with evaluating(model), torch.enable_grad():
        for name in names:

            def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                seen[name] = args[0].detach(), output

            model.get_submodule(name).register_forward_hook(record)
        logits = model(inputs.clone().requires_grad_(True))
        decided = F.one_hot(logits.argmax(1), logits.shape[1]).bool()
        margin = logits[decided] - logits.masked_fill(decided, -torch.inf).logsumexp(1)
        gradients = torch.autograd.grad(margin.sum(), [output for _, output in seen.values()])
    return {
        name: (value, output.detach(), gradient)
        for (name, (value, output)), gradient in zip(seen.items(), gradients, strict=True)
    }


def _outputs(module: nn.Module, value: Tensor) -> np.ndarray:
    """(samples, positions, outputs)."""
    value = value if isinstance(module, nn.Linear) else value.movedim(1, -1)
    return value.reshape(len(value), -1, value.shape[-1]).double().numpy()


def _inputs(module: nn.Module, value: Tensor, output: Tensor) -> np.ndarray:
    """(samples, positions, groups, inputs of an output), window by window."""
    if isinstance(module, nn.Linear):
        return _outputs(module, value)[:, :, None]
    if isinstance(module.padding, str):
        ends = [dilation * (size - 1) for size, dilation in zip(module.kernel_size, module.dilation, strict=True)]
        pads = [(end // 2, end - end // 2) for end in ends]
    else:
        pads = [(pad, pad) for pad in module.padding]
    mode = {"zeros": "constant"}.get(module.padding_mode, module.padding_mode)
    padded = np.pad(value.double().numpy(), [(0, 0), (0, 0), *pads], mode=mode)
    windows = []
    for place in itertools.product(*map(range, output.shape[2:])):
        taps = [
            slice(at * stride, at * stride + (size - 1) * dilation + 1, dilation)
            for at, size, stride, dilation in zip(
                place, module.kernel_size, module.stride, module.dilation, strict=True
            )
        ]
        windows.append(padded[(slice(None), slice(None), *taps)].reshape(len(padded), module.groups, -1))
    return np.stack(windows, 1)


def _ridge(x: np.ndarray, r: np.ndarray, w: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """D and d that minimise sum w |D x + d - r|^2 + sum w lambda |D|^2, by least squares on more rows."""
    w = w / w.sum()
    mean_x, mean_r = w @ x, w @ r
    level = ridge * (w @ np.square(x - mean_x)).mean()
    rows = np.concatenate([np.sqrt(w)[:, None] * (x - mean_x), np.sqrt(level) * np.eye(x.shape[1])])
    values = np.concatenate([np.sqrt(w)[:, None] * (r - mean_r), np.zeros((x.shape[1], r.shape[1]))])
    weight = np.linalg.lstsq(rows, values, rcond=None)[0].T
    return weight, mean_r - weight @ mean_x


def _refit(x: np.ndarray, r: np.ndarray, w: np.ndarray, fits: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Updates for all groups with the ridge that does best on the rows that `fits` leaves out; None to change nothing.

    `x` is (rows, groups, inputs), `r` (rows, groups, outputs), `w` (rows,).
    """
    groups = range(x.shape[1])

    def error(updates: list[tuple[np.ndarray, np.ndarray]]) -> float:
        left = [r[~fits, g] - x[~fits, g] @ updates[g][0].T - updates[g][1] for g in groups]
        return float(sum((w[~fits, None] * np.square(part)).sum() for part in left))

    fits_by_ridge = {ridge: [_ridge(x[fits, g], r[fits, g], w[fits], ridge) for g in groups] for ridge in RIDGES}
    best = min(RIDGES, key=lambda ridge: error(fits_by_ridge[ridge]))
    if error(fits_by_ridge[best]) >= (w[~fits, None, None] * np.square(r[~fits])).sum():
        return None
    return [_ridge(x[:, g], r[:, g], w, best) for g in groups]


def _kept(pruned: Pruned, name: str) -> list[int]:
    """Output rows of a dense layer that are still there."""
    removed = {
        int(row)
        for group in pruned.groups
        for member in group.members
        if (member.module, member.axis) == (name, "out")
        for unit in pruned.plan.removed.get(group.name, ())
        for row in member.index[unit]
    }
    return [row for row in range(len(pruned.dense.get_submodule(name).weight)) if row not in removed]


def _repair_slowly(pruned: Pruned, inputs: Tensor, names: list[str], together: int, weighted: bool) -> None:
    """What `LeastSquares` does to `pruned.model` on `inputs` in batches of `SIZE`."""
    fits = np.concatenate(
        [
            [(2 * place < len(part)) == (turn % 2 == 0) for place in range(len(part))]
            for turn, part in enumerate(inputs.split(SIZE))
        ]
    )
    dense = _seen(pruned.dense, names, inputs)
    for wave in [names[start : start + together] for start in range(0, len(names), together)]:
        slim = _seen(pruned.model, wave, inputs)
        for name in wave:
            module = pruned.model.get_submodule(name)
            rows = _kept(pruned, name)
            x = _inputs(module, slim[name][0], slim[name][1])
            r = _outputs(module, dense[name][1])[:, :, rows] - _outputs(module, slim[name][1])
            power = np.square(_outputs(module, dense[name][2])[:, :, rows]).sum(2)
            w = (power if weighted else np.ones_like(power)).reshape(-1)
            half = np.repeat(fits, x.shape[1])
            refits = _refit(x.reshape(-1, *x.shape[2:]), r.reshape(len(half), x.shape[2], -1), w, half)
            if refits is None:
                continue
            with torch.no_grad():
                weight = torch.from_numpy(np.concatenate([part for part, _ in refits]))
                module.weight += weight.reshape(module.weight.shape)
                bias = torch.from_numpy(np.concatenate([part for _, part in refits])).float()
                module.bias = nn.Parameter(bias if module.bias is None else module.bias + bias)


def _order(pruned: Pruned, example: Tensor) -> list[str]:
    """Convolutions and linear layers as they run, from the first that lost inputs on."""
    order: list[str] = []
    with evaluating(pruned.dense), torch.no_grad():
        for name, module in pruned.dense.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                module.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
        pruned.dense(example)
    shapes = [
        (pruned.dense.get_submodule(name).weight.shape[1], pruned.model.get_submodule(name).weight.shape[1])
        for name in order
    ]
    return [name for name, (before, after) in zip(order, shapes, strict=True) if before != after]


@pytest.mark.parametrize("name", ["geometry", "flatten_cnn", "conv1d", "grouped", "resnet_basic", "resnext", "vit"])
@pytest.mark.parametrize(("weighting", "together"), [("relevance", 1), ("none", LAYERS_TOGETHER)])
def test_least_squares_is_ridge_regression(name: str, weighting: str, together: int) -> None:
    pruned, inputs = _folded(name)
    expected = copy.deepcopy(pruned)
    before = {key: value.clone() for key, value in pruned.model.state_dict().items()}
    names = _order(pruned, inputs[:1])
    _repair_slowly(expected, inputs, names, together, weighting == "relevance")
    LeastSquares(9999 if together == 1 else 1, ALL, weighting)(pruned, batches_of(inputs, SIZE))
    wanted, state = expected.model.state_dict(), pruned.model.state_dict()
    assert list(wanted) == list(state)
    assert any(not torch.equal(value, state[key]) for key, value in before.items())
    for key, value in wanted.items():
        assert torch.allclose(state[key], value, rtol=1e-3, atol=2e-4 * float(value.abs().max())), key


# --- what it is for ---


def _error(pruned: Pruned, inputs: Tensor) -> float:
    """|logits - dense logits|^2 as a share of the variance of the dense logits."""
    with torch.no_grad():
        dense, slim = pruned.dense.eval()(inputs), pruned.model.eval()(inputs)
    return float((slim - dense).square().mean() / dense.var())


def test_logits_come_nearer_to_the_dense_ones(small: Subject) -> None:
    """On the samples it was fitted to and on others, beyond what the fold did."""
    pruned, inputs = _folded(small.name, 96)
    seen, unseen = inputs[:80], inputs[80:]
    before = [_error(pruned, part) for part in (seen, unseen)]
    LeastSquares()(pruned, batches_of(seen, SIZE))
    assert _error(pruned, seen) < 0.9 * before[0]
    assert _error(pruned, unseen) < before[1]


def test_duplicated_channels_are_recovered() -> None:
    """A removed channel that is a multiple of a kept one costs next to nothing, without a fold before."""
    with seeded(5):
        model, inputs = randomised(GeometryNet()).eval(), torch.randn(48, 3, 16, 12)
    with torch.no_grad():
        model.conv1.weight[1], model.conv1.bias[1] = 2 * model.conv1.weight[4], 2 * model.conv1.bias[4]
    pruned = prune(model, find_groups(model, inputs[:1], ("fc",)).groups, plan_of({"conv1": (1,)}))
    before = _error(pruned, inputs[32:])
    LeastSquares(weighting="none")(pruned, batches_of(inputs[:32], SIZE))
    assert before > 1e-2
    assert _error(pruned, inputs[32:]) < 1e-2 * before


def test_inputs_all_alike_are_repaired_and_change_no_weight_by_much() -> None:
    """There is no variance to fit to, only its rounding: outputs were 0 with weights of 1e15."""
    for seed in range(4):
        with seeded(seed):
            model = randomised(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()))
            model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]).eval()
        inputs = torch.ones(8, 3, 12, 12)
        groups = find_groups(model, inputs[:1], ("6",)).groups
        pruned = LeastSquares()(prune(model, groups, _half(groups)), [(inputs, torch.zeros(8).long())] * 2)
        with torch.no_grad():
            expected = model(inputs)
            assert (pruned.model(inputs) - expected).abs().max() < 1e-4 * expected.abs().max()
        sizes = [max(value.abs().max() for value in net.parameters()) for net in (pruned.model, model)]
        assert sizes[0] < 10 * sizes[1]


def test_layers_make_up_for_what_went_wrong_before_them() -> None:
    """A normalisation that is off by a factor, which no refit changes, is undone by the layers behind it."""
    subject = subject_named("flatten_cnn")
    with seeded(5):
        inputs = torch.randn(64, 3, 16, 16)
    pruned = prune(subject.model, subject.groups, plan_of({"conv1": (0,)}))
    pruned.model.bn1.running_var *= 9
    before = _error(pruned, inputs)
    LeastSquares()(pruned, batches_of(inputs, SIZE))
    assert _error(pruned, inputs) < 0.2 * before
    assert torch.equal(pruned.model.conv1.weight, subject.model.conv1.weight[1:])


def test_an_empty_plan_changes_nothing(small: Subject) -> None:
    pruned = prune(small.model, small.groups, plan_of({}))
    LeastSquares()(pruned, batches_of(small.inputs, 3))
    for key, value in pruned.model.state_dict().items():
        assert torch.equal(value, small.model.state_dict()[key])


def test_without_samples_nothing_changes() -> None:
    pruned, _ = _folded("flatten_cnn")
    before = {key: value.clone() for key, value in pruned.model.state_dict().items()}
    LeastSquares()(pruned, [])
    assert all(torch.equal(before[key], value) for key, value in pruned.model.state_dict().items())


# --- samples, memory, layers that are left alone ---


def test_batches_of_one_sample_are_halved_too() -> None:
    pruned, inputs = _folded("flatten_cnn", 32)
    before = _error(pruned, inputs)
    LeastSquares()(pruned, batches_of(inputs, 1))
    assert _error(pruned, inputs) < before


def test_few_rows_do_nearly_what_all_do() -> None:
    """256 of 5120 positions at the first layer; which ones does not depend on anyone's seed."""
    pruned, inputs = _folded("geometry", 48)
    states: list[dict[str, Tensor]] = []
    errors = [_error(pruned, inputs)]
    for rows in (ALL, 512, 512):
        drawn = copy.deepcopy(pruned)
        torch.manual_seed(len(states))
        LeastSquares(rows=rows)(drawn, batches_of(inputs, SIZE))
        states.append(drawn.model.state_dict())
        errors.append(_error(drawn, inputs))
    assert errors[1] < errors[2] < errors[0]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(torch.equal(states[1][key], states[2][key]) for key in states[1])


def test_little_memory_takes_more_passes_to_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, inputs = _folded("resnet_basic")
    stinted = copy.deepcopy(pruned)
    LeastSquares(waves=9999)(pruned, batches_of(inputs, SIZE))
    monkeypatch.setattr(least_squares, "MEMORY_BYTES", 1)
    LeastSquares(waves=1)(stinted, batches_of(inputs, SIZE))
    for key, value in pruned.model.state_dict().items():
        assert torch.equal(value, stinted.model.state_dict()[key]), key


def test_rows_in_half_precision_lead_to_nearly_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, inputs = _folded("resnet_basic")
    halved = copy.deepcopy(pruned)
    LeastSquares()(pruned, batches_of(inputs, SIZE))
    monkeypatch.setattr(least_squares, "EXACT_BYTES", 0)
    LeastSquares()(halved, batches_of(inputs, SIZE))
    assert _error(halved, inputs) == pytest.approx(_error(pruned, inputs), rel=1e-2)
    weights = halved.model.state_dict()
    assert any(not torch.equal(value, weights[key]) for key, value in pruned.model.state_dict().items())


class _Rounding(nn.Conv2d):
    """Computes something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round(decimals=4)


def test_layers_that_are_not_plain_or_run_twice_stay() -> None:
    with seeded(6):
        model, inputs = randomised(GeometryNet()).eval(), torch.randn(24, 3, 16, 12)
    model.conv2.__class__ = _Rounding
    model.conv4 = nn.Sequential(*[nn.Conv2d(8, 8, 1)] * 2, nn.Conv2d(8, 6, 1))
    groups = find_groups(model, inputs[:1], ("fc",)).groups
    pruned = prune(model, groups, plan_of({group.name: (0,) for group in groups}))
    before = {key: value.clone() for key, value in pruned.model.state_dict().items()}
    LeastSquares()(pruned, batches_of(inputs, SIZE))
    changed = {
        key.rpartition(".")[0] for key, value in pruned.model.state_dict().items() if not _same(before, key, value)
    }
    assert changed <= {"conv3", "conv4.2", "fc"}
    assert changed


def _same(before: dict[str, Tensor], key: str, value: Tensor) -> bool:
    return key in before and torch.equal(before[key], value)


def test_least_squares_is_registered_with_its_options() -> None:
    assert REPAIRS.build("least-squares") == LeastSquares()
    assert REPAIRS.build("least-squares:waves=8,weighting=none") == LeastSquares(8, weighting="none")
