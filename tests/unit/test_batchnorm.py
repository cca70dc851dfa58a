from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from models import Subject, batches_of, plan_of, random_plan, snapshot
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.errors import PxError
from pxcompress.graph import prune
from pxcompress.layout.rows import members_by_module, others, removed_rows
from pxcompress.repair.batchnorm import BatchNormStatistics
from pxcompress.types import Batch, Pruned


def _pruned(subject: Subject) -> Pruned:
    return prune(subject.model, subject.groups, random_plan(subject.groups, 1), subject.example)


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("name", ["conv1d", "flatten_cnn", "resnet_basic"])
def test_statistics_are_the_mean_over_batches(name: str, size: int) -> None:
    """Of every batch's mean and unbiased variance at the layer's input; all layers normalise with the batch itself."""
    subject = subject_named(name)
    pruned = _pruned(subject)
    expected = _slow(pruned.model, subject.inputs, size)
    BatchNormStatistics("unit")(pruned, batches_of(subject.inputs, size))
    norms = _norms(pruned.model)
    assert len(norms) == len(expected)
    for norm, (mean, variance) in zip(norms, expected, strict=True):
        assert torch.allclose(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
        assert torch.allclose(norm.running_var, variance, rtol=1e-4, atol=1e-5)
        assert int(norm.num_batches_tracked) == len(subject.inputs) // size


def _slow(model: nn.Module, inputs: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    twin = copy.deepcopy(model).eval()
    norms = _norms(twin)
    seen: list[list[Tensor]] = [[] for _ in norms]
    for place, norm in enumerate(norms):
        norm.running_mean, norm.running_var = None, None  # then batch statistics are used in eval mode, too
        norm.track_running_stats = False
        norm.register_forward_pre_hook(lambda module, args, place=place: seen[place].append(args[0].clone()))
    with torch.no_grad():
        for part in inputs.split(size):
            twin(part)
    result = []
    for parts in seen:
        rows = [part.transpose(0, 1).flatten(1) for part in parts]
        result.append((sum(r.mean(1) for r in rows) / len(rows), sum(r.var(1) for r in rows) / len(rows)))
    return result


def _outputs(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """What every BatchNorm layer makes of its input, (rows, values)."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.update(
                {name: nn.functional.batch_norm(args[0], module.running_mean, module.running_var, eps=module.eps)}
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return {name: value.transpose(0, 1).flatten(1) for name, value in seen.items()}


@pytest.mark.parametrize("name", ["conv1d", "flatten_cnn", "densenet"])
def test_moments_are_those_of_the_dense_model(name: str) -> None:
    """In one batch, all layers before being matched; the variance of a batch is unbiased."""
    subject = subject_named(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = 0.3 * torch.randn(32, *subject.inputs.shape[1:]) + 0.4  # not what the statistics were taken from
    pruned = BatchNormStatistics("dense")(_pruned(subject), batches_of(inputs, 32))
    dense = _outputs(subject.model, inputs)
    owners = members_by_module(subject.groups, "out")
    for name, found in _outputs(pruned.model, inputs).items():
        rows = others(len(dense[name]), removed_rows(owners.get(name, ()), pruned.plan))
        torch.testing.assert_close(found.mean(1), dense[name][rows].mean(1), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(found.std(1), dense[name][rows].std(1), rtol=3e-2, atol=1e-2)


def test_where_nothing_is_gone_matching_changes_nothing() -> None:
    subject = subject_named("resnet_basic")
    pruned = prune(subject.model, subject.groups, plan_of({}), subject.example)
    inputs = torch.cat([subject.inputs] * 4)
    BatchNormStatistics("dense")(pruned, batches_of(inputs, len(inputs)))
    with torch.no_grad():
        torch.testing.assert_close(pruned.model(inputs), subject.model(inputs), rtol=5e-2, atol=5e-2)


def test_only_statistics_change(subject: Subject) -> None:
    pruned = _pruned(subject)
    before = {name: value.clone() for name, value in pruned.model.state_dict().items()}
    repaired = BatchNormStatistics()(pruned, batches_of(subject.inputs, 3))
    changed = {name for name, value in repaired.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in changed} <= {"running_mean", "running_var", "num_batches_tracked"}
    assert len(changed) == 3 * sum(1 for norm in _norms(pruned.model))


@pytest.mark.parametrize("name", ["resnet_basic", "densenet"])
def test_everything_else_is_left_alone(name: str) -> None:
    subject = subject_named(name)
    dense = copy.deepcopy(subject.model).train()
    next(iter(dense.children())).eval()
    untouched = snapshot(dense)
    pruned = prune(dense, subject.groups, random_plan(subject.groups, 1), subject.example)
    for norm in _norms(pruned.model):
        norm.momentum = 0.03
    before = snapshot(pruned.model)[1:]
    repaired = BatchNormStatistics()(pruned, batches_of(subject.inputs, 3))
    assert snapshot(repaired.model)[1:] == before, "modes, momenta, hooks or requires_grad"
    assert snapshot(dense) == untouched
    assert repaired.dense is dense
    assert (repaired.groups, repaired.plan) == (pruned.groups, pruned.plan)


def test_a_model_without_batchnorm_is_returned_as_it_is() -> None:
    subject = subject_named("vit")
    pruned = _pruned(subject)
    before = snapshot(pruned.model)
    assert BatchNormStatistics()(pruned, batches_of(subject.inputs, 3)).model is pruned.model
    assert snapshot(pruned.model) == before


def test_dropout_stays_off() -> None:
    subject = subject_named("flatten_cnn")
    model = copy.deepcopy(subject.model)
    model.pool = nn.Sequential(model.pool, nn.Dropout(0.9))
    model.fc1 = nn.Sequential(nn.BatchNorm1d(54), model.fc1)
    results = []
    for _ in range(2):
        pruned = Pruned(copy.deepcopy(model).train(), model, (), plan_of({}))
        BatchNormStatistics()(pruned, batches_of(subject.inputs, 3))
        results.append(pruned.model.fc1[0].running_mean)
    assert torch.equal(results[0], results[1])


def test_a_last_batch_of_one_does_not_break_batchnorm_over_vectors() -> None:
    """BatchNorm1d over (n, features) cannot take one sample in training mode."""
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        inputs = torch.randn(5, 4)
    pruned = Pruned(copy.deepcopy(model), model, (), plan_of({}))
    BatchNormStatistics("unit")(pruned, batches_of(inputs, 2))
    with torch.no_grad():
        parts = [model[0](part) for part in inputs.split(2)[:2]]
    assert torch.allclose(pruned.model[1].running_mean, sum(part.mean(0) for part in parts) / 2, atol=1e-6)


@pytest.mark.parametrize("size", [0, 1])
def test_without_a_usable_batch_statistics_are_not_thrown_away(size: int) -> None:
    """Mean 0 and variance 1 are no estimates: refuse, or leave (or estimate from single images) what is sensible."""
    subject = subject_named("flatten_cnn")
    pruned = _pruned(subject)
    parts = batches_of(subject.inputs, 1) if size else []
    with contextlib.suppress(PxError):
        BatchNormStatistics()(pruned, parts)
    for norm in _norms(pruned.model):
        assert norm.running_mean.abs().max() > 0
        assert not torch.equal(norm.running_var, torch.ones_like(norm.running_var))


def test_a_failing_batch_leaves_momenta_and_modes() -> None:
    subject = subject_named("flatten_cnn")
    pruned = _pruned(subject)
    before = snapshot(pruned.model)[1:]

    def failing() -> Iterator[Batch]:
        yield subject.inputs[:3], torch.zeros(3, dtype=torch.int64)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        BatchNormStatistics()(pruned, failing())
    assert snapshot(pruned.model)[1:] == before
