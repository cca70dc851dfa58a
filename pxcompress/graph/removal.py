"""Physical removal of planned units, and the oracle for it: the dense model in which no layer reads them any more."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch_pruning as tp
from torch import Tensor, nn

from pxcompress.graph.emptied import empty_
from pxcompress.graph.heads import set_heads_
from pxcompress.models.adapter import everything
from pxcompress.state import device_of, observed
from pxcompress.types import Axis, Group, Plan, Pruned

REMOVAL_TOLERANCE = 1e-4
"""Largest difference between removing units and zeroing them, as a share of the outputs' scale."""


def prune(model: nn.Module, groups: Sequence[Group], plan: Plan, example: Tensor) -> Pruned:
    """Remove the planned units physically from a copy of `model`; `model` itself becomes the frozen `dense`.

    Equals the dense model with the same units zeroed (`masked`), to rounding. A layer that loses all of its inputs
    becomes its bias.
    """
    slim = copy.deepcopy(model)
    rows: dict[tuple[str, Axis], list[Tensor]] = {}
    for group in groups:
        removed = plan.removed.get(group.name, ())
        for member in group.members if removed else ():
            rows.setdefault((member.module, member.axis), []).append(member.rows(removed))
        if removed and group.kind == "head" and plan.kept(group):
            set_heads_(slim, group, len(plan.kept(group)))
    for (name, axis), parts in rows.items():
        _remove_(slim.get_submodule(name), axis, torch.cat(parts).unique().tolist())
    empty_(slim, groups, plan)
    for parameter, original in zip(slim.parameters(), model.parameters(), strict=True):
        parameter.grad = None
        parameter.requires_grad_(original.requires_grad)
    return Pruned(model=slim, dense=model, groups=tuple(groups), plan=plan)


def masked(model: nn.Module, groups: Sequence[Group], plan: Plan) -> nn.Module:
    """A copy of `model` in which no layer reads the planned units any more: the oracle for `prune`."""
    twin = copy.deepcopy(model)
    for module, rows in _unread(twin, groups, plan):
        inputs, place = _columns(module, rows)
        inputs[place] = 0
    return twin


def removal_error(pruned: Pruned, inputs: Tensor) -> float:
    """Largest difference between the pruned model's outputs and the masked dense ones, as a share of each one's scale.

    Meant before any repair; `inputs` has shape (n, ...). About 1e-6 in float32 where removal is exact. The dense model
    is masked in place while it runs, and has its own weights again afterwards.
    """
    inputs = inputs.to(device_of(pruned.model))
    with torch.no_grad(), observed(pruned.model), observed(pruned.dense):
        slim = everything(pruned.model, inputs)
        with ExitStack() as masks:
            for module, rows in _unread(pruned.dense, pruned.groups, pruned.plan):
                masks.enter_context(_zeroed(module, rows))
            reference = everything(pruned.dense, inputs)
    if [value.shape for value in slim] != [value.shape for value in reference]:
        return math.inf
    errors = [
        (value - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
        for value, expected in zip(slim, reference, strict=True)
    ]
    return float(torch.stack(errors).max())


def _remove_(module: nn.Module, axis: Axis, rows: list[int]) -> None:
    pruner = tp.pruner.function.PrunerBox[tp.ops.module2type(module)]
    remove = pruner.prune_out_channels if axis == "out" else pruner.prune_in_channels
    with torch.enable_grad():  # new parameters are made by selecting from the old ones
        remove(module, rows)


def _unread(model: nn.Module, groups: Sequence[Group], plan: Plan) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every layer that reads planned units, and the input rows where it does."""
    for group in groups:
        removed = plan.removed.get(group.name, ())
        for member in group.consumers if removed else ():
            yield model.get_submodule(member.module), member.rows(removed)


@contextmanager
def _zeroed(module: nn.Module, rows: Tensor) -> Iterator[None]:
    """What `module` reads from input channels `rows` is zero inside the block."""
    inputs, place = _columns(module, rows)
    before = inputs[place].clone()
    inputs[place] = 0
    try:
        yield
    finally:
        inputs[place] = before


def _columns(module: nn.Module, rows: Tensor) -> tuple[Tensor, tuple[Tensor | slice, ...]]:
    """A layer's weight, and the index in it of input channels `rows`."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    groups = getattr(module, "groups", 1)
    rows = rows.to(weight.device)
    if groups == 1:
        return weight, (slice(None), rows)
    width = weight.shape[1]
    return weight.unflatten(0, (groups, -1)), (rows // width, slice(None), rows % width)
