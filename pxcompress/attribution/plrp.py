"""Pruned Layer-wise Relevance Propagation (PLRP; Yanez Sarmiento et al. 2024, https://arxiv.org/abs/2404.14271).

Wherever a layer has shared relevance among its inputs, the smallest of every sample that together hold a share p of
the mass of their sign are dropped: p of the positive mass, p / 2 of the negative. PLRP-lambda enlarges what is left, so
that the mass of each sign stays; PLRP-M lets the rule share the relevance once more, among the inputs that are left.

The hidden layers of the paper are the inputs of all convolutions and linear layers but the first one: where a tensor
has several readers, as on a residual stream, each prunes what it hands back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pxcompress.attribution.layers import Layer
from pxcompress.attribution.rules import Rule
from pxcompress.errors import InputError, unknown

LARGEST_RATIO = 2.0
"""PLRP-M: upper bound on z / z', the factor by which the output of the surviving inputs, z', is scaled to the whole z.

Without a bound this grows without limit where contributions of opposite signs cancel, layer after layer.
"""


@dataclass(frozen=True)
class RelevancePruning:
    """Which relevances are dropped: the smallest, up to `share` of the positive mass and half that of the negative.

    `variant`, one of `VARIANTS`, says how those that stay make up for it.
    """

    share: float
    variant: str = "lambda"

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise InputError(f"share of pruned relevance is {self.share}; expected 0 or more and less than 1")
        if self.variant not in VARIANTS:
            raise unknown("variant of pruned relevance", self.variant, VARIANTS)

    def rule(self, rule: Rule) -> Rule:
        """`rule` with this pruning applied to the relevance that it passes on; the rule itself if the share is 0."""
        return PrunedRule(rule, self) if self.share else rule


@dataclass(frozen=True)
class PrunedRule(Rule):
    """An LRP rule that wraps another one and passes on only its largest relevances."""

    rule: Rule
    pruning: RelevancePruning

    def multiplier(self, layer: Layer, a: Tensor | None, z: Tensor, m: Tensor, shape: torch.Size) -> Tensor:
        """The wrapped rule's multiplier without the smallest relevances."""
        assert a is not None
        multiplier = self.rule.multiplier(layer, a, z, m, shape)
        relevance = layer.by_sample(a * multiplier)
        survives = find_surviving(relevance, self.pruning.share)
        return VARIANTS[self.pruning.variant](self.rule, layer, (a, z, m, multiplier), relevance, survives)

    def __str__(self) -> str:
        return str(self.rule)


def find_surviving(relevance: Tensor, share: float) -> Tensor:
    """Mask (samples, elements) of the relevances that stay.

    Dropped are the smallest that hold `share` of the positive mass, and half of that share of the negative. Elements
    without relevance are dropped. What is dropped never holds more than the share, so the largest of each sign stays.
    """
    survives = torch.zeros_like(relevance, dtype=torch.bool)
    for values, part in ((relevance.clamp(min=0), share), (relevance.clamp(max=0).neg_(), share / 2)):
        sizes, order = values.sort(1)
        cumulative_mass = sizes.cumsum(1, dtype=torch.float64)
        is_large = (cumulative_mass > part * cumulative_mass[:, -1:]) & (sizes > 0)
        survives |= torch.zeros_like(survives).scatter_(1, order, is_large)
    return survives


_LayerValues = tuple[Tensor, Tensor, Tensor, Tensor]
"""A layer's input a, output z, multiplier m of the output, and the rule's multiplier of the input, in this order."""


def _rescale_survivors(rule: Rule, layer: Layer, values: _LayerValues, relevance: Tensor, survives: Tensor) -> Tensor:
    """PLRP-lambda: scale the surviving relevances, each sign by itself, so that the mass stays as before."""
    scale = torch.zeros_like(relevance)
    for positive in (True, False):
        sign = relevance > 0 if positive else relevance < 0
        mass, surviving_mass = (
            torch.where(mask, relevance, 0.0).sum(1, keepdim=True, dtype=torch.float64)
            for mask in (sign, sign & survives)
        )
        scale += (sign & survives) * (mass / surviving_mass.masked_fill(surviving_mass == 0, 1.0)).to(scale)
    a, *_, multiplier = values
    return multiplier * layer.from_samples(scale, a.shape)


def _share_again(rule: Rule, layer: Layer, values: _LayerValues, relevance: Tensor, survives: Tensor) -> Tensor:
    """PLRP-M: apply the rule to the surviving inputs a' and their outputs z' = W a' + b, which get all the relevance of
    z.
    """
    a, z, m, _ = values
    mask = layer.from_samples(survives, a.shape)
    surviving_inputs = a * mask
    surviving_outputs = layer.forward(surviving_inputs, layer.weight, layer.bias)
    ratio = (z / surviving_outputs).nan_to_num_(0.0).clamp_(-LARGEST_RATIO, LARGEST_RATIO)
    return rule.multiplier(layer, surviving_inputs, surviving_outputs, m * ratio, a.shape) * mask


VARIANTS: Mapping[str, Callable[[Rule, Layer, _LayerValues, Tensor, Tensor], Tensor]] = {
    "lambda": _rescale_survivors,
    "m": _share_again,
}
"""Functions for PLRP-lambda and PLRP-M, by name: how surviving relevances are computed anew."""
