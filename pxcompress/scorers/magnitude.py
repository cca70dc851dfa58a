"""Scores units by the magnitude of their weights (Li et al. 2017), over coupled layers (DepGraph, Fang et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pxcompress.layout.rows import unit_weights
from pxcompress.registry import option
from pxcompress.scorers import SCORERS
from pxcompress.types import Batches, Group, Scorer, Scores


@SCORERS.register("magnitude")
@dataclass(frozen=True)
class Magnitude(Scorer):
    """Norm of all weights w of a unit in the group's convolutions and linear layers, (sum |w|^p)^(1/p)."""

    p: int = option(2, "order of the norm: 1 or 2", low=1, high=2)

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
        """Score all units from weights; the batches are not read."""
        return {group.name: self._score(model, group) for group in groups}

    def _score(self, model: nn.Module, group: Group) -> torch.Tensor:
        weights = [unit_weights(model, member) for member in group.members]
        powers = [weight.abs().pow(self.p).sum(1) for weight in weights if weight is not None]
        return torch.stack(powers).sum(0).pow(1 / self.p).cpu()
