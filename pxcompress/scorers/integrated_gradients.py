"""Scores units by integrated gradients (Sundararajan et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.attribution import attributed
from pxcompress.attribution.relevance import make_start
from pxcompress.errors import InputError
from pxcompress.models.adapter import has_whole_numbers
from pxcompress.passes.collect import unit_means
from pxcompress.registry import option
from pxcompress.scorers import SCORERS
from pxcompress.types import Batch, Batches, Group, Scorer, Scores

INPUTS_TOGETHER = 64
"""Inputs in one forward pass, counting each step of a path."""


@dataclass(frozen=True)
class _Paths:
    """Batches of whole paths: for every sample the zero input, `steps` midpoints, and the sample itself."""

    batches: Batches
    steps: int

    def __iter__(self) -> Iterator[Batch]:
        middle = (torch.arange(self.steps) + 0.5) / self.steps
        place = torch.cat([torch.zeros(1), middle, torch.ones(1)])
        size = max(1, INPUTS_TOGETHER // len(place))
        for inputs, labels in self.batches:
            for part, target in zip(inputs.split(size), labels.split(size), strict=True):
                scale = place.to(part).reshape(1, -1, *[1] * (part.dim() - 1))
                path = part.unsqueeze(1) * scale
                yield path.flatten(0, 1), target.repeat_interleave(len(place))


@SCORERS.register("integrated-gradients")
@dataclass(frozen=True)
class IntegratedGradients(Scorer):
    """Change of a unit's activation from the zero input, times the mean gradient of the logit on the path.

    E_x | sum_p (a_p(x) - a_p(0)) mean of d logit / da_p |. Zero is the mean image after normalisation. The path is a
    straight line in input space, midpoint rule.
    """

    steps: int = option(20, "points of the path", low=1, high=1000)
    target: str = option("label", "class whose logit is explained", choices=("label", "prediction"))

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
        """Score all units; takes `steps` + 2 forward and backward passes for each sample.

        Raises `InputError` for a model of whole numbers, between which there is no path.
        """
        if has_whole_numbers(model):
            raise InputError(
                "integrated-gradients goes from zero to an input, but the model takes whole numbers, such as "
                "tokens, which have nothing between them; take another scorer, such as taylor"
            )
        points = self.steps + 2

        def conductance(activation: Tensor, multiplier: Tensor) -> Tensor:
            if len(activation) % points:  # the same for all inputs: its baseline is zero, as the input's is
                return (activation * multiplier).sum(2).abs()
            path = activation.unflatten(0, (-1, points))
            gradient = multiplier.unflatten(0, (-1, points))[:, 1:-1].mean(1)
            return ((path[:, -1] - path[:, 0]) * gradient).sum(2).abs()

        inputs, _ = next(iter(batches))
        with attributed(model, None, inputs[:1]) as twin:
            paths, start = _Paths(batches, self.steps), make_start("logit", self.target)
            return unit_means(twin.model, groups, paths, conductance, start)
