"""`fold` against least squares written down from METHODS.md, section 3, in numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from models import (
    Conv1dNet,
    FlattenCNN,
    GroupedNet,
    Subject,
    batches_of,
    extreme_plan,
    plan_of,
    random_plan,
    randomised,
    snapshot,
)
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.graph import find_groups, prune
from pxcompress.repair import REPAIRS
from pxcompress.repair.fold import Fold
from pxcompress.state import seeded
from pxcompress.types import Group, Member, Plan, Pruned

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


def _layer_inputs(model: nn.Module, names: list[str], inputs: Tensor) -> dict[str, np.ndarray]:
    """Inputs of layers as (rows, samples and positions), float64."""
    twin = copy.deepcopy(model)
    seen: dict[str, np.ndarray] = {}
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    for name in names:
        layer = twin.get_submodule(name)

        def record(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            axis = -1 if isinstance(module, nn.Linear) else 1
            seen[name] = args[0].movedim(axis, 0).flatten(1).double().numpy()

        layer.register_forward_pre_hook(record)
    with torch.no_grad():
        twin(inputs)
    return seen


def _owners(groups: tuple[Group, ...], name: str, axis: str) -> list[tuple[Group, Member]]:
    return [(g, m) for g in groups for m in g.members if (m.module, m.axis) == (name, axis)]


def _gone(groups: tuple[Group, ...], plan: Plan, name: str, axis: str) -> set[int]:
    owners = _owners(groups, name, axis)
    return {
        int(row) for group, member in owners for unit in plan.removed.get(group.name, ()) for row in member.index[unit]
    }


def _predict(
    x: np.ndarray, inputs: list[int], outputs: list[int], ridge: float, centred: bool
) -> tuple[np.ndarray, np.ndarray]:
    """B and c of x_P = B x_S + c: ridge normal equations; `x` is (features, observations)."""
    mean = x.mean(1, keepdims=True) if centred else np.zeros((len(x), 1))
    around = x - mean
    s, p = around[inputs], around[outputs]
    level = ridge * np.mean(s * s, axis=1).mean() + 1e-12  # kept inputs may all be dead
    b = (p @ s.T / x.shape[1]) @ np.linalg.inv(s @ s.T / x.shape[1] + level * np.eye(len(inputs)))
    return b, (mean[outputs] - b @ mean[inputs])[:, 0]


def _expected(pruned: Pruned, name: str, x: np.ndarray, ridge: float, centred: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weight and what is added to the bias of the folded layer, at its kept outputs and inputs."""
    module = pruned.dense.get_submodule(name)
    weight = module.weight.detach().double().numpy()
    gone_in = _gone(pruned.groups, pruned.plan, name, "in")
    gone_out = _gone(pruned.groups, pruned.plan, name, "out")
    taps = _taps(pruned, name)
    features = np.stack([x[start : start + taps].reshape(-1) for start in range(0, len(x), taps)])
    conv_groups = getattr(module, "groups", 1)
    width, outputs = len(features) // conv_groups, len(weight) // conv_groups
    weights, shifts = [], []
    for place in range(conv_groups):
        inside = range(place * width, (place + 1) * width)
        removed = [feature - place * width for feature in inside if feature * taps in gone_in]
        remaining = [feature for feature in range(width) if feature not in removed]
        b, c = _predict(features[place * width : (place + 1) * width], remaining, removed, ridge, centred)
        for output in range(place * outputs, (place + 1) * outputs):
            if output in gone_out:
                continue
            w = weight[output].reshape(width, -1)  # (features, taps of the kernel or flattened positions)
            weights.append(w[remaining] + np.einsum("pk,ps->sk", w[removed], b))
            shifts.append(sum(c[i] * w[feature].sum() for i, feature in enumerate(removed)))
    return np.stack(weights), np.array(shifts)


def _taps(pruned: Pruned, name: str) -> int:
    """Inputs of a linear layer that one flattened channel owns."""
    owners = _owners(pruned.groups, name, "in")
    flattened = isinstance(pruned.dense.get_submodule(name), nn.Linear) and owners[0][0].kind == "channel"
    return owners[0][1].index.shape[1] if flattened else 1


def _pads(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d) and any(module.padding)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("centred", ["yes", "no", "auto"])
def test_fold_is_ridge_regression(name: str, centred: str) -> None:
    subject = subject_named(name)
    plan = random_plan(subject.groups, 1)
    pruned = prune(subject.model, subject.groups, plan)
    biases = {key: value.clone() for key, value in pruned.model.state_dict().items() if key.endswith("bias")}
    Fold(ridge=0.1, centred=centred)(pruned, batches_of(subject.inputs, 4))
    consumers = sorted({member.module for group in subject.groups for member in group.consumers})
    consumers = [layer for layer in consumers if _gone(subject.groups, plan, layer, "in")]
    assert consumers
    features = _layer_inputs(subject.model, consumers, subject.inputs)
    for layer in consumers:
        around_mean = centred == "yes" or (centred == "auto" and not _pads(subject.model.get_submodule(layer)))
        weight, shift = _expected(pruned, layer, features[layer], 0.1, around_mean)
        slim = pruned.model.get_submodule(layer)
        actual = slim.weight.detach().double().numpy().reshape(weight.shape)
        assert np.allclose(actual, weight, rtol=1e-3, atol=1e-3 * abs(weight).max()), layer
        before = biases.get(f"{layer}.bias")
        added = 0.0 if slim.bias is None else slim.bias.detach() - (0.0 if before is None else before)
        expected = shift if around_mean else np.zeros_like(shift)
        assert np.allclose(np.asarray(added), expected, rtol=1e-3, atol=1e-3 * max(1, abs(shift).max())), layer


