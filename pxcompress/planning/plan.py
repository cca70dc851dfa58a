"""Turns scores into a plan: one ranking of all units, cut where the budget is met, or a knapsack.

Pure and deterministic: ties fall by group order, then unit index. Inside a group units go by their scores; by ranking,
the plans of growing ratios are nested as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from pxcompress.errors import BudgetError, InputError
from pxcompress.planning.knapsack import Choice, choose_widths
from pxcompress.planning.limits import ROUNDING, Limits, align_width
from pxcompress.planning.order import KNAPSACK, REMOVED_SCORE, Orders, order_units
from pxcompress.types import Group, Meter, Plan, Price, Scores

MOST_CHOICES = 24
"""Most widths of one group among which the knapsack chooses."""


def check_reachable(groups: Sequence[Group], price: Price, ratio: float, limits: Limits) -> None:
    """Raise an error, before anything is scored, if no plan can remove `ratio` of the dense cost.

    `InputError` for a ratio outside (0, 1), `BudgetError` where even the smallest widths cost more; its message names
    the largest reachable ratio.
    """
    if not 0 < ratio < 1:
        raise InputError(f"ratio is {ratio}; expected a share of the {price.unit} to remove, between 0 and 1")
    problem = f"no plan removes {ratio:.4g} of the {price.unit}"
    if not groups:
        raise BudgetError(f"{problem}: the model has no removable units; see inspect")
    dense, least_cost = price({}), price({group.name: align_width(group, 0, limits) for group in groups})
    if least_cost > (1 - ratio) * dense * (1 + ROUNDING):
        reachable = (
            math.floor((1 - least_cost / dense if dense else 0.0) * 1000) / 1000
        )  # never up: it can be asked for
        unprunable_cost = price({group.name: 0 for group in groups})
        raise BudgetError(
            f"{problem}: the largest reachable ratio is {reachable}, which leaves {_format_amount(least_cost)} of "
            f"{_format_amount(dense)} {price.unit} (round-to {limits.round_to}, at least {limits.min_keep:.0%} of "
            "every group stays; layers that cannot be pruned, or are not to be, take "
            f"{_format_amount(unprunable_cost)} alone)"
        )


def _format_amount(cost: float) -> str:
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.4g}"


def make_plan(groups: Sequence[Group], scores: Scores, price: Price, ratio: float, limits: Limits) -> Plan:
    """The plan that removes at least `ratio` of the dense cost, and as few units as its ranking allows.

    Units whose score is `REMOVED_SCORE` are removed in any case, and ignored when scores are normalised. Raises as
    `check_reachable` does.
    """
    check_reachable(groups, price, ratio, limits)
    orders = order_units(groups, scores, price, limits.normalise)
    dense = price({})
    target = (1 - ratio) * dense
    solve = _solve_knapsack if limits.normalise == KNAPSACK else _cut_ranking
    widths = solve(groups, orders, price, target * (1 + ROUNDING), limits)
    removed_units = {
        group.name: tuple(sorted(orders[group.name][1][: group.units - widths[group.name]].tolist()))
        for group in groups
    }
    return Plan(removed_units, price.budget, price.unit, dense, price(widths), target)


def _cut_ranking(
    groups: Sequence[Group], orders: Orders, meter: Meter, limit: float, limits: Limits
) -> Mapping[str, int]:
    """Group name -> width, when units are removed in one ranking until the cost is at most `limit`."""
    ranking = _rank_units(groups, orders)

    def widths(length: int) -> dict[str, int]:
        removed_counts = {group.name: 0 for group in groups}
        for name in ranking[:length]:
            removed_counts[name] += 1
        return {group.name: align_width(group, group.units - removed_counts[group.name], limits) for group in groups}

    low, high = sum(int((values == REMOVED_SCORE).sum()) for values, _ in orders.values()), len(ranking)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meter(widths(middle)) <= limit else (middle + 1, high)
    return widths(low)


def _rank_units(groups: Sequence[Group], orders: Orders) -> list[str]:
    """Names of groups, one entry for each removable unit, sorted by the score of that unit, lowest first."""
    values = torch.cat([orders[group.name][0].sort(stable=True).values for group in groups])
    names = [group.name for group in groups for _ in range(group.units)]
    return [names[place] for place in torch.argsort(values, stable=True).tolist()]


def _solve_knapsack(
    groups: Sequence[Group], orders: Orders, meter: Meter, limit: float, limits: Limits
) -> Mapping[str, int]:
    """Group name -> width, with a cost of at most `limit` and the least loss of score in all."""
    choices = []
    for group in groups:
        values, order = orders[group.name]
        removed_count = int((values == REMOVED_SCORE).sum())
        aligned_widths = {align_width(group, width, limits) for width in range(group.units + 1 - removed_count)}
        widths = sorted(width for width in aligned_widths if width <= group.units - removed_count) or [
            group.units - removed_count
        ]
        widths = [widths[place] for place in sorted({round(step) for step in _choose_steps(len(widths))})]
        cumulative_saliency = torch.cat([torch.zeros(1, dtype=values.dtype), values[order][removed_count:].cumsum(0)])
        choices.append(
            Choice(
                group.name,
                tuple(widths),
                cumulative_saliency[[group.units - removed_count - w for w in widths]].numpy(),
            )
        )
    return choose_widths(choices, meter, limit)


def _choose_steps(count: int) -> list[float]:
    """At most `MOST_CHOICES` evenly spaced indices below `count`, the first and the last included."""
    step_count = min(count, MOST_CHOICES)
    return [place * (count - 1) / max(step_count - 1, 1) for place in range(step_count)]
