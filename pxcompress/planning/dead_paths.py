"""Removes units that do nothing, without any loss: their output is constant, or no layer reads them.

Such paths are left over where weights are exactly zero ("Sparsest Models Elude Pruning": pruners leave them behind).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pxcompress.graph import is_depthwise
from pxcompress.layout.consumers import add_bias_, find_consumers, is_padded, output_of_constants
from pxcompress.layout.rows import members_by_module, rows_first, unit_weights
from pxcompress.models.adapter import Adapter, perturb
from pxcompress.planning.limits import Limits, narrowest
from pxcompress.planning.rounds import groups_left, prune_further
from pxcompress.state import device_of, evaluating, seeded
from pxcompress.types import Axis, Group, Meter, Pruned

CONSTANT_TOLERANCE = 1e-7
"""Largest difference between values that count as one constant, as a share of its size (or of 1)."""


def remove_dead_paths(pruned: Pruned, example: Tensor, meter: Meter, limits: Limits) -> Pruned:
    """Remove units of `pruned` that are constant or unread, until none is left; constants go into later biases.

    Outputs stay what they were, to rounding. Widths stay aligned as `limits` says, and one unit of every group stays.
    `meter` prices the dense model. May change `pruned.model`.
    """
    while True:
        groups = groups_left(pruned)
        constants = _find_constants(pruned.model, groups, example)
        removed_units = dict(pruned.plan.removed)
        for group, dense in zip(groups, pruned.groups, strict=True):
            dead_places = _find_dead_units(pruned.model, group, constants)
            surplus = group.units - narrowest(dense, group.units - len(dead_places), limits)
            kept_units = pruned.plan.kept(dense)
            if surplus > 0:
                dead_units = (kept_units[unit] for unit in dead_places[:surplus])
                removed_units[group.name] = tuple(sorted((*removed_units.get(group.name, ()), *dead_units)))
        if removed_units == pruned.plan.removed:
            return pruned
        plan = replace(pruned.plan, removed=removed_units)
        widths = {group.name: len(plan.kept(group)) for group in pruned.groups}
        pruned_further = prune_further(pruned, groups, replace(plan, cost_planned=meter(widths)))
        _absorb(pruned_further, constants)
        pruned = pruned_further.whole


def _find_dead_units(model: nn.Module, group: Group, constants: Mapping[str, Tensor]) -> list[int]:
    """Units whose weights are zero in all layers that read them, or in all that write them while they are constant.

    Directions of a stream never count, since norms read them all.
    """
    if group.kind == "direction":
        return []
    weights: dict[Axis, list[Tensor]] = {"in": [], "out": []}
    for member in group.members:
        unit_rows = unit_weights(model, member)
        if unit_rows is not None and not is_depthwise(model.get_submodule(member.module)):
            weights[member.axis].append(unit_rows.any(1))
    is_unread = ~torch.stack(weights["in"]).any(0) if weights["in"] else torch.zeros(group.units, dtype=torch.bool)
    if not weights["out"]:
        return is_unread.nonzero().flatten().tolist()
    values = torch.stack([constants[member.module][member.index].isnan().any(1) for member in group.consumers])
    is_unfed = ~torch.stack(weights["out"]).any(0) & ~values.any(0)
    return (is_unread | is_unfed).nonzero().flatten().tolist()


def _find_constants(model: nn.Module, groups: Sequence[Group], example: Tensor) -> dict[str, Tensor]:
    """The constant value of each input row of the layers that read the groups, (rows,); NaN if it varies."""
    constants: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = rows_first(args[0], module).transpose(0, 1).flatten(1)
            low, high = rows.amin(1), rows.amax(1)
            is_varying = high - low > CONSTANT_TOLERANCE * high.abs().clamp_min(1)
            constants[name] = torch.where(is_varying | (is_padded(module) & (high != 0)), torch.nan, high)

        return read

    with evaluating(model), seeded(0), torch.no_grad():
        for name in members_by_module(groups, "in"):
            model.get_submodule(name).register_forward_pre_hook(hook(name))
        model(_draw_inputs(model, example).to(device_of(model)))
    return constants


def _draw_inputs(model: nn.Module, example: Tensor) -> Tensor:
    """Four random inputs; texts and other packed inputs are variations of the example, without padding."""
    inputs = example.expand(4, *example.shape[1:])
    if isinstance(model, Adapter) and model.signature_.inputs:
        return perturb(model, inputs)
    return torch.randn(inputs.shape).to(example)


def _absorb(pruned: Pruned, constants: Mapping[str, Tensor]) -> None:
    """Add the effect of removed constants to the biases of the layers that read them, in place."""
    for layer in find_consumers(pruned):
        shift = output_of_constants(layer, constants[layer.name].nan_to_num())
        if shift.any():
            add_bias_(layer.slim, shift)
