"""Computes how to scale and shift rows of the pruned model so that they have the dense model's mean and variance.

Both models run side by side over the same samples, so that the samples need not be like those of training, and where
nothing has changed nothing is to be changed. In the spirit of Jordan et al., "REPAIR"
(https://arxiv.org/abs/2211.08403), where statistics of merged networks are reset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pxcompress.layout.padding import find_counted_positions, select_counted_columns
from pxcompress.layout.rows import rows_first
from pxcompress.passes.moments import RowSums
from pxcompress.state import device_of, evaluating
from pxcompress.types import Axis, Batches

LARGEST_SCALE = 10.0
"""Largest factor (or 1 / factor) by which a row is scaled, since a variance near zero is unreliable."""

Change = tuple[Tensor, Tensor]
"""Scale s and shift t, (rows,) float64 each, that turn rows y into s y + t."""


@dataclass(eq=False)
class _Place:
    """Input or output of one module: which dense rows remain, and sums over all batches and calls of both models.

    `calls` holds the dense model's sums for every call in the current batch.
    """

    rows: Tensor
    dense: RowSums = field(default_factory=RowSums)
    pruned: RowSums = field(default_factory=RowSums)
    calls: list[RowSums] = field(default_factory=list)


def moment_changes(
    dense: nn.Module, pruned: nn.Module, rows: Mapping[str, Tensor], side: Axis, batches: Batches
) -> dict[str, Change]:
    """Scale and shift for the inputs (side "in") or outputs of modules: module name -> (remaining rows,) float64 each.

    `rows` holds for every module the dense model's rows that the pruned one still has. One pass of each model. While
    they run, each batch leaves a module with the dense model's moments of that batch, so that later modules see what
    they will see once all are changed. Modules that run several times count with all their calls.
    """
    places = {name: _Place(index) for name, index in rows.items()}

    def note(place: _Place, value: Tensor, module: nn.Module) -> None:
        sums = _sum_rows(value, module, place.rows)
        place.dense.include(sums)
        place.calls.append(sums)

    def change(place: _Place, value: Tensor, module: nn.Module) -> Tensor:
        sums = _sum_rows(value, module)
        place.pruned.include(sums)
        scale, shift = (each.to(value) for each in _compute_change(place.calls.pop(0), sums))
        axis = -1 if isinstance(module, nn.Linear) else 1
        shape = [-1 if dim == axis % value.ndim else 1 for dim in range(value.ndim)]
        return value * scale.reshape(shape) + shift.reshape(shape)

    with evaluating(dense), evaluating(pruned), torch.no_grad():
        for name, place in places.items():
            _hook(dense.get_submodule(name), side, place, note)
            _hook(pruned.get_submodule(name), side, place, change)
        for inputs, _ in batches:
            for place in places.values():
                place.calls.clear()
            dense(inputs.to(device_of(dense)))
            pruned(inputs.to(device_of(pruned)))
    return {
        name: _compute_change(place.dense.sum_processes(), place.pruned.sum_processes())
        for name, place in places.items()
        if place.dense.count
    }


def _hook(
    module: nn.Module, side: Axis, place: _Place, use: Callable[[_Place, Tensor, nn.Module], Tensor | None]
) -> RemovableHandle:
    """Call `use` with what `module` reads or returns; a tensor that it returns takes its place."""
    if side == "out":
        return module.register_forward_hook(lambda module, args, output: use(place, output, module))

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        value = use(place, args[0], module)
        return None if value is None else (value, *args[1:])

    return module.register_forward_pre_hook(before)


def _sum_rows(value: Tensor, module: nn.Module, rows: Tensor | None = None) -> RowSums:
    sums = RowSums()
    values, counted = rows_first(value, module), find_counted_positions(value)
    values = values if counted is None else select_counted_columns(values, counted)[None]
    sums.add(values if rows is None else values[:, rows.to(values.device)])
    return sums


def _compute_change(dense: RowSums, pruned: RowSums) -> Change:
    """The change that gives pruned rows the mean and deviation of the dense ones; constant rows are only shifted."""
    ratio = (dense.deviation / pruned.deviation).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
    scale = torch.where((pruned.deviation > 0) & (dense.deviation > 0), ratio, torch.ones_like(ratio))
    return scale, dense.mean - scale * pruned.mean
