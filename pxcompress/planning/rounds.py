"""Pruning in several rounds: which units remain after a round, and how the next round continues.

Plans stay in terms of the dense model throughout, so that one plan says what is gone; a round is carried out on the
slim model as the round before left it, repaired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pxcompress.graph import prune
from pxcompress.layout.rows import list_removed_rows, members_by_module
from pxcompress.planning.order import REMOVED_SCORE
from pxcompress.types import Axis, Group, Member, Plan, Pruned, Scores

AXES: tuple[Axis, ...] = ("in", "out")


def list_ratios(ratio: float, rounds: int) -> tuple[float, ...]:
    """Pruning ratio after each round, of the dense cost; every round removes the same share of what remains."""
    return (*(1 - (1 - ratio) ** (turn / rounds) for turn in range(1, rounds)), ratio)


def groups_left(pruned: Pruned) -> tuple[Group, ...]:
    """The groups of the slim model: remaining units only, with the rows where these are now."""
    rows: dict[tuple[str, Axis], Tensor] = {}
    for axis in AXES:
        for module, owners in members_by_module(pruned.groups, axis).items():
            rows[module, axis] = list_removed_rows(owners, pruned.plan)

    def move(member: Member, kept_units: list[int]) -> Member:
        index = member.index[kept_units]
        return replace(member, index=index - torch.searchsorted(rows[member.module, member.axis], index))

    remaining_groups = []
    for group in pruned.groups:
        kept_units = pruned.plan.kept(group)
        remaining_groups.append(
            replace(group, units=len(kept_units), members=tuple(move(member, kept_units) for member in group.members))
        )
    return tuple(remaining_groups)


def spread_scores(scores: Scores, pruned: Pruned) -> Scores:
    """Scores of the slim model's units, placed at their dense positions; removed units get `REMOVED_SCORE`."""
    dense_scores = {}
    for group in pruned.groups:
        dense_scores[group.name] = torch.full((group.units,), REMOVED_SCORE)
        dense_scores[group.name][pruned.plan.kept(group)] = scores[group.name].float().cpu()
    return dense_scores


def plan_step(pruned: Pruned, plan: Plan) -> Plan:
    """The plan, in numbers of the slim model's units, for what `plan` removes beyond `pruned.plan`.

    `plan` is a plan for the dense model.
    """
    removed_places = {}
    for group in pruned.groups:
        planned_units = set(plan.removed.get(group.name, ()))
        removed_places[group.name] = tuple(
            place for place, unit in enumerate(pruned.plan.kept(group)) if unit in planned_units
        )
    return replace(plan, removed=removed_places, cost_dense=pruned.plan.cost_planned)


def prune_further(pruned: Pruned, remaining_groups: Sequence[Group], plan: Plan) -> Pruned:
    """Remove from the slim model the units that `plan`, for the dense model, removes beyond `pruned.plan`.

    `remaining_groups` are the slim model's groups. The result compares with the slim model before this step; its
    `first` compares with the dense one.
    """
    pruned_further = prune(pruned.model, remaining_groups, plan_step(pruned, plan))
    return replace(pruned_further, first=Pruned(pruned_further.model, pruned.dense, pruned.groups, plan))
