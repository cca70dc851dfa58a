"""Scores units by a first-order Taylor expansion of the loss (Molchanov et al. 2017): activation x gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from pxcompress.attribution import attributed
from pxcompress.attribution.relevance import AGGREGATES, STARTS, make_start, unit_relevance
from pxcompress.registry import option
from pxcompress.scorers import SCORERS
from pxcompress.types import Batches, Group, Scorer, Scores


@SCORERS.register("taylor")
@dataclass(frozen=True)
class Taylor(Scorer):
    """Change of the cross-entropy when a unit is zeroed, to first order: E_x | sum_p a_p dL/da_p |."""

    target: ClassVar[str] = "label"
    start: str = option("loss", "function of the logits whose gradient is taken", choices=tuple(STARTS))
    aggregate: str = option(
        "abs", "over samples with change R: mean |R|, mean R, |mean R|, mean R^2", choices=tuple(AGGREGATES)
    )

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
        """Score all units by gradients of the loss of the labels, which it needs."""
        inputs, _ = next(iter(batches))
        with attributed(model, None, inputs[:1]) as twin:
            start = make_start(self.start, self.target)
            return unit_relevance(twin.model, groups, batches, start, aggregate=self.aggregate)
