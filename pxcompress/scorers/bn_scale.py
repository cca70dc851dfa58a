"""Scores units by the scale of the BatchNorm behind them (network slimming, Liu et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pxcompress.scorers import SCORERS
from pxcompress.scorers.magnitude import Magnitude
from pxcompress.types import Batches, Group, Scorer, Scores


@SCORERS.register("bn-scale")
@dataclass(frozen=True)
class BatchNormScale(Scorer):
    """Mean |gamma| of the BatchNorm layers on a unit; in groups without BatchNorm, the magnitude of the weights."""

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
        """Score all units from weights; the batches are not read."""
        instead = Magnitude()(model, [group for group in groups if not _find_scales(model, group)], batches)
        return {
            group.name: torch.stack(scales).mean(0).cpu()
            if (scales := _find_scales(model, group))
            else instead[group.name]
            for group in groups
        }


def _find_scales(model: nn.Module, group: Group) -> list[Tensor]:
    """|gamma| of every unit, (units,), for each BatchNorm among the group's members."""
    modules = dict(model.named_modules())
    return [
        module.weight.detach()[member.index].abs().mean(1).float()
        for member in group.members
        if isinstance(module := modules.get(member.module), _BatchNorm) and module.affine
    ]
