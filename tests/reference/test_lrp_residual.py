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
    """The least, over units c, of price_c E[(x_c - b x_others)^2] for a group with one consumer, a plain convolution.

    b is the ridge regression on one half of the samples, the error that on the other, as a mean over both ways.
    """
    member = group.consumers[0]
    with attributed(subject.model, parse_composite("epsilon"), subject.example) as twin:
        values, before, after = _watched(twin.model, member.module, subject.inputs)
        weight = twin.model.get_submodule(member.module).weight.double()  # type: ignore[operator]
    samples = len(values)
    first = torch.arange(samples) // 4 % 2 == 0
    halves = [values[chosen].transpose(0, 1).flatten(1) for chosen in (first, ~first)]
    errors = sum(_left(fit, check) for fit, check in (halves, halves[::-1])) / 2
    outputs = (after.square().sum((0, 2, 3)) / samples)[:, None, None, None]
    prices = {
        "outputs": (outputs * weight.square()).sum((0, 2, 3)),
        "weights": weight.square().sum((0, 2, 3)),
        "inputs": before.square().sum((0, 2, 3)) / samples,
        "none": torch.ones(len(errors)),
    }
    return float((prices[metric] * errors).min())


def _left(fit: Tensor, check: Tensor) -> Tensor:
    """Mean squared error, on `check`, of every row predicted from all others, as `fit` says, (rows,)."""
    mean = fit.mean(1, keepdim=True)
    sigma = (fit - mean) @ (fit - mean).T / fit.shape[1]
    sigma += RIDGE * sigma.diagonal().mean() * torch.eye(len(sigma))
    errors = []
    for row in range(len(sigma)):
        rest = [other for other in range(len(sigma)) if other != row]
        weights = torch.linalg.solve(sigma[rest][:, rest], sigma[rest, row])
        errors.append(((check - mean)[row] - weights @ (check - mean)[rest]).square().mean())
    return torch.stack(errors)


@pytest.mark.parametrize("metric", ["outputs", "weights", "inputs", "none"])
def test_the_first_cost_is_that_of_the_formula(metric: str) -> None:
    subject = subject_named("flatten_cnn")
    group = next(group for group in subject.groups if group.name == "conv1")
    scores = SCORERS.build(f"lrp-residual:metric={metric},ridge={RIDGE}")(
        subject.model, subject.groups, batches_of(subject.inputs, 2)
    )
    assert float(scores["conv1"].min()) == pytest.approx(_first_cost(subject, group, metric), rel=1e-4)
