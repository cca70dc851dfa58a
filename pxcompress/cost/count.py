"""What a model costs, exactly: parameters and multiply-accumulates of each module, whole or at planned widths.

Multiply-accumulates are those of convolutions, linear and recurrent layers and matrix products (attention's too), for
one sample, counted by PyTorch's own counter and by `formulas`; element-wise operations, normalisations and
interpolation count as zero. What multiplies and has no formula is named (`list_uncounted`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pxcompress.cost.formulas import Uncounted, formulas
from pxcompress.layout.rows import members_by_module
from pxcompress.state import device_of, evaluating
from pxcompress.types import Axis, Group, Member, Meter


def count_params(model: nn.Module) -> int:
    """Number of parameters; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one sample like `example`, shape (1, ...)."""
    return sum(macs_by_module(model, example).values())


def macs_by_module(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Multiply-accumulates of one sample by module name, each without those of its children."""
    counter, _ = _run_counted(model, example)
    macs_by_name: dict[str, int] = {}
    for path, operations in counter.get_flop_counts().items():
        if path != "Global":
            macs_by_name[_name(path, model)] = sum(operations.values()) // 2
    own_macs = dict(macs_by_name)
    for name, macs in macs_by_name.items():
        if name:
            parent = name.rpartition(".")[0]
            while parent not in own_macs:
                parent = parent.rpartition(".")[0]
            own_macs[parent] -= macs
    return {name: macs for name, macs in own_macs.items() if macs}


def list_uncounted(model: nn.Module, example: Tensor) -> dict[str, tuple[str, ...]]:
    """Operators of `model` that multiply but have no formula, so that they count as zero: name -> modules that run
    them.
    """
    _, uncounted_operators = _run_counted(model, example)
    return {
        operator: tuple(_name(path, model) or type(model).__name__ for path in paths)
        for operator, paths in uncounted_operators.modules.items()
    }


def _run_counted(model: nn.Module, example: Tensor) -> tuple[FlopCounterMode, Uncounted]:
    """Run one sample under a counter of operations; returns the counter, and the operators that it could not count.

    Fused attention is computed unfused here, because the counter does not see inside the fused CPU kernel.
    """
    counter = FlopCounterMode(display=False, custom_mapping=formulas())
    uncounted_operators = Uncounted(counter)
    with (
        evaluating(model),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        _disable_fast_path(),
        counter,
        uncounted_operators,
    ):
        model(example[:1].to(device_of(model)))
    return counter, uncounted_operators


def _name(path: str, model: nn.Module) -> str:
    """A module's name, from the counter's path, which begins with the class name of the model; "" for the model."""
    return "" if path == "Global" else path.removeprefix(type(model).__name__).removeprefix(".")


@contextmanager
def _disable_fast_path() -> Iterator[None]:
    """A context in which nn.MultiheadAttention runs as single operators, because the counter misses its fused path."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def params_by_module(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameter counts by module name and parameter name; a shared parameter counts once."""
    counts: dict[str, dict[str, int]] = {}
    for path, parameter in model.named_parameters():
        module, _, name = path.rpartition(".")
        counts.setdefault(module, {})[name] = parameter.numel()
    return counts


class Widths:
    """Counts how many rows of each module's weights remain when the groups keep given numbers of units.

    The model is read only once, when this is made.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self._owners: dict[tuple[str, Axis], tuple[int, list[tuple[Group, Member]]]] = {}
        axes: tuple[Axis, Axis] = ("out", "in")
        for axis in axes:
            for name, owners in members_by_module(groups, axis).items():
                self._owners[name, axis] = (_count_rows(model, name, owners[0][1]), owners)
        self._heads = {group.name: group.units for group in groups if group.kind == "head"}

    def share(self, name: str, axis: Axis, kept_units: Mapping[str, int]) -> tuple[int, int]:
        """Rows kept, and rows in all, on one axis of a module; (1, 1) where no group has rows there."""
        if (name, axis) not in self._owners:
            return 1, 1
        rows, owners = self._owners[name, axis]
        removed_rows = sum(
            (group.units - kept_units.get(group.name, group.units)) * member.index.shape[1] for group, member in owners
        )
        return rows - removed_rows, rows

    def heads(self, name: str, kept_units: Mapping[str, int]) -> tuple[int, int]:
        """Number of heads kept, and of all heads, of the attention module `name`; (1, 1) for any other module."""
        heads = self._heads.get(name)
        return (kept_units.get(name, heads), heads) if heads else (1, 1)


def _count_rows(model: nn.Module, name: str, member: Member) -> int:
    if member.dim is not None:
        path, _, attribute = name.rpartition(".")
        value = getattr(model.get_submodule(path), attribute)
        return int(value.shape[member.dim] if isinstance(value, Tensor) else sum(value))
    module = model.get_submodule(name)
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    weight: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, nn.Embedding):
        return weight.shape[1]
    return weight.shape[0] if member.axis == "out" else weight.shape[1] * getattr(module, "groups", 1)


def macs_meter(model: nn.Module, groups: Sequence[Group], example: Tensor) -> Meter:
    """A function from kept units to multiply-accumulates of one sample; equals `count_macs` of the pruned model."""
    widths, dense = Widths(model, groups), macs_by_module(model, example)

    def cost(kept_units: Mapping[str, int]) -> float:
        total = 0
        for name, macs in dense.items():
            parts = (
                widths.share(name, "out", kept_units),
                widths.share(name, "in", kept_units),
                widths.heads(name, kept_units),
            )
            total += _scale_count(macs, parts)
        return float(total)

    return cost


def params_meter(model: nn.Module, groups: Sequence[Group]) -> Meter:
    """A function from kept units to the number of parameters; equals `count_params` of the pruned model."""
    widths, dense = Widths(model, groups), params_by_module(model)

    def cost(kept_units: Mapping[str, int]) -> float:
        total = 0
        for name, parameters in dense.items():
            for parameter, count in parameters.items():
                parameter_name = f"{name}.{parameter}".lstrip(".")
                parts = [widths.share(name, "out", kept_units), widths.share(parameter_name, "out", kept_units)]
                if parameter == "weight":
                    parts.append(widths.share(name, "in", kept_units))
                total += _scale_count(count, parts)
        return float(total)

    return cost


def _scale_count(count: int, shares: Sequence[tuple[int, int]]) -> int:
    """`count` multiplied by kept / total for every pair in `shares`, rounded down once at the end."""
    total = 1
    for kept_rows, all_rows in shares:
        count *= kept_rows
        total *= all_rows
    return count // total
