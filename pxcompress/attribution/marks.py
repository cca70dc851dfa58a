"""What a pass knows of every tensor that gradients flow into: which softmaxes it stands behind, and what reads it.

A softmax whose result weighs values (attention, pooling by weights, split attention) is a constant under the rule "cp".
One whose result leaves the model, or is summed up with constants, is no attention: relevance flows through it. What
tells the two apart is the product with values that stand behind fewer softmaxes, so that is where weights are detached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from pxcompress.attribution.transformer import PLAIN, carries_gradient

SOFTMAXES = frozenset(("softmax", "log_softmax"))
FUSED = "scaled_dot_product_attention"

STEPS = frozenset(("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside"))
"""Functions whose gradient is zero wherever they have one: what they read has no gradient."""

SHAPED = frozenset(
    """
    __get__ __getitem__ view view_as reshape reshape_as flatten unflatten squeeze unsqueeze permute transpose swapaxes
    movedim t expand expand_as select narrow chunk split unbind index_select contiguous clone float double to type_as
    interpolate cat concat stack mean sum amax max neg log add __radd__ sub
    """.split()  # noqa: SIM905 - a line per name would be a hundred lines
)
"""Functions that may follow a final softmax and apply as well to its logits: they move, average or pick values."""

SCALED = frozenset(("mul", "multiply", "__rmul__", "div", "true_divide", "divide"))
"""Functions that may follow a final softmax like those in `SHAPED` where the other factor is a plain number."""


CHANGING = frozenset(("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__"))
"""Operators that change their left side in place."""


def changes_in_place(name: str) -> bool:
    """Whether the function `name` changes its first argument."""
    return name in CHANGING or (name.endswith("_") and not name.endswith("__"))


class Mark(NamedTuple):
    """What the engine knows of a tensor: the least number of softmaxes between the input and it, whether it comes from
    a gate, and of which softmax calls it holds the results, moved or averaged at most.

    A gate is a layer whose results reach the output through attention weights alone.
    """

    softmaxes: int = 0
    gate: bool = False
    results: frozenset[int] = frozenset()


class Call(NamedTuple):
    """A function call as it is to be made: `open` where its attention weights come from a gate and keep a gradient."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mark: Mark
    open: bool = False


def mark_of(tensor: Tensor) -> Mark:
    """The mark of `tensor`; that of the model's input where it has none."""
    return getattr(tensor, "_px_mark", Mark())


def set_mark_(values: Any, mark: Mark) -> bool:
    """Mark every tensor among `values` that gradients flow into; whether there is one."""
    tensors = list(_list_tensors((values,)))
    for tensor in tensors:
        tensor._px_mark = mark  # type: ignore[attr-defined]
    return bool(tensors)


def prepare_call(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, constant: bool, in_place: bool
) -> Call:
    """How function `name` is to be called, with the mark of its result.

    Attention weights are detached from a product with values where softmaxes are `constant`, unless they come from a
    gate. What a gate's results meet before is detached instead: it has its relevance from elsewhere.
    """
    tensors = list(_list_tensors((args, kwargs)))
    if not tensors:
        return Call(args, kwargs, Mark())
    weights = _list_weights(name, tensors, args, kwargs) if constant else []
    values = [tensor for tensor in tensors if not any(tensor is weight for weight in weights)] or tensors
    gates = [tensor for tensor in values if mark_of(tensor).gate]
    open_weights = [tensor for tensor in weights if mark_of(tensor).gate]
    to_detach = [tensor for tensor in weights if not mark_of(tensor).gate]
    to_detach += [tensor for tensor in values if gates and not mark_of(tensor).gate]
    if in_place:
        to_detach = [tensor for tensor in to_detach if tensor is not args[0]]
    mark = Mark(min(mark_of(tensor).softmaxes for tensor in values), bool(gates), _list_results(name, tensors, args))
    if to_detach:
        args, kwargs = _detach(args, to_detach), _detach(dict(kwargs), to_detach)
    return Call(args, kwargs, mark, bool(open_weights))


def _list_weights(name: str, tensors: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Which of the `tensors` are attention weights (or make them, in fused attention)."""
    if name == FUSED:
        value = args[2] if len(args) > 2 else kwargs["value"]
        return [tensor for tensor in tensors if tensor is not value]
    if name in PLAIN:
        return []
    least_softmaxes = min(mark_of(tensor).softmaxes for tensor in tensors)
    return [tensor for tensor in tensors if mark_of(tensor).softmaxes > least_softmaxes]


def _list_results(name: str, tensors: list[Tensor], args: tuple[Any, ...]) -> frozenset[int]:
    """Softmax calls whose results the function hands on as they are."""
    by_number = name in SCALED and sum(isinstance(arg, Tensor) for arg in args) == 1
    if name not in SHAPED and not by_number:
        return frozenset()
    return frozenset().union(*(mark_of(tensor).results for tensor in tensors))


def results_in(values: Any) -> frozenset[int]:
    """Softmax calls whose results are among `values`."""
    return frozenset().union(*(mark_of(tensor).results for tensor in _list_tensors((values,))))


def _list_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _list_tensors(value)
        elif isinstance(value, Mapping):
            yield from _list_tensors(value.values())
        elif carries_gradient(value):
            yield value


def _detach(value: Any, to_detach: list[Tensor]) -> Any:
    """`value` with the tensors `to_detach` detached, wherever they are in it."""
    if isinstance(value, Tensor):
        return value.detach() if any(value is tensor for tensor in to_detach) else value
    if isinstance(value, dict):
        return {key: _detach(item, to_detach) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_detach(item, to_detach) for item in value)
    return value