def test_fold_does_not_depend_on_batches(small: Subject) -> None:
    plan = random_plan(small.groups, 1)
    states = []
    for parts in (batches_of(small.inputs, 6), batches_of(small.inputs, 1), batches_of(small.inputs, 4)[::-1]):
        pruned = prune(small.model, small.groups, plan)
        Fold(ridge=1e-3)(pruned, parts)
        states.append(pruned.model.state_dict())
    for state in states[1:]:
        for key, value in states[0].items():
            assert torch.allclose(state[key], value, rtol=1e-2, atol=1e-3 * float(value.abs().max())), key


@pytest.mark.parametrize("centred", ["yes", "no", "auto"])
def test_fold_never_touches_the_dense_model_nor_the_batches(small: Subject, centred: str) -> None:
    dense = copy.deepcopy(small.model).train()
    before = snapshot(dense)
    pruned = prune(dense, small.groups, extreme_plan(small.groups))
    parts = batches_of(small.inputs.clone(), 4)
    repaired = Fold(centred=centred)(pruned, parts)
    assert snapshot(dense) == before
    assert repaired.dense is dense
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]), small.inputs)
    assert all(parameter.isfinite().all() for parameter in repaired.model.parameters())
    assert [module.training for module in repaired.model.modules()] == [module.training for module in dense.modules()]


def test_an_empty_plan_folds_nothing(small: Subject) -> None:
    pruned = prune(small.model, small.groups, plan_of({}))
    Fold()(pruned, batches_of(small.inputs, 3))
    for key, value in pruned.model.state_dict().items():
        assert torch.equal(value, small.model.state_dict()[key])


def test_fold_lowers_the_error_of_every_layer(small: Subject) -> None:
    """On the inputs it was fitted to, what a consumer outputs is nearer to the dense output than without the fold."""
    plan = random_plan(small.groups, 1)
    bare = prune(small.model, small.groups, plan)
    folded = Fold(ridge=1e-6, centred="yes")(copy.deepcopy(bare), batches_of(small.inputs, 3))
    for group in small.groups:
        for member in group.consumers:
            module = small.model.get_submodule(member.module)
            removed = _gone(small.groups, plan, member.module, "in")
            if not removed or _pads(module) or getattr(module, "groups", 1) > 1:
                continue
            x = _layer_inputs(small.model, [member.module], small.inputs)[member.module]
            remaining = [row for row in range(len(x)) if row not in removed]
            outputs = [
                row for row in range(len(module.weight)) if row not in _gone(small.groups, plan, member.module, "out")
            ]
            if isinstance(module, nn.Linear):
                dense = module.weight.detach().double().numpy()[outputs] @ x
                errors = []
                for model in (bare.model, folded.model):
                    layer = model.get_submodule(member.module)
                    shift = (layer.bias - module.bias[outputs]).detach().double().numpy()[:, None]
                    errors.append(
                        np.square(layer.weight.detach().double().numpy() @ x[remaining] + shift - dense).mean()
                    )
                assert errors[1] <= errors[0] * (1 + 1e-6), member.module


# --- exact recovery ---


def _duplicated(model: nn.Module, layer: str, source: int, copy_: int, factor: float = 1.0) -> None:
    """Unit `copy_` of a convolution or linear layer becomes `factor` times unit `source`."""
    module = model.get_submodule(layer)
    with torch.no_grad():
        module.weight[copy_] = factor * module.weight[source]
        module.bias[copy_] = factor * module.bias[source]


def _logit_error(
    model: nn.Module, removed: dict[str, tuple[int, ...]], inputs: Tensor, fold: Fold
) -> tuple[float, float]:
    """Largest difference to the dense logits as a share of their scale, before and after the fold, on unseen inputs."""
    groups = find_groups(model, inputs[:1]).groups
    pruned = prune(model, groups, plan_of(removed))
    half = len(inputs) // 2
    with torch.no_grad():
        dense, bare = model(inputs[half:]), pruned.model(inputs[half:])
        fold(pruned, batches_of(inputs[:half], 4))
        folded = pruned.model(inputs[half:])
    scale = dense.abs().max()
    return float((bare - dense).abs().max() / scale), float((folded - dense).abs().max() / scale)


