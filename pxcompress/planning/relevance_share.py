"""Plans by scores alone: in each group the lowest units are removed that together hold a given share of its scores.

Scale-free, as pruned LRP drops relevances (see `attribution.plrp`): no budget says when to stop, and no group is
compared with another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pxcompress.errors import BudgetError
from pxcompress.planning.limits import ROUNDING, Limits, align_width, narrowest
from pxcompress.types import Group, Plan, Price, Scores


def plan_by_share(groups: Sequence[Group], scores: Scores, price: Price, share: float, limits: Limits) -> Plan:
    """The plan that removes, in every group, the lowest units that together hold at most `share` of its scores.

    Widths are rounded upwards, so that never more than the share is removed; floors hold. Raises `BudgetError` if
    nothing can be removed.
    """
    removed_units: dict[str, tuple[int, ...]] = {}
    for group in groups:
        values = scores[group.name].double().cpu()
        order = torch.argsort(values, stable=True)
        cumulative_scores = values[order].abs().cumsum(0)
        units_above_share = int((cumulative_scores > share * cumulative_scores[-1] * (1 + ROUNDING)).sum())
        width = max(narrowest(group, units_above_share, limits), align_width(group, 0, limits))
        removed_units[group.name] = tuple(sorted(order[: group.units - width].tolist()))
    if not any(removed_units.values()):
        raise BudgetError(
            f"no unit goes: the lowest of every layer hold more than {share:g} of its scores, or too few to leave a "
            f"multiple of {limits.round_to}; ask for a larger --relevance-share, or a smaller --round-to"
        )
    cost = price({group.name: group.units - len(removed_units[group.name]) for group in groups})
    return Plan(removed_units, price.budget, price.unit, price({}), cost, cost)
