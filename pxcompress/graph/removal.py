"""Physical removal of planned units, and the check for it: the dense model in which no layer reads these units."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from pxcompress.graph.dependencies import CONVOLUTIONS, is_depthwise
from pxcompress.graph.heads import set_heads_, set_stream_
from pxcompress.graph.rotation import find_writing_weights
from pxcompress.layout.rows import complement
from pxcompress.models.adapter import all_outputs
from pxcompress.models.outputs import difference
from pxcompress.state import copy_sharing, device_of, evaluating
from pxcompress.types import Axis, Group, Plan, Pruned

REMOVAL_TOLERANCE = 1e-4
"""Largest difference between removing units and zeroing them, as a share of the outputs' scale."""

Place = tuple[Tensor | slice, ...]
"""An index into a tensor."""

ROUNDING = 0.05
"""Differences above this, as a share of the outputs' scale, are no rounding errors: the removal is wrong.

Those between `REMOVAL_TOLERANCE` and this are computed again in float64, since some models amplify rounding errors.
"""


def prune(model: nn.Module, groups: Sequence[Group], plan: Plan) -> Pruned:
    """Remove the planned units physically from a copy of `model`; `model` itself becomes the frozen `dense`.

    Equals the dense model with the same units zeroed (`mask_units`), to rounding.
    """
    slim = copy_sharing(model)
    original_parameters = list(slim.parameters())
    readers = {member.module for group in groups for member in group.consumers}
    rows: dict[tuple[str, Axis, int | None], list[Tensor]] = {}
    for group in groups:
        removed_units = plan.removed.get(group.name, ())
        for member in group.members if removed_units else ():
            rows.setdefault((member.module, member.axis, member.dim), []).append(member.rows(removed_units))
        if removed_units and group.kind == "head":
            set_heads_(slim, group, len(plan.kept(group)))
    for (name, axis, dim), parts in rows.items():
        if dim is None:
            is_alone = name not in readers and is_depthwise(model.get_submodule(name))
            _remove_(slim.get_submodule(name), axis, torch.cat(parts).unique().tolist(), with_own_outputs=is_alone)
        else:
            _remove_entries_(slim, name, dim, torch.cat(parts))
    for group in groups:
        if group.kind == "direction" and plan.removed.get(group.name):
            set_stream_(slim, group, len(plan.kept(group)) + 1)
    original_ids = {id(parameter) for parameter in original_parameters}
    for parameter, original in zip(slim.parameters(), model.parameters(), strict=True):
        if id(parameter) in original_ids:
            parameter.data = parameter.data.clone()
        parameter.grad = None
        parameter.requires_grad_(original.requires_grad)
    return Pruned(model=slim, dense=model, groups=tuple(groups), plan=plan)


def mask_units(model: nn.Module, groups: Sequence[Group], plan: Plan) -> nn.Module:
    """A copy of `model` in which no layer reads the planned units: the reference that `prune` is compared with."""
    twin = copy.deepcopy(model)
    for weights, place in _find_masked_weights(twin, groups, plan):
        weights[place] = 0
    return twin


def removal_error(pruned: Pruned, inputs: Tensor) -> float:
    """Largest difference between outputs of the pruned and the masked dense model, as a share of each output's scale.

    For outputs of whole numbers it is the share that differs; it is infinite where a shape or type changes. Meant
    before any repair; `inputs` has shape (n, ...). About 1e-6 in float32 where removal is exact; some models amplify
    its rounding a thousandfold, so a small difference above the tolerance is computed again in float64. The dense model
    is masked in place while it runs, and has its own weights again afterwards.
    """
    inputs = inputs.to(device_of(pruned.model))
    error = _compare_with_masked(pruned, inputs, all_outputs)
    if REMOVAL_TOLERANCE < error < ROUNDING:
        with suppress(RuntimeError, TypeError):  # where it does not run like that, float32 counts
            error = _compare_with_masked(pruned, inputs, run_in_float64)
    return error


def exact_removal_error(pruned: Pruned, inputs: Tensor) -> float:
    """`removal_error` computed in float64: about 1e-15 where removal is exact, even for units that hardly matter.

    Raises `RuntimeError` or `TypeError` where a model does not run like that.
    """
    return _compare_with_masked(pruned, inputs.to(device_of(pruned.model)), run_in_float64)


