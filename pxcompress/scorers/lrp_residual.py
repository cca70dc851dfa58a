"""Scores units by the relevance of what the others cannot predict: attribution joined with Optimal Brain Surgeon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pxcompress.attribution import attributed
from pxcompress.attribution.composites import parse_composite
from pxcompress.attribution.relevance import STARTS, make_start
from pxcompress.elimination import ConsumerStatistics, eliminate, invert_regularised
from pxcompress.layout.rows import input_layouts
from pxcompress.passes.collect import power
from pxcompress.passes.moments import InputMoments, collect_moments
from pxcompress.passes.ridges import choose_ridge
from pxcompress.registry import option, search_option
from pxcompress.scorers import SCORERS
from pxcompress.types import Axis, Batches, Group, Member, Scorer, Scores

METRICS: Mapping[str, tuple[Axis, bool]] = {
    "outputs": ("out", True),
    "weights": ("out", False),
    "inputs": ("in", True),
    "none": ("in", False),
}
"""Name of a metric -> side of a layer where errors are measured, and whether relevance weights them."""

CHUNK = 2**23
"""Number of weights that are multiplied at a time, which limits the memory for wide layers."""


@SCORERS.register("lrp-residual")
@dataclass(frozen=True)
class LRPResidual(Scorer):
    """Expected squared change of the logit that remains after a unit is folded into the remaining units.

    A unit c of a layer with input covariance Sigma and consumers W costs sum_o w_o |W_oc|^2 / [Sigma_S^-1]_cc, with
    w_o = E_x sum_p m_op^2 at the consumer's output; units go greedily, Sigma^-1 and W are downdated after each. A score
    is the cost at removal, so scores are comparable between layers, in squared logit units. With metric=weights all
    w_o are 1 (Optimal Brain Surgeon); with metric=inputs a unit costs E_x sum_p m_cp^2 / [Sigma_S^-1]_cc, with
    metric=none 1 / [Sigma_S^-1]_cc, as a mean over its consumers.

    What the other units predict of a unit is fitted to one half of the samples and judged on the other, both ways:
    judged on the same samples it would be everything wherever samples are fewer than units.
    """

    composite: str = option(
        "epsilon", "LRP rules by depth: the name of a composite, or the text of one as listed below"
    )
    start: str = search_option(
        option("logit", "relevance with which the target's logit starts the backward pass", choices=tuple(STARTS))
    )
    target: str = option("prediction", "class whose relevance counts", choices=("prediction", "label"))
    metric: str = search_option(
        option(
            "outputs",
            "what an error counts by: the relevance at the outputs of the next layers, their weights alone (OBS), the "
            "relevance at the units themselves, or nothing (redundancy alone)",
            choices=tuple(METRICS),
        )
    )
    follow: bool = search_option(
        option(True, "after each removal, update the remaining units' costs for the weights that took the unit over")
    )
    ridge: float = option(
        0.0,
        "ridge, as a share of the mean variance of a layer's inputs; 0: the best by cross-validation",
        low=0.0,
        high=10.0,
    )

    def __post_init__(self) -> None:
        parse_composite(self.composite)  # an unknown one is found before any work

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches) -> Scores:
        """Score all units by two forward and at most one backward pass, on a copy with BatchNorm folded."""
        consumers_share = METRICS[self.metric][0] == "in"
        return {
            group.name: eliminate(readers, group.units).div(len(group.consumers) if consumers_share else 1).float()
            for group, readers in self.readers(model, groups, batches)
        }

    def readers(
        self, model: nn.Module, groups: Sequence[Group], batches: Batches
    ) -> Iterator[tuple[Group, list[ConsumerStatistics]]]:
        """For each group, statistics of the layers that read it, from which the cost of removal follows.

        Passes over `batches` are those of scoring.
        """
        inputs, _ = next(iter(batches))
        with attributed(model, parse_composite(self.composite), inputs[:1]) as twin:
            layouts = input_layouts(model, groups)
            inputs_of = collect_moments(model, layouts, batches)
            prices = self._compute_prices(twin.model, layouts, batches)

            def readers(member: Member) -> Iterator[ConsumerStatistics]:
                module = twin.model.get_submodule(member.module)
                return self._read_consumer(module, member, inputs_of[member.module], prices[member.module])

            for group in groups:
                yield group, [view for member in group.consumers for view in readers(member)]

    def _compute_prices(
        self, model: nn.Module, layouts: Mapping[str, Tensor], batches: Batches
    ) -> Mapping[str, Tensor]:
        """The weight of an error in every output row, or every input row, of the modules in `layouts`."""
        side, relevant = METRICS[self.metric]
        if relevant:
            return power(model, list(layouts), batches, make_start(self.start, self.target), side=side)
        rows = {name: layout.numel() for name, layout in layouts.items()}
        if side == "out":
            rows = {name: len(model.get_submodule(name).weight) for name in layouts}  # type: ignore[arg-type]
        return {name: torch.ones(count, dtype=torch.float64) for name, count in rows.items()}

    def _read_consumer(
        self, module: nn.Module, member: Member, input_moments: InputMoments, prices: Tensor
    ) -> Iterator[ConsumerStatistics]:
        """Statistics for every convolution group of a layer that reads a unit.

        Errors are on the half that is not fitted.
        """
        for features, price, width in self._list_views(module, member, len(input_moments.whole.mean), prices):
            solutions = _solve(input_moments, features, self.ridge)
            for inverse, error in solutions:
                yield ConsumerStatistics(
                    inverse.clone(), price.clone(), width, self.follow, error.clone(), 1 / len(solutions)
                )

    def _list_views(
        self, module: nn.Module, member: Member, size: int, prices: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """For every convolution group: features (f,), the price of their errors (f, f), and features in a unit.

        `size` is the number of features that the whole module reads.
        """
        weight: Tensor = module.weight.detach()  # type: ignore[operator]
        conv_groups = getattr(module, "groups", 1)
        span = weight.shape[1]
        is_flattened = size < span * conv_groups
        for place, part in enumerate(weight.reshape(*weight.shape[:2], -1).chunk(conv_groups)):
            rows = member.index[(member.index // span) == place].reshape(len(member.index), -1)
            features = torch.arange(len(rows)) if is_flattened else rows.flatten()
            if METRICS[self.metric][0] == "in":
                price = torch.diag(prices[rows].sum(1) if is_flattened else prices[features])
            else:
                columns = part[:, rows.flatten() % span].reshape(len(part), len(features), -1)
                price = _compute_gram(columns, prices.chunk(conv_groups)[place])
            yield features, price, 1 if is_flattened else rows.shape[1]


def _take_part(matrix: Tensor, features: Tensor) -> Tensor:
    return matrix[features][:, features]


def _solve(input_moments: InputMoments, features: Tensor, ridge: float) -> list[tuple[Tensor, Tensor]]:
    """A = (Sigma + lambda I)^-1 of `features` on one half, and A Sigma' A on the other half, for both halves; cached.

    With ridge 0, lambda is chosen so that all other features predict each best, as a share of its variance.
    """
    key = features.numpy().tobytes(), ridge
    if key not in input_moments.solutions:
        pairs = [
            (_take_part(fit.covariance, features), _take_part(check.around(fit.mean), features))
            for fit, check in input_moments.folds or ((input_moments.whole, input_moments.whole),)
        ]
        best = ridge or choose_ridge(partial(_sum_errors, pairs[0][0], pairs[0][1]))
        inverses = [invert_regularised(covariance, best) for covariance, _ in pairs]
        input_moments.solutions[key] = [
            (inverse, inverse @ other_covariance @ inverse)
            for inverse, (_, other_covariance) in zip(inverses, pairs, strict=True)
        ]
    return input_moments.solutions[key]


def _sum_errors(covariance: Tensor, other_covariance: Tensor, ridge: float) -> float:
    """Sum over features of [A Sigma' A]_cc / (A_cc^2 Sigma'_cc), the share of each that the others cannot predict."""
    inverse = invert_regularised(covariance, ridge)
    errors = ((inverse @ other_covariance) * inverse).sum(1) / inverse.diagonal().square()
    return float(
        (errors / other_covariance.diagonal().clamp_min(1e-12 * float(other_covariance.diagonal().max()) + 1e-30)).sum()
    )


def _compute_gram(columns: Tensor, prices: Tensor) -> Tensor:
    """Weighted products of columns, sum_ot w_o c_oit c_ojt, (features, features) float64.

    `columns` are (outputs, features, taps), `prices` w (outputs,).
    """
    total = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64, device=columns.device)
    outputs = max(1, CHUNK // columns[0].numel())
    for part, price in zip(columns.split(outputs), prices.to(columns.device).split(outputs), strict=True):
        scaled_columns = (part.double() * price.sqrt()[:, None, None]).transpose(0, 1).flatten(1)
        total.addmm_(scaled_columns, scaled_columns.T)
    return total
