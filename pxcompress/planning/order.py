"""The order in which units are removed: makes scores of different groups comparable, and sorts units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pxcompress.types import Group, Meter, Plan, Scores

Normalisation = Callable[[Tensor, Tensor], Tensor]
"""A function from scores and costs, both (units,), of groups ranked together, to comparable scores (units,)."""


def _rank(scores: Tensor, prices: Tensor) -> Tensor:
    """Replace scores by ranks from 0 to 1, ties by index; so every group loses the same share of its units."""
    order = torch.argsort(scores, stable=True)
    ranks = torch.empty_like(scores)
    ranks[order] = (torch.arange(len(scores), dtype=scores.dtype) + 0.5) / len(scores)
    return ranks


def _divide_by(scale: Callable[[Tensor], Tensor]) -> Normalisation:
    """A normalisation that divides scores by a scale, computed from them; if it is zero they stay as they are."""

    def normalise(scores: Tensor, prices: Tensor) -> Tensor:
        size = scale(scores.abs())
        return scores / size if size > 0 else scores

    return normalise


NORMALISATIONS: Mapping[str, Normalisation] = {
    "none": lambda scores, prices: scores,
    "mean": _divide_by(torch.mean),
    "max": _divide_by(torch.max),
    "sum": _divide_by(torch.sum),
    "norm": _divide_by(torch.linalg.vector_norm),
    "cost": lambda scores, prices: scores / prices.clamp_min(1e-12),
    "uniform": _rank,
    "isomorphic": _rank,
    "knapsack": lambda scores, prices: scores,
}
"""Ways to make the scores of different groups comparable, by name.

"cost" divides by what a unit costs, in the budget's unit: saliency for each unit of cost. "isomorphic" ranks groups of
the same form together (Fang et al., https://arxiv.org/abs/2407.04616), the others rank each group by itself. "knapsack"
does not rank: it solves for the widths that fit and lose the least (`knapsack`).
"""

KNAPSACK = "knapsack"

ACROSS_GROUPS = ("none", "cost", KNAPSACK)
"""Normalisations that compare scores of different groups directly, without ranking each group by itself."""

REMOVED_SCORE = -torch.inf
"""Score of a unit that an earlier round of pruning removed."""

Orders = Mapping[str, tuple[Tensor, Tensor]]
"""Group name -> normalised scores (units,), and units in the order of removal."""


def order_units(groups: Sequence[Group], scores: Scores, meter: Meter, normalise: str) -> Orders:
    """The order of removal in every group, with scores made comparable by one of `NORMALISATIONS`."""
    families: dict[object, list[Group]] = {}
    for group in groups:
        families.setdefault(_describe_form(group) if normalise == "isomorphic" else group.name, []).append(group)
    dense = meter({})
    orders = {}
    for family in families.values():
        values = torch.cat([_check_scores(group, scores[group.name]) for group in family])
        prices = [(dense - meter({group.name: group.units - 1}),) * group.units for group in family]
        is_present = values != REMOVED_SCORE
        price = torch.tensor([each for part in prices for each in part], dtype=values.dtype)
        values[is_present] = NORMALISATIONS[normalise](values[is_present], price[is_present])
        for group, part in zip(family, values.split([group.units for group in family]), strict=True):
            orders[group.name] = part, torch.argsort(part, stable=True)
    return orders


def _check_scores(group: Group, scores: Tensor) -> Tensor:
    if scores.shape != (group.units,) or not bool(torch.isfinite(scores[scores != REMOVED_SCORE]).all()):
        raise ValueError(f"scores of {group.name} must be {group.units} finite values; got {tuple(scores.shape)}")
    return scores.double().cpu()


def _describe_form(group: Group) -> object:
    """A value that is equal for groups of the same form: same kind, and same rows of a unit in every member."""
    return group.kind, tuple((member.axis, member.index.shape[1]) for member in group.members)


def find_lowest(groups: Sequence[Group], scores: Scores, rate: float, normalise: str) -> Plan:
    """A plan that removes the lowest share `rate` of all units, ranked globally without floors, as PXP does.

    It is meant for `graph.mask_units`; costs do not count, so "cost" as `normalise` leaves scores as they are.
    """
    ways = NORMALISATIONS[normalise]
    values = torch.cat([ways(scores[group.name].double(), torch.ones(group.units).double()) for group in groups])
    is_removed = torch.zeros(len(values), dtype=torch.bool)
    is_removed[torch.argsort(values, stable=True)[: round(rate * len(values))]] = True
    parts = is_removed.split([group.units for group in groups])
    units = {group.name: tuple(part.nonzero().flatten().tolist()) for group, part in zip(groups, parts, strict=True)}
    return Plan(units, "channels", "units", float(len(values)), float((~is_removed).sum()), (1 - rate) * len(values))
