"""Scores units by Layer-wise Relevance Propagation (Bach et al. 2015): how much of the decision flows through each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from pxcompress.attribution import RelevancePruning, attributed
from pxcompress.attribution.composites import parse_composite
from pxcompress.attribution.relevance import (
    AGGREGATES,
    PRECISIONS,
    STARTS,
    BatchesForAllClasses,
    make_start,
    score_in_precision,
    unit_relevance,
)
from pxcompress.registry import option, search_option
from pxcompress.scorers import SCORERS
from pxcompress.types import Batches, Group, Scorer, Scores


@SCORERS.register("lrp")
@dataclass(frozen=True)
class LRP(Scorer):
    """Mean LRP relevance of a unit, E_x | sum_p a_p m_p |, over inputs x, summed over the unit's positions p.

    a are activations, m the gradients as LRP's rules modify them. `plrp` is the share of relevance that is dropped in
    each layer (PLRP-lambda).
    """

    composite: str = option(
        "epsilon", "LRP rules by depth: the name of a composite, or the text of one as listed below"
    )
    start: str = search_option(
        option("logit", "relevance with which the target's logit starts the backward pass", choices=tuple(STARTS))
    )
    target: str = option(
        "prediction", "class whose relevance counts; only label needs labels", choices=("prediction", "label", "all")
    )
    aggregate: str = search_option(
        option("abs", "over samples with relevance R: mean |R|, mean R, |mean R|, mean R^2", choices=tuple(AGGREGATES))
    )
    plrp: float = option(
        0.0,
        "drop the smallest relevances of each sample and layer, which together hold this share of all",
        low=0.0,
        high=0.9,
    )
    centre: bool = search_option(option(False, "count only what goes beyond the unit's mean activation"))
    autocast: str = option(
        "none",
        "precision of matrix products, an error where scores change by more than 1 %",
        choices=("none", *PRECISIONS),
    )

    def __post_init__(self) -> None:
        parse_composite(self.composite)  # an unknown one is found before any work

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
        """Score all units by one forward and one backward pass over `batches`, on a copy with BatchNorm folded."""
        inputs, _ = next(iter(batches))
        with attributed(model, parse_composite(self.composite), inputs[:1], RelevancePruning(self.plrp)) as twin:
            if self.target == "all":
                batches = BatchesForAllClasses(
                    batches, twin.model(inputs[:1].to(next(twin.model.parameters()).device)).shape[1]
                )
            score = partial(
                unit_relevance,
                twin.model,
                groups,
                start=make_start(self.start, self.target),
                aggregate=self.aggregate,
                centre=self.centre,
            )
            return score_in_precision(self.autocast, twin.model, score, batches)
