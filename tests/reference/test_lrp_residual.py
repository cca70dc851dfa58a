"""The first unit that lrp-residual gives up, and its cost, against the formula written out sample by sample."""

from __future__ import annotations

import pytest
import torch
from models import Subject, batches_of
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.attribution import attributed
from pxcompress.attribution.composites import parse_composite
from pxcompress.scorers import SCORERS
from pxcompress.types import Group

RIDGE = 1e-3


def _watched(model: nn.Module, name: str, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's input, and the gradients of the predicted logits at its input and output, sample by sample."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for each in inputs.split(1):
        seen: list[Tensor] = []
        module = model.get_submodule(name)
        handle = module.register_forward_hook(lambda module, args, output, seen=seen: seen.extend((args[0], output)))
        logits = model(each.clone().requires_grad_())
        handle.remove()
        before, after = torch.autograd.grad(logits.max(), seen[:2])
        parts.append((seen[0].detach(), before, after))
    values, before, after = (torch.cat(each).double() for each in zip(*parts, strict=True))
    return values, before, after


def _first_cost(subject: Subject, group: Group, metric: str) -> float:
    """min_c of price_c / [(Sigma + lambda I)^-1]_cc for a group with one consumer, a plain convolution."""
    member = group.consumers[0]
    with attributed(subject.model, parse_composite("epsilon"), subject.example) as twin:
        values, before, after = _watched(twin.model, member.module, subject.inputs)
        weight = twin.model.get_submodule(member.module).weight.double()  # type: ignore[operator]
    rows = values.transpose(0, 1).flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    sigma = centred @ centred.T / rows.shape[1]
    inverse = torch.linalg.inv(sigma + RIDGE * sigma.diagonal().mean() * torch.eye(len(sigma)))
    samples = len(values)
    outputs = (after.square().sum((0, 2, 3)) / samples)[:, None, None, None]
    prices = {
        "outputs": (outputs * weight.square()).sum((0, 2, 3)),
        "weights": weight.square().sum((0, 2, 3)),
        "inputs": before.square().sum((0, 2, 3)) / samples,
        "none": torch.ones(len(sigma)),
    }
    return float((prices[metric] / inverse.diagonal()).min())


@pytest.mark.parametrize("metric", ["outputs", "weights", "inputs", "none"])
def test_the_first_cost_is_that_of_the_formula(metric: str) -> None:
    subject = subject_named("flatten_cnn")
    group = next(group for group in subject.groups if group.name == "conv1")
    scores = SCORERS.build(f"lrp-residual:metric={metric}")(
        subject.model, subject.groups, batches_of(subject.inputs, 4)
    )
    assert float(scores["conv1"].min()) == pytest.approx(_first_cost(subject, group, metric), rel=1e-4)
