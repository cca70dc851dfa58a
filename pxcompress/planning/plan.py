"""From scores to a plan: one ranking over all groups, cut where the meter says the budget is met, or a knapsack.

Pure and deterministic: ties fall by group order, then unit index. Inside a group units go by their scores; by ranking,
the plans of growing ratios are nested as a whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from pxcompress.errors import BudgetError, InputError, unknown
from pxcompress.graph import Branches, without
from pxcompress.planning.knapsack import Choice, least_damage
from pxcompress.types import Group, Meter, Plan, Scores

Normalisation = Callable[[Tensor, Tensor], Tensor]
"""Scores and prices, both (units,) of groups that are ranked together -> comparable scores (units,)."""


def _rank(scores: Tensor, prices: Tensor) -> Tensor:
    """Share of the units that rank below, ties by index: equal ratios."""
    order = torch.argsort(scores, stable=True)
    ranks = torch.empty_like(scores)
    ranks[order] = (torch.arange(len(scores), dtype=scores.dtype) + 0.5) / len(scores)
    return ranks


def _over(scale: Callable[[Tensor], Tensor]) -> Normalisation:
    """Divide scores by a scale; a group whose scale is zero stays as it is."""

    def normalise(scores: Tensor, prices: Tensor) -> Tensor:
        size = scale(scores.abs())
        return scores / size if size > 0 else scores

    return normalise


NORMALISATIONS: Mapping[str, Normalisation] = {
    "none": lambda scores, prices: scores,
    "mean": _over(torch.mean),
    "max": _over(torch.max),
    "sum": _over(torch.sum),
    "norm": _over(torch.linalg.vector_norm),
    "cost": lambda scores, prices: scores / prices.clamp_min(1e-12),
    "uniform": _rank,
    "isomorphic": _rank,
    "knapsack": lambda scores, prices: scores,
}
"""How the scores of one group are made comparable with those of another.

