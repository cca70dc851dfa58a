"""Which rows of tensors and weights belong to a unit, as activations (n, units, positions) and as weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pxcompress.types import Axis, Group, Member, Plan


def rows_first(value: Tensor, module: nn.Module) -> Tensor:
    """A layer's input or output as (n, rows, positions).

    Rows are the last axis of a linear layer, axis 1 of a convolution.
    """
    if isinstance(module, nn.Linear):
        value = value.movedim(-1, 1)
    return value.reshape(*value.shape[:2], value.shape[2:].numel())


def unit_view(value: Tensor, module: nn.Module, index: Tensor) -> Tensor:
    """A layer's input as (n, units, positions) for the rows `index` (units, k).

    The k rows of a unit count as positions.
    """
    rows = rows_first(value, module)
    units, width = index.shape
    if units * width == rows.shape[1] and torch.equal(index.flatten(), torch.arange(units * width)):
        return rows.reshape(rows.shape[0], units, -1)
    return rows[:, index.flatten().to(rows.device)].reshape(rows.shape[0], units, -1)


def input_layouts(model: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Layer name -> input rows of each feature, (features, k), for the layers that read the groups (consumers).

    A feature is one input row, except where a channel was flattened in front of a linear layer: its k positions are one
    feature then, as the taps of a convolution are.
    """
    layouts = {}
    for name, owners in members_by_module(groups, "in").items():
        module = model.get_submodule(name)
        weight: Tensor = module.weight  # type: ignore[assignment]
        rows = torch.arange(weight.shape[1] * getattr(module, "groups", 1))
        group, member = owners[0]
        is_flattened = isinstance(module, nn.Linear) and group.kind == "channel" and member.index.shape[1] > 1
        covers_all_rows = is_flattened and torch.equal(member.index.flatten(), rows)
        layouts[name] = member.index if covers_all_rows else rows.unsqueeze(1)
    return layouts


def members_by_module(groups: Sequence[Group], axis: Axis) -> dict[str, list[tuple[Group, Member]]]:
    """Module name -> the groups with rows on its `axis`, each with its `Member`."""
    owners_by_module: dict[str, list[tuple[Group, Member]]] = {}
    for group in groups:
        for member in group.members:
            if member.axis == axis:
                owners_by_module.setdefault(member.module, []).append((group, member))
    return owners_by_module


def list_removed_rows(owners: Sequence[tuple[Group, Member]], plan: Plan) -> Tensor:
    """Rows of a module's axis that the plan removes, sorted; `owners` as from `members_by_module`."""
    rows = [member.rows(plan.removed.get(group.name, ())) for group, member in owners]
    return torch.cat(rows).sort().values if rows else torch.empty(0, dtype=torch.int64)


def complement(size: int, rows: Tensor) -> Tensor:
    """The indices below `size` that are not in `rows`, ascending."""
    is_other = torch.ones(size, dtype=torch.bool)
    is_other[rows] = False
    return is_other.nonzero().flatten()


def unit_weights(model: nn.Module, member: Member) -> Tensor | None:
    """A convolution's or linear layer's weights by unit, (units, weights); None for other members."""
    module = dict(model.named_modules()).get(member.module)
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    weight = module.weight.detach()
    if member.axis == "in":
        conv_groups = getattr(module, "groups", 1)
        per_group = weight.unflatten(0, (conv_groups, len(weight) // conv_groups)).transpose(1, 2)
        weight = per_group.flatten(0, 1)
    return weight[member.index.to(weight.device)].flatten(1)