@pytest.mark.parametrize("centred", ["yes", "no", "auto"])
def test_duplicated_channels_cost_nothing(centred: str) -> None:
    """A removed channel that is a positive multiple of a kept one is rebuilt exactly: through ReLU, flatten, groups."""
    with seeded(5):
        flatten, grouped, sequence = (randomised(kind()).eval() for kind in (FlattenCNN, GroupedNet, Conv1dNet))
        images, series = torch.randn(16, 3, 16, 16), torch.randn(16, 4, 20)
    fold = Fold(ridge=1e-9, centred=centred)
    _duplicated(flatten, "conv2", 0, 3, 2.0)
    _duplicated(flatten, "fc1", 4, 2, 0.5)
    _duplicated(sequence, "inner", 0, 7, 3.0)
    # conv1's units are the places inside the four groups of conv2: 12 rows, 3 places; place 2 repeats place 0.
    for place in range(4):
        _duplicated(grouped, "conv1", 3 * place, 3 * place + 2)
    _duplicated(grouped, "conv3", 5, 1, 4.0)
    for model, removed, inputs in (
        (flatten, {"conv2": (3,), "fc1": (2,)}, images),
        (sequence, {"inner": (7,)}, series),
        (grouped, {"conv1": (2,), "conv3": (1,)}, images),
    ):
        bare, folded = _logit_error(model, removed, inputs, fold)
        assert bare > 1e-3
        assert folded < 1e-4


def test_duplicated_heads_and_neurons_cost_nothing() -> None:
    subject = subject_named("vit")
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        for part in range(3):
            start = 24 * part
            for parameter in model.blocks[0].attn.qkv.parameters():
                parameter[start + 18 : start + 24] = parameter[start : start + 6]
    _duplicated(model, "blocks.1.mlp.fc1", 3, 50)
    inputs = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    removed = {"blocks.0.attn": (3,), "blocks.1.mlp.fc1": (50,)}
    bare, folded = _logit_error(model, removed, inputs, Fold(ridge=1e-9))
    assert bare > 1e-3
    assert folded < 1e-4


def test_a_constant_channel_moves_into_the_bias() -> None:
    """Centred, where nothing pads: a channel that never changes is its mean."""
    with seeded(6):
        model, inputs = randomised(GroupedNet()).eval(), torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        model.conv3.weight[2] = 0
        model.conv3.bias[2] = 3.0
    bare, folded = _logit_error(model, {"conv3": (2,)}, inputs, Fold(centred="yes"))
    assert bare > 1e-3
    assert folded < 1e-5


def test_a_consumer_without_a_bias_gets_one_only_if_centred() -> None:
    with seeded(7):
        model = randomised(GroupedNet()).eval()
        model.conv3 = nn.Conv2d(8, 6, 1, bias=False)
        inputs = torch.randn(8, 3, 16, 16)
    groups = find_groups(model, inputs[:1]).groups
    for centred, has_bias in (("yes", True), ("no", False)):
        pruned = prune(model, groups, plan_of({"conv2": (0,)}))
        Fold(centred=centred)(pruned, batches_of(inputs, 4))
        assert (pruned.model.conv3.bias is not None) == has_bias
        assert model.conv3.bias is None


@pytest.mark.parametrize("centred", ["yes", "no"])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
def test_dead_units_do_not_break_the_solver(centred: str, ridge: float) -> None:
    """Kept inputs that are always zero, and two that are equal: the ridge, or its floor, must hold."""
    with seeded(8):
        model, inputs = randomised(GroupedNet()).eval(), torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        model.conv2.weight[:2] = 0
        model.conv2.bias[:2] = -1.0
    _duplicated(model, "conv2", 4, 5)
    groups = find_groups(model, inputs[:1]).groups
    pruned = prune(model, groups, plan_of({"conv2": (1,)}))
    Fold(ridge=ridge, centred=centred)(pruned, batches_of(inputs, 4))
    with torch.no_grad():
        error = (pruned.model(inputs) - model(inputs)).abs().max() / model(inputs).abs().max()
    assert error.isfinite()
    assert all(parameter.isfinite().all() for parameter in pruned.model.parameters())
    assert pruned.model.conv3.weight.abs().max() < 100 * model.conv3.weight.abs().max()


def test_fold_is_registered_with_its_options() -> None:
    assert REPAIRS.build("fold") == Fold()
    assert REPAIRS.build("fold:ridge=0.1,centred=no") == Fold(0.1, "no")


def test_the_ridge_is_what_does_best_on_the_other_half() -> None:
    """With fewer samples than kept inputs a small ridge repeats noise; with many samples it is the better one."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
        with torch.no_grad():
            model[0].weight.mul_(2)
        groups = find_groups(model, torch.randn(1, 6), ["2"]).groups
        plan = plan_of({groups[0].name: tuple(range(0, 40, 4))})
        few, many, unseen = torch.randn(16, 6), torch.randn(2000, 6), torch.randn(500, 6)

    def error(inputs: Tensor, fold: Fold) -> float:
        pruned = prune(model, groups, plan)
        fold(pruned, batches_of(inputs, 8))
        with torch.no_grad():
            return float((pruned.model(unseen) - model(unseen)).square().mean())

    assert error(few, Fold()) < 0.8 * error(few, Fold(ridge=1e-9))
    assert error(many, Fold()) <= 1.05 * min(error(many, Fold(ridge=ridge)) for ridge in (1e-4, 1e-2, 1.0))
