from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from models import Subject, batches_of, plan_of, random_plan, snapshot
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.graph import find_groups, prune
from pxcompress.layout.rows import complement, list_removed_rows, members_by_module
from pxcompress.passes import matching
from pxcompress.repair.batchnorm import BatchNormStatistics
from pxcompress.state import seeded
from pxcompress.types import Batch, Pruned


def _pruned(subject: Subject) -> Pruned:
    return prune(subject.model, subject.groups, random_plan(subject.groups, 1))


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]


def _unlike_training(subject: Subject, samples: int = 32) -> Tensor:
    """Inputs that are not like those that the statistics were taken from."""
    with seeded(0):
        return 0.3 * torch.randn(samples, *subject.inputs.shape[1:]) + 0.4


def _outputs(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """What every BatchNorm layer makes of its input, before weight and bias, (rows, values)."""
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
def test_moments_are_those_of_the_dense_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch, where every layer sees what the ones before it make of it once they are changed."""
    monkeypatch.setattr(matching, "LARGEST_SCALE", 1e6)
    subject = subject_named(name)
    inputs = _unlike_training(subject)
    pruned = BatchNormStatistics()(_pruned(subject), batches_of(inputs, 32))
    dense = _outputs(subject.model, inputs)
    owners = members_by_module(subject.groups, "out")
    for layer, values in _outputs(pruned.model, inputs).items():
        rows = complement(len(dense[layer]), list_removed_rows(owners.get(layer, ()), pruned.plan))
        torch.testing.assert_close(values.mean(1), dense[layer][rows].mean(1), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(values.std(1), dense[layer][rows].std(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1, 5, 32])
def test_where_nothing_is_gone_nothing_changes(size: int) -> None:
    subject = subject_named("resnet_basic")
    pruned = prune(subject.model, subject.groups, plan_of({}))
    inputs = _unlike_training(subject)
    BatchNormStatistics()(pruned, batches_of(inputs, size))
    with torch.no_grad():
        torch.testing.assert_close(pruned.model(inputs), subject.model(inputs), rtol=1e-4, atol=1e-4)


def test_the_order_of_samples_hardly_counts() -> None:
    """Sorted by class, a batch lacks the variance between classes; the dense model's batch lacks it as well."""
    subject = subject_named("resnet_basic")
    inputs = torch.cat([_unlike_training(subject, 24) + shift for shift in (-2.0, 0.0, 2.0)])
    with seeded(2):
        mixed = inputs[torch.randperm(len(inputs))]
    one, other = (BatchNormStatistics()(_pruned(subject), batches_of(each, 24)).model for each in (inputs, mixed))
    with torch.no_grad():
        dense, sorted_, shuffled = (model(inputs) for model in (subject.model, one, other))
    assert (sorted_ - dense).square().mean() < 1.3 * (shuffled - dense).square().mean()


class _Twice(nn.Module):
    """One BatchNorm layer that runs twice in a forward pass, on inputs of two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.head(self.norm(5 * self.second(x)).relu().mean((2, 3)))


def test_all_calls_of_a_layer_count() -> None:
    with seeded(0):
        model = _Twice().eval()
        inputs = torch.randn(16, 3, 4, 4)
        with torch.no_grad():
            model.norm.running_mean.copy_(torch.randn(8))
            model.norm.running_var.copy_(torch.rand(8) + 0.5)
    groups = find_groups(model, inputs[:1], ["head"]).groups
    pruned = prune(model, groups, plan_of({}))
    BatchNormStatistics()(pruned, batches_of(inputs, 4))
    with torch.no_grad():
        torch.testing.assert_close(pruned.model(inputs), model(inputs), rtol=1e-4, atol=1e-4)


def test_only_statistics_change(subject: Subject) -> None:
    pruned = _pruned(subject)
    before = {name: value.clone() for name, value in pruned.model.state_dict().items()}
    repaired = BatchNormStatistics()(pruned, batches_of(subject.inputs, 3))
    changed = {name for name, value in repaired.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in changed} <= {"running_mean", "running_var"}


@pytest.mark.parametrize("name", ["resnet_basic", "densenet"])
def test_everything_else_is_left_alone(name: str) -> None:
    subject = subject_named(name)
    dense = copy.deepcopy(subject.model).train()
    next(iter(dense.children())).eval()
    untouched = snapshot(dense)
    pruned = prune(dense, subject.groups, random_plan(subject.groups, 1))
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


def test_without_samples_statistics_stay() -> None:
    pruned = _pruned(subject_named("flatten_cnn"))
    before = snapshot(pruned.model)
    BatchNormStatistics()(pruned, [])
    assert snapshot(pruned.model) == before


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