def _compare_with_masked(pruned: Pruned, inputs: Tensor, run: Callable[[nn.Module, Tensor], list[Tensor]]) -> float:
    with torch.no_grad(), evaluating(pruned.model), evaluating(pruned.dense):
        slim = run(pruned.model, inputs)
        with ExitStack() as masks:
            for weights, place in _find_masked_weights(pruned.dense, pruned.groups, pruned.plan):
                masks.enter_context(_zeroed(weights, place))
            reference = run(pruned.dense, inputs)
    return difference(slim, reference)


def run_in_float64(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The outputs of a float32 model computed in float64; each weight is converted where it is used."""
    with _Float64():
        return all_outputs(model, inputs)


class _Float64(TorchFunctionMode):
    """A mode in which functions compute in float64 instead of float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "float":
            return args[0].double()
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if not in_place:
            args, kwargs = tree_map(_make_float64, (args, kwargs))
        return tree_map(_make_float64, func(*args, **(kwargs or {})))


def _make_float64(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _remove_(module: Any, axis: Axis, rows: list[int], *, with_own_outputs: bool) -> None:
    """Remove `rows` of a layer, in place.

    `with_own_outputs` removes the outputs of each input channel of a convolution too. That is for depthwise ones. A
    grouped convolution may look like that as well once its groups are down to one channel.
    """
    kind = tp.ops.OPTYPE.CONV if isinstance(module, CONVOLUTIONS) else tp.ops.module2type(module)
    pruner = tp.pruner.function.PrunerBox[kind]
    remove = pruner.prune_out_channels if axis == "out" else pruner.prune_in_channels
    multiplier = module.out_channels // module.in_channels if with_own_outputs else 0
    with torch.enable_grad():  # new parameters are made by selecting from the old ones
        remove(module, rows)
    if with_own_outputs:
        module.in_channels = module.groups = module.out_channels // multiplier


def _remove_entries_(model: nn.Module, name: str, dim: int, rows: Tensor) -> None:
    """Remove `rows` of a parameter or buffer outside of layers, or of a list of split sizes, in place."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    value: Tensor | Sequence[int] = getattr(module, attribute)
    if not isinstance(value, Tensor):
        parts = [torch.isin(part, rows) for part in torch.arange(sum(value)).split(list(value))]
        setattr(module, attribute, type(value)(int((~removed_mask).sum()) for removed_mask in parts))  # type: ignore[call-arg]
        return
    remaining_values = value.detach().index_select(dim, complement(value.shape[dim], rows).to(value.device))
    setattr(module, attribute, nn.Parameter(remaining_values) if isinstance(value, nn.Parameter) else remaining_values)


def _find_masked_weights(model: nn.Module, groups: Sequence[Group], plan: Plan) -> Iterator[tuple[Tensor, Place]]:
    """Every weight by which layers read planned units, and the index of these entries.

    Directions are masked where they are written: a norm reads them as well.
    """
    for group in groups:
        removed = plan.removed.get(group.name, ())
        if not removed:
            continue
        if group.kind == "direction":
            for tensor, dim in find_writing_weights(model, group):
                yield tensor, (*[slice(None)] * dim, torch.tensor(removed, device=tensor.device))
        else:
            for member in group.consumers:
                yield _find_columns(model.get_submodule(member.module), member.rows(removed))


@contextmanager
def _zeroed(weights: Tensor, place: Place) -> Iterator[None]:
    """A context in which `weights` are zero at `place`."""
    original_values = weights[place].clone()
    weights[place] = 0
    try:
        yield
    finally:
        weights[place] = original_values


def _find_columns(module: nn.Module, rows: Tensor) -> tuple[Tensor, Place]:
    """A view of a layer's weight, with an axis of convolution groups in front if there are several, and an index.

    The index selects the entries for the input channels `rows`.
    """
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    groups = getattr(module, "groups", 1)
    rows = rows.to(weight.device)
    if groups == 1:
        return weight, (slice(None), rows)
    width = weight.shape[1]
    return weight.unflatten(0, (groups, -1)), (rows // width, slice(None), rows % width)
