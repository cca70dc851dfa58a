"""Scores units by their activations, alone or times the weights that read them, whatever the decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.layout.rows import unit_weights
from pxcompress.passes.collect import collect, unit_means
from pxcompress.registry import option
from pxcompress.scorers import SCORERS
from pxcompress.types import Batches, Group, Scorer, Scores


@SCORERS.register("activation")
@dataclass(frozen=True)
class Activation(Scorer):
    """Mean |a| of activations a, or their variance times |w|^2 of the weights that read them (WIFV, as in FLAP)."""

    statistic: str = option(
        "wifv", "mean: E|a|; wifv: Var(a) * sum of squared consumer weights", choices=("wifv", "mean")
    )

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
        """Score all units by forward passes over `batches`, without labels."""
        if self.statistic == "mean":
            return unit_means(model, groups, batches, lambda a, m: a.abs().mean(2))
        means = collect(model, groups, batches, lambda a, m: a.mean(2))
        spread = collect(model, groups, batches, lambda a, m: a.square().mean(2), origin=means)
        return {
            group.name: (spread[group.name].mean(0) * _sum_reader_weights(model, group)).float() for group in groups
        }


def _sum_reader_weights(model: nn.Module, group: Group) -> Tensor:
    """For each unit, the sum of the squared weights that read it, (units,)."""
    weights = [unit_weights(model, member) for member in group.consumers]
    return torch.stack([weight.square().sum(1).double().cpu() for weight in weights if weight is not None]).sum(0)
