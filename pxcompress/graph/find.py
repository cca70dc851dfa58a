"""Which units a model has, proved by trial."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pxcompress.errors import ModelError
from pxcompress.graph.heads import attentions, head_group
from pxcompress.graph.removal import REMOVAL_TOLERANCE, prune, removal_error
from pxcompress.graph.tracing import traced_groups
from pxcompress.types import Fixed, Group, Plan, Structure

NOT_EXACT = "removing its units is not the same as zeroing them"


def find_groups(model: nn.Module, example: Tensor, keep: Sequence[str] = (), *, prove: bool = True) -> Structure:
    """Everything that can be removed from `model`, in execution order, and what stays with the reason.

    `example` has shape (1, ...); the outputs of the modules named in `keep` (the classifier) stay whole. Every group is
    proved by a trial: half of its units are removed, drawn at random (every other one may happen to be right), and the
    outputs must be those of zeroing them; a group that fails stays. `prove` off leaves that out, for a model that was
    proved before.
    Raises `ModelError` where the model cannot be traced.
    """
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    missing = set(keep) - set(order)
    if missing:
        raise ModelError(f"model has no module {min(missing)!r} whose outputs could be kept")
    heads = list(attentions(model))
    known = {name for attention in heads for name in attention.layers}
    found = [*traced_groups(model, example, keep, known), *(head_group(model, attention) for attention in heads)]
    groups = [group for group in found if isinstance(group, Group)]
    inexact = {group.name for group in _inexact(model, groups, example)} if prove else set()
    fixed = [layer for layer in found if isinstance(layer, Fixed)]
    fixed += [Fixed(group.name, group.units, NOT_EXACT) for group in groups if group.name in inexact]
    return Structure(
        tuple(sorted((group for group in groups if group.name not in inexact), key=lambda group: order[group.name])),
        tuple(sorted(fixed, key=lambda layer: order[layer.name])),
    )


def _inexact(model: nn.Module, groups: Sequence[Group], example: Tensor) -> list[Group]:
    """The groups of which half cannot be removed exactly, found by halving the set of suspects."""
    if not groups or _removal_is_exact(model, groups, example):
        return []
    if len(groups) == 1:
        return list(groups)
    middle = len(groups) // 2
    return _inexact(model, groups[:middle], example) + _inexact(model, groups[middle:], example)


def _removal_is_exact(model: nn.Module, groups: Sequence[Group], example: Tensor) -> bool:
    draw = torch.Generator().manual_seed(0)
    removed = {
        group.name: tuple(torch.randperm(group.units, generator=draw)[: group.units // 2].tolist()) for group in groups
    }
    inputs = torch.randn(2, *example.shape[1:], generator=draw)
    try:
        pruned = prune(model, groups, Plan(removed, "trial", "units", 0, 0, 0), example)
        return removal_error(pruned, inputs) <= REMOVAL_TOLERANCE
    except Exception:  # noqa: BLE001  (torch-pruning and the cut model may fail in any way; the group stays then)
        return False
