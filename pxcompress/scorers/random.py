"""Random scores, which every other scorer must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pxcompress.scorers import SCORERS
from pxcompress.types import Batches, Group, Scorer, Scores


@SCORERS.register("random")
@dataclass(frozen=True)
class Random(Scorer):
    """Random scores, uniform, from PyTorch's generator, which `--seed` seeds."""

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
        """Score all units by independent random values in [0, 1)."""
        return {group.name: torch.rand(group.units) for group in groups}
