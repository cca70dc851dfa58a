"""Repairs that only set means and variances right."""

from __future__ import annotations

import pytest
import torch
from models import Subject, batches_of, plan_of, random_plan
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.graph import find_groups, prune
from pxcompress.layout.consumers import find_consumers
from pxcompress.layout.rows import rows_first
from pxcompress.repair.mean_absorption import MeanAbsorption
from pxcompress.repair.variance_matching import VarianceMatching
from pxcompress.state import seeded


def _moments(model: nn.Module, name: str, inputs: Tensor) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda module, args, output: seen.append(rows_first(output, module)))
    with torch.no_grad():
        model(inputs)
    handle.remove()
    rows = seen[0].double()
    return rows.mean((0, 2)), rows.var((0, 2), correction=0)


def test_constant_units_are_absorbed_exactly() -> None:
    with seeded(0):
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, groups=1), nn.Flatten(), nn.Linear(5, 2)
        )
        inputs = torch.randn(8, 3, 5, 5)
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 3.0
    groups = find_groups(model.eval(), inputs[:1], ["4"]).groups
    pruned = prune(model, groups, plan_of({"0": (2,)}))
    assert not torch.allclose(pruned.model(inputs), model(inputs))
    MeanAbsorption()(pruned, batches_of(inputs, 4))
    torch.testing.assert_close(pruned.model(inputs), model(inputs))


@pytest.mark.parametrize("name", ["flatten_cnn", "grouped", "vit"])
def test_outputs_of_every_consumer_get_their_moments_back(name: str) -> None:
    """In one batch every layer's scale is that of the whole data, so that the moments agree in the end."""
    subject: Subject = subject_named(name)
    with seeded(1):
        inputs = torch.randn(24, *subject.inputs.shape[1:])
    pruned = prune(subject.model, subject.groups, random_plan(subject.groups, 2))
    VarianceMatching()(pruned, batches_of(inputs, 24))
    for layer in find_consumers(pruned):
        mean, variance = _moments(pruned.model, layer.name, inputs)
        wanted_mean, wanted_variance = _moments(subject.model, layer.name, inputs)
        torch.testing.assert_close(mean, wanted_mean[layer.outputs], rtol=1e-3, atol=1e-4)
        live = variance > 1e-9
        torch.testing.assert_close(variance[live], wanted_variance[layer.outputs][live], rtol=1e-2, atol=1e-6)


def test_layers_in_front_of_batchnorm_are_left_to_it() -> None:
    subject = subject_named("resnet_basic")
    pruned = prune(subject.model, subject.groups, random_plan(subject.groups, 2))
    before = {name: value.clone() for name, value in pruned.model.state_dict().items()}
    VarianceMatching()(pruned, batches_of(subject.inputs, 4))
    after = pruned.model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {"fc.weight", "fc.bias"}
