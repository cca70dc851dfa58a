"""What each class rests on: relevance of units by true label, and the share of it that a plan removes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pxcompress.attribution import attributed, parse_composite
from pxcompress.attribution.relevance import make_start
from pxcompress.passes.collect import collect_by_label
from pxcompress.state import device_of
from pxcompress.types import Batches, ClassRelevance, Group, Plan


def class_relevance(model: nn.Module, groups: Sequence[Group], batches: Batches) -> ClassRelevance:
    """Relevance of every unit for every class k: the mean over samples of label k of |sum over positions of a_p m_p|.

    a is the unit's activation, m its LRP-epsilon multiplier from logit k. One forward and one backward pass for all
    classes, on a copy with BatchNorm folded; on a residual stream the mean over the tensors that carry it. Raises
    `InputError` for labels that are no class of the model.
    """
    inputs, _ = next(iter(batches))
    with attributed(model, parse_composite("epsilon"), inputs[:1]) as twin:
        classes = twin.model(inputs[:1].to(device_of(twin.model))).shape[1]
        start = make_start("logit", "label")
        relevance_by_group, samples = collect_by_label(
            twin.model, groups, batches, lambda a, m: (a * m).sum(2).abs(), start, classes
        )
    units = {name: values.mean(0).float() for name, values in relevance_by_group.items()}
    return ClassRelevance(units, tuple(int(count) for count in samples))


def removed_shares(relevance: ClassRelevance, plan: Plan) -> Tensor:
    """Share of each class's relevance that the units removed by `plan` carried, (classes,) in [0, 1], before repair.

    For class k: the mean over all groups of sum_{u removed} R_k(u) / sum_u R_k(u). A group without relevance for k
    counts as 0, and so does all of a class without samples.
    """
    shares = [
        _share_relevance(values)[:, list(plan.removed.get(name, ()))].sum(1) for name, values in relevance.units.items()
    ]
    return torch.stack(shares).mean(0)


def _share_relevance(values: Tensor) -> Tensor:
    """Relevances (classes, units) divided by the sum of their row, float64; rows of zeros stay zeros."""
    total = values.double().sum(1, keepdim=True)
    return values.double() / torch.where(total > 0, total, 1.0)
