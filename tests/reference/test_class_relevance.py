"""Class relevance against slow versions: one sample at a time, put together by label in a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import CLASSES, Subject
from models import subject as subject_named
from torch import Tensor

from pxcompress.attribution.class_relevance import class_relevance
from pxcompress.layout.rows import members_by_module
from pxcompress.scorers import SCORERS
from pxcompress.state import evaluating
from pxcompress.types import Batch, Group

LABELS = torch.tensor([3, 0, 3, 1, 1, 3])
"""Of the six inputs; the classes 2 and 4 have none."""


def _batches(subject: Subject, size: int) -> list[Batch]:
    return list(zip(subject.inputs.split(size), LABELS.split(size), strict=True))


def _by_label(values: list[np.ndarray]) -> np.ndarray:
    """Means over the samples of each label, (classes, units); zeros where there are none."""
    rows = []
    for label in range(CLASSES):
        own = [value for value, other in zip(values, LABELS.tolist(), strict=True) if other == label]
        rows.append(sum(own) / len(own) if own else np.zeros_like(values[0]))
    return np.stack(rows)


def _gradient_times_input(subject: Subject, group: Group, sample: Tensor, label: int) -> np.ndarray:
    """|sum_p a_p d logit_label / d a_p| of one sample, unit by unit, mean over the tensors that carry the group."""
    seen: list[tuple[Tensor, Tensor]] = []
    with evaluating(subject.model) as model:
        for name, owners in members_by_module([group], "in").items():

            def read(module: torch.nn.Module, args: tuple[Tensor, ...], index: Tensor = owners[0][1].index) -> None:
                if not any(args[0] is tensor for tensor, _ in seen):
                    seen.append((args[0], index))

            model.get_submodule(name).register_forward_pre_hook(read)
        logit = model(sample.clone().requires_grad_())[0, label]
        gradients = torch.autograd.grad(logit, [tensor for tensor, _ in seen])
    cuts = []
    for (tensor, index), gradient in zip(seen, gradients, strict=True):
        product = (tensor * gradient)[0].detach().double()
        cuts.append([abs(sum(float(product[row].sum()) for row in rows)) for rows in index.tolist()])
    return np.array(cuts).mean(0)


def _assert_close(result: Tensor, expected: np.ndarray) -> None:
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=2e-3, atol=1e-5 * expected.max())


@pytest.mark.parametrize("name", ["flatten_cnn", "grouped", "resnet_basic"])
def test_it_is_gradient_times_input_of_the_label_on_relu_networks(name: str) -> None:
    """There epsilon's multipliers are gradients, up to the stabiliser."""
    subject = subject_named(name)
    relevance = class_relevance(subject.model, subject.groups, _batches(subject, 4))
    assert relevance.samples == (1, 2, 0, 3, 0)
    assert list(relevance.units) == [group.name for group in subject.groups]
    for group in subject.groups:
        pairs = zip(subject.inputs.split(1), LABELS.tolist(), strict=True)
        values = [_gradient_times_input(subject, group, sample, label) for sample, label in pairs]
        _assert_close(relevance.units[group.name], _by_label(values))


def test_it_is_lrp_of_each_class_alone(small: Subject) -> None:
    """The scorer on one sample at a time; and on all of them, the mean over classes by their samples."""
    score = SCORERS.build("lrp:target=label")
    relevance = class_relevance(small.model, small.groups, _batches(small, 4))
    alone = [score(small.model, small.groups, [batch]) for batch in _batches(small, 1)]
    together = score(small.model, small.groups, _batches(small, 6))
    weights = torch.tensor(relevance.samples) / sum(relevance.samples)
    for name, values in relevance.units.items():
        _assert_close(values, _by_label([scores[name].numpy() for scores in alone]))
        _assert_close(weights @ values, together[name].numpy())


def test_batches_do_not_matter(small: Subject) -> None:
    expected = class_relevance(small.model, small.groups, _batches(small, 6))
    relevance = class_relevance(small.model, small.groups, _batches(small, 2)[::-1])
    assert relevance.samples == expected.samples
    for name, values in expected.units.items():
        _assert_close(relevance.units[name], values.numpy())
