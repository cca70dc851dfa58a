"""Branches that may go as a whole, proved by trial: those beside a path on which the input still reaches the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pxcompress.graph.dependencies import is_depthwise
from pxcompress.graph.removal import REMOVAL_TOLERANCE, prune, removal_error
from pxcompress.graph.trial import tried_inputs
from pxcompress.models.adapter import everything
from pxcompress.state import observed
from pxcompress.types import Group, Plan

Branches = Mapping[str, tuple[str, ...]]
"""A group that may lose all of its units -> the groups that nothing reads any more then, and which go with it."""


def find_branches(model: nn.Module, groups: Sequence[Group], example: Tensor) -> Branches:
    """Inner groups of branches without which, of all together, the outputs still depend on the input.

    A branch goes with the last group inside it. Removing must be what zeroing is: the branch then is a constant, made
    of its biases. `example` has shape (1, ...).
    """
    found = {group.name: _feeders(model, group, groups) for group in groups}
    droppable = _droppable(model, groups, found, [], list(found), example)
    inner = {name for last in droppable for name in found[last]}
    return {name: found[name] for name in droppable if name not in inner}


def without(branches: Branches, kept: Mapping[str, int]) -> dict[str, int]:
    """Widths at which every branch of which the last group has no units has none at all."""
    gone = [feeder for name, feeders in branches.items() if kept.get(name) == 0 for feeder in feeders]
    return {**kept, **dict.fromkeys(gone, 0)}


def _feeders(model: nn.Module, last: Group, groups: Sequence[Group]) -> tuple[str, ...]:
    """Groups that are only read by layers whose outputs are all of `last`, or of other such groups."""
    silent, found = _written(model, last), []
    others = [group for group in groups if group is not last]
    while more := [group for group in others if {member.module for member in group.consumers} <= silent]:
        found += more
        others = [group for group in others if group not in more]
        silent = silent.union(*(_written(model, group) for group in more))
    return tuple(group.name for group in found)


def _written(model: nn.Module, group: Group) -> set[str]:
    """Layers that mix channels and whose outputs are the units of `group`, all of them."""
    found = set()
    for member in group.members:
        module = model.get_submodule(member.module)
        if member.axis == "out" and not is_depthwise(module) and member.index.numel() == len(module.weight):  # type: ignore[arg-type]
            found.add(member.module)
    return found


def _droppable(
    model: nn.Module, groups: Sequence[Group], found: Branches, sure: list[str], suspects: list[str], example: Tensor
) -> list[str]:
    """`sure` and those of the suspects that may go with all of them, found by halving."""
    if not suspects or _is_droppable(model, groups, {name: found[name] for name in sure + suspects}, example):
        return sure + suspects
    if len(suspects) == 1:
        return sure
    middle = len(suspects) // 2
    sure = _droppable(model, groups, found, sure, suspects[:middle], example)
    return _droppable(model, groups, found, sure, suspects[middle:], example)


def _is_droppable(model: nn.Module, groups: Sequence[Group], branches: Branches, example: Tensor) -> bool:
    """Whether the model without all of `branches` is what it is with them zeroed, and still tells inputs apart."""
    kept = without(branches, dict.fromkeys(branches, 0))
    removed = {group.name: tuple(range(group.units)) for group in groups if group.name in kept}
    try:
        inputs = tried_inputs(model, example)
        pruned = prune(model, groups, Plan(removed, "trial", "units", 0, 0, 0), example)
        if not removal_error(pruned, inputs) <= REMOVAL_TOLERANCE:
            return False
        with torch.no_grad(), observed(pruned.model):
            outputs = everything(pruned.model, inputs)
    except Exception:  # noqa: BLE001  (a layer without channels may fail in any way; its branch stays then)
        return False
    scale = max(float(value.abs().max()) for value in outputs)
    return any(float((value[0] - value[-1]).abs().max()) > REMOVAL_TOLERANCE * scale for value in outputs)