"cost" divides by what a unit costs, in the budget's unit: damage for each unit of cost. "isomorphic" ranks groups of
the same form together (Fang et al., https://arxiv.org/abs/2407.04616), the others rank each by itself. "knapsack" does
not rank: it solves for the widths that fit and lose the least (`knapsack`).
"""

KNAPSACK = "knapsack"
CHOICES = 24
"""Widths of one group among which the knapsack chooses, at most."""


GONE = -torch.inf
"""Score of a unit that an earlier round of pruning has removed."""

ROUNDING = 1e-9
"""Share by which products of ratios and counts may be off: 0.1 * 10 is not quite 1."""


@dataclass(frozen=True)
class Limits:
    """What a plan may do: `round_to` aligns the units that stay (channels and neurons), `min_keep` is the least share.

    `floors` are other least shares for the groups whose names their globs fit. One unit of every group stays in any
    case; groups with fewer than 2 * round_to units are not aligned. `branches` may go as a whole all the same, unless
    a floor fits one of their groups, where the knapsack finds that it pays; a ranking leaves them.
    """

    normalise: str = "mean"
    round_to: int = 8
    min_keep: float = 0.1
    floors: Mapping[str, float] = field(default_factory=dict)
    branches: Branches = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.normalise not in NORMALISATIONS:
            raise unknown("normalisation", self.normalise, NORMALISATIONS)
        if self.round_to < 1:
            raise InputError(f"round-to is {self.round_to}; expected 1 (no alignment) or more")
        if not 0 <= self.min_keep < 1:
            raise InputError(f"min-keep is {self.min_keep}; expected a share from 0 up to, but without, 1")

    @property
    def droppable(self) -> Branches:
        """Branches without a floor of their own."""
        held = [glob for glob, share in self.floors.items() if share > 0]
        return {
            name: feeders
            for name, feeders in self.branches.items()
            if self.normalise == KNAPSACK
            and not any(fnmatchcase(group, glob) for group in (name, *feeders) for glob in held)
        }

    def floor(self, group: Group) -> int:
        """Units of `group` that stay in any case."""
        shares = [share for glob, share in self.floors.items() if fnmatchcase(group.name, glob)]
        return max(1, math.ceil(group.units * max(shares, default=self.min_keep) * (1 - ROUNDING)))


def check_reachable(
    groups: Sequence[Group], meter: Meter, ratio: float, limits: Limits, budget: tuple[str, str]
) -> None:
    """Raise, before anything is scored, where no plan can remove `ratio`; `budget` is (name, unit of cost).

    `InputError` for a ratio outside (0, 1), `BudgetError` where even the smallest widths cost more; its message names
    the largest reachable ratio.
    """
    if not 0 < ratio < 1:
        raise InputError(f"ratio is {ratio}; expected a share of the {budget[1]} to remove, between 0 and 1")
    what = f"no plan removes {ratio:.0%} of the {budget[1]}"
    if not groups:
        raise BudgetError(f"{what}: the model has no removable units; see inspect")
    branches = limits.droppable
    narrow = {group.name: 0 if group.name in branches else _aligned(group, 0, limits) for group in groups}
    dense, least = meter({}), meter(without(branches, narrow))
    if least > (1 - ratio) * dense * (1 + ROUNDING):
        reachable = math.floor((1 - least / dense if dense else 0.0) * 1000) / 1000  # never up: it can be asked for
        untouched = meter({group.name: 0 for group in groups})
        raise BudgetError(
            f"{what}: the largest reachable ratio is {reachable}, which leaves {_amount(least)} of {_amount(dense)} "
            f"{budget[1]} (round-to {limits.round_to}, at least {limits.min_keep:.0%} of every group stays; "
            f"layers that cannot be pruned, or are not to be, take {_amount(untouched)} alone)"
        )


def _amount(cost: float) -> str:
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.4g}"


def make_plan(
    groups: Sequence[Group], scores: Scores, meter: Meter, ratio: float, limits: Limits, budget: tuple[str, str]
) -> Plan:
    """The plan that removes at least `ratio` of the dense cost and as few units as its ranking allows.

    Units whose score is `GONE` go in any case, and do not count when scores are normalised. `budget` is
    (name, unit of cost). Raises as `check_reachable` does.
    """
    check_reachable(groups, meter, ratio, limits, budget)
    orders = _orders(groups, scores, meter, limits)
    dense = meter({})
    target = (1 - ratio) * dense
    solve = _knapsack if limits.normalise == KNAPSACK else _cut_ranking
    kept = solve(groups, orders, meter, target * (1 + ROUNDING), limits)
    removed = {
        group.name: tuple(sorted(orders[group.name][1][: group.units - kept[group.name]].tolist())) for group in groups
    }
    return Plan(removed, budget[0], budget[1], dense, meter(kept), target)


Orders = Mapping[str, tuple[Tensor, Tensor]]
"""Normalised scores (units,) of every group, and its units in the order in which they would go."""


def _cut_ranking(
    groups: Sequence[Group], orders: Orders, meter: Meter, enough: float, limits: Limits
) -> Mapping[str, int]:
    """Widths after the shortest beginning of one ranking of all units that costs at most `enough`."""
    ranking = _ranking(groups, orders)

    def widths(length: int) -> dict[str, int]:
        taken = {group.name: 0 for group in groups}
        for name in ranking[:length]:
            taken[name] += 1
        return {group.name: _aligned(group, group.units - taken[group.name], limits) for group in groups}

    low, high = sum(int((values == GONE).sum()) for values, _ in orders.values()), len(ranking)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meter(widths(middle)) <= enough else (middle + 1, high)
    return widths(low)


def _knapsack(
    groups: Sequence[Group], orders: Orders, meter: Meter, enough: float, limits: Limits
) -> Mapping[str, int]:
    """Widths that cost at most `enough` and lose the least score in all; a branch is gone with its last group."""
    choices, branches = [], limits.droppable
    for group in groups:
        values, order = orders[group.name]
        gone = int((values == GONE).sum())
        every = {_aligned(group, width, limits) for width in range(group.units + 1 - gone)}
        widths = sorted(width for width in every if width <= group.units - gone) or [group.units - gone]
        widths = [widths[place] for place in sorted({round(step) for step in _steps(len(widths))})]
        widths = [0, *widths] if group.name in branches else widths
        lost = torch.cat([torch.zeros(1, dtype=values.dtype), values[order][gone:].cumsum(0)])
        choices.append(Choice(group.name, tuple(widths), lost[[group.units - gone - w for w in widths]].numpy()))
    return without(branches, least_damage(choices, lambda kept: meter(without(branches, kept)), enough))


def _steps(count: int) -> list[float]:
    """At most `CHOICES` places among `count`, the first and the last with them."""
    taken = min(count, CHOICES)
    return [place * (count - 1) / max(taken - 1, 1) for place in range(taken)]


def lowest(groups: Sequence[Group], scores: Scores, rate: float, normalise: str) -> Plan:
    """The lowest `rate` of all units, ranked globally, without a floor for any group: PXP's order of pruning.

    Meant for `graph.masked`; prices do not count, so that normalise=cost leaves scores as they are.
    """
    ways = NORMALISATIONS[normalise]
    values = torch.cat([ways(scores[group.name].double(), torch.ones(group.units).double()) for group in groups])
    gone = torch.zeros(len(values), dtype=torch.bool)
    gone[torch.argsort(values, stable=True)[: round(rate * len(values))]] = True
    parts = gone.split([group.units for group in groups])
    units = {group.name: tuple(part.nonzero().flatten().tolist()) for group, part in zip(groups, parts, strict=True)}
    return Plan(units, "channels", "units", float(len(values)), float((~gone).sum()), (1 - rate) * len(values))


def _orders(groups: Sequence[Group], scores: Scores, meter: Meter, limits: Limits) -> Orders:
    families: dict[object, list[Group]] = {}
    for group in groups:
        families.setdefault(_form(group) if limits.normalise == "isomorphic" else group.name, []).append(group)
    dense = meter({})
    orders = {}
    for family in families.values():
        values = torch.cat([_checked(group, scores[group.name]) for group in family])
        prices = [(dense - meter({group.name: group.units - 1}),) * group.units for group in family]
        there = values != GONE
        price = torch.tensor([each for part in prices for each in part], dtype=values.dtype)
        values[there] = NORMALISATIONS[limits.normalise](values[there], price[there])
        for group, part in zip(family, values.split([group.units for group in family]), strict=True):
            orders[group.name] = part, torch.argsort(part, stable=True)
    return orders


def _checked(group: Group, scores: Tensor) -> Tensor:
    if scores.shape != (group.units,) or not bool(torch.isfinite(scores[scores != GONE]).all()):
        raise ValueError(f"scores of {group.name} must be {group.units} finite values; got {tuple(scores.shape)}")
    return scores.double().cpu()


def _form(group: Group) -> object:
    """What two groups share when they play the same part in their blocks: kind, and rows of a unit in every member."""
    return group.kind, tuple((member.axis, member.index.shape[1]) for member in group.members)


def _ranking(groups: Sequence[Group], orders: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Group names, one entry for each removable unit, lowest score first."""
    values = torch.cat([orders[group.name][0].sort(stable=True).values for group in groups])
    names = [group.name for group in groups for _ in range(group.units)]
    return [names[place] for place in torch.argsort(values, stable=True).tolist()]


def _aligned(group: Group, width: int, limits: Limits) -> int:
    """`width` rounded to the nearest multiple of `round_to` (ties upwards), within the group's floor and size."""
    if width == group.units:
        return width
    floor = limits.floor(group)
    step = limits.round_to
    if group.kind == "head" or group.units < 2 * step:
        return max(width, floor)
    rounded = (2 * width + step) // (2 * step) * step
    return min(group.units, max(rounded, -(-floor // step) * step))


def least_width(group: Group, limits: Limits) -> int:
    """The least width, aligned, that a plan may leave."""
    return _aligned(group, 0, limits)


def narrowest(group: Group, width: int, limits: Limits) -> int:
    """The least aligned width, above zero, that has room for `width` units."""
    if group.kind == "head" or group.units < 2 * limits.round_to:
        return max(1, width)
    return min(group.units, max(1, -(-width // limits.round_to)) * limits.round_to)


def plan_to_json(plan: Plan, groups: Sequence[Group]) -> str:
    """plan.json: the plan and the sizes of the groups it was made for."""
    sizes = {group.name: {"kind": group.kind, "units": group.units} for group in groups}
    return json.dumps({**asdict(plan), "groups": sizes}, indent=1)


def planned_groups(text: str, groups: Sequence[Group]) -> list[Group]:
    """Those of `groups` that a plan.json was made for."""
    try:
        names = json.loads(text)["groups"]
        return [group for group in groups if group.name in names]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"not a plan ({type(error).__name__}: {error}); expected what plan.json holds") from error


def plan_from_json(text: str, groups: Sequence[Group]) -> Plan:
    """Read plan.json back; `InputError` where its groups are not those of the model at hand."""
    try:
        content = json.loads(text)
        made_for = content.pop("groups")
        content["removed"] = {name: tuple(units) for name, units in content["removed"].items()}
        plan = Plan(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"not a plan ({type(error).__name__}: {error}); expected what plan.json holds") from error
    if made_for != {group.name: {"kind": group.kind, "units": group.units} for group in groups}:
        raise InputError("the plan was made for other groups than this model has; rebuild it with the same versions")
    sizes = {group.name: group.units for group in groups}
    for name, units in plan.removed.items():
        legal = isinstance(units, tuple) and all(type(unit) is int and 0 <= unit < sizes.get(name, 0) for unit in units)
        if not legal or len(set(units)) != len(units):
            raise InputError(f"the plan removes units of {name!r} that it cannot: {str(units)[:60]}")
    return plan
