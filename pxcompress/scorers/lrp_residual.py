"""Relevance of what the kept units cannot predict: attribution joined with Optimal Brain Surgeon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.attribution import attributed
from pxcompress.attribution.composites import parse_composite
from pxcompress.collect import input_layouts, moments, output_power
from pxcompress.elimination import Reader, eliminate, regularised_inverse
from pxcompress.registry import option
from pxcompress.relevance import STARTS, started
from pxcompress.scorers import SCORERS
from pxcompress.types import Batches, Group, Member, Scores


@SCORERS.register("lrp-residual")
@dataclass(frozen=True)
class LRPResidual:
    """Expected squared change of the logit that remains after a unit was folded into the units that stay.

    A unit c of a layer with input covariance Sigma and consumers W costs sum_o w_o |W_oc|^2 / [Sigma_S^-1]_cc, with
    w_o = E_x sum_p m_op^2 at the consumer's output; units go greedily, Sigma^-1 and W are downdated after each. A score
    is the cost at removal, so scores are comparable between layers, in squared logit units.
    """

    composite: str = option("epsilon", "rules that give the multipliers m: a preset's name or a composite's text")
    start: str = option("logit", "relevance that the target starts with", choices=tuple(STARTS))
    target: str = option("prediction", "class whose relevance counts", choices=("prediction", "label"))
    weighting: str = option("relevance", "outputs weighted by m^2, or all alike (OBS)", choices=("relevance", "none"))
    follow: bool = option(True, "correct consumer weights for earlier folds")
    ridge: float = option(
        1e-3, "ridge, as a share of the mean variance of a layer's inputs", low=0.0, high=1.0, log=True
    )

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
        """Two forward passes and one backward pass over `batches`, on a copy with BatchNorm folded."""
        inputs, _ = next(iter(batches))
        with attributed(model, parse_composite(self.composite), inputs[:1]) as twin:
            layouts = input_layouts(twin.model, groups)
            statistics = moments(twin.model, layouts, batches)
            power: Mapping[str, Tensor] = {}
            if self.weighting == "relevance":
                power = output_power(twin.model, list(layouts), batches, started(self.start, self.target))
            covariances = {name: found.covariance for name, found in statistics.items()}
            return {
                group.name: eliminate(
                    [
                        reader
                        for member in group.consumers
                        for reader in self._readers(
                            twin.model.get_submodule(member.module),
                            member,
                            covariances[member.module],
                            power.get(member.module),
                        )
                    ],
                    group.units,
                ).float()
                for group in groups
            }

    def _readers(self, module: nn.Module, member: Member, covariance: Tensor, power: Tensor | None) -> Iterator[Reader]:
        """A consumer's view of the group, one for every group of a grouped convolution."""
        weight: Tensor = module.weight.detach().double()  # type: ignore[operator]
        conv_groups = getattr(module, "groups", 1)
        flattened = len(covariance) < weight.shape[1] * conv_groups
        span = weight.shape[1]
        for place, part in enumerate(weight.reshape(*weight.shape[:2], -1).chunk(conv_groups)):
            inside = (member.index // span) == place
            rows = member.index[inside].reshape(len(member.index), -1) % span
            columns = part[:, rows.flatten()].reshape(len(part), -1, rows.shape[1] if flattened else part.shape[2])
            scale = torch.ones(len(part)).to(part) if power is None else power.chunk(conv_groups)[place]
            matrix = torch.einsum("o,oit,ojt->ij", scale, columns, columns)
            features = torch.arange(len(rows)) if flattened else rows.flatten() + place * span
            inverse = regularised_inverse(covariance[features][:, features], self.ridge)
            yield Reader(inverse, matrix, width=1 if flattened else rows.shape[1], follow=self.follow)
