"""Marks on tensors during a forward pass, by which softmaxes that are attention are told from others.

A softmax whose result weighs values (attention, pooling by weights, split attention) is a constant under the rule "cp".
One whose result is an output of the model, or is combined with constants alone, is no attention: relevance flows
through it. Each tensor is marked with the number of softmaxes before it. A product of two tensors with different
numbers is that of attention weights and values, so that is where the weights are detached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from pxcompress.attribution.transformer import PLAIN_FUNCTIONS, carries_gradient

SOFTMAXES = frozenset(("softmax", "log_softmax"))
FUSED = "scaled_dot_product_attention"

JUMPS = frozenset(("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside"))
"""Functions that are constant between jumps, such as rounding, and so pass no gradient to what they read."""

REARRANGING_FUNCTIONS = frozenset(
    """
    __get__ __getitem__ view view_as reshape reshape_as flatten unflatten squeeze unsqueeze permute transpose swapaxes
    movedim t expand expand_as select narrow chunk split unbind index_select contiguous clone float double to type_as
    interpolate cat concat stack mean sum amax max neg log add __radd__ sub
    """.split()  # noqa: SIM905 - a line per name would be a hundred lines
)
"""Functions that may stand between a final softmax and the output: they only move, average or pick values."""

SCALING_FUNCTIONS = frozenset(("mul", "multiply", "__rmul__", "div", "true_divide", "divide"))
"""Functions that may stand between a final softmax and the output only if their other factor is a plain number."""


IN_PLACE_OPERATORS = frozenset(
    ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__")
)
"""Operators that change their left side in place, by the name of their method."""


def changes_in_place(name: str) -> bool:
    """Whether the function `name` changes its first argument in place."""
    return name in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


class Mark(NamedTuple):
    """What the engine knows of a tensor.

    It holds the least number of softmaxes between the input and the tensor, whether it comes from a gate, and the
    softmax calls whose results it holds, at most moved or averaged. A gate is a layer whose results reach the output
    through attention weights alone.
    """

    softmaxes: int = 0
    gate: bool = False
    results: frozenset[int] = frozenset()


class Call(NamedTuple):
    """Arguments with which a function is to be called.

    `open` says that attention weights from a gate keep their gradient.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mark: Mark
    open: bool = False


def mark_of(tensor: Tensor) -> Mark:
    """The mark of `tensor`; a tensor without one counts as the model's input."""
    return getattr(tensor, "_px_mark", Mark())


def set_mark_(values: Any, mark: Mark) -> bool:
    """Set `mark` on every tensor among `values` that gradients flow into; returns whether there was any."""
    tensors = list(_list_tensors((values,)))
    for tensor in tensors:
        tensor._px_mark = mark  # type: ignore[attr-defined]
    return bool(tensors)


def prepare_call(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, constant: bool, in_place: bool
) -> Call:
    """The arguments with which the function `name` is to be called, some detached, and the mark of its result.

    Where softmaxes are `constant`, attention weights are detached from the product with values, unless they come from a
    gate. What is first combined with a gate's results is detached too, since relevance reaches it by other paths.
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
    """Which of the `tensors` are attention weights.

    For fused attention, queries, keys and mask, which make the weights.
    """
    if name == FUSED:
        value = args[2] if len(args) > 2 else kwargs["value"]
        return [tensor for tensor in tensors if tensor is not value]
    if name in PLAIN_FUNCTIONS:
        return []
    least_softmaxes = min(mark_of(tensor).softmaxes for tensor in tensors)
    return [tensor for tensor in tensors if mark_of(tensor).softmaxes > least_softmaxes]


def _list_results(name: str, tensors: list[Tensor], args: tuple[Any, ...]) -> frozenset[int]:
    """Numbers of the softmax calls whose results the function passes on unchanged but for place and scale."""
    by_number = name in SCALING_FUNCTIONS and sum(isinstance(arg, Tensor) for arg in args) == 1
    if name not in REARRANGING_FUNCTIONS and not by_number:
        return frozenset()
    return frozenset().union(*(mark_of(tensor).results for tensor in tensors))


def results_in(values: Any) -> frozenset[int]:
    """Numbers of the softmax calls whose results are among `values`."""
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
    """`value` with the tensors `to_detach` detached, also where they lie inside lists, tuples or dicts."""
    if isinstance(value, Tensor):
        return value.detach() if any(value is tensor for tensor in to_detach) else value
    if isinstance(value, dict):
        return {key: _detach(item, to_detach) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_detach(item, to_detach) for item in value)
    return value
