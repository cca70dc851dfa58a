"""`package.module:factory`: a user's own data set, of inputs that a model takes as they are.

The factory returns an iterable or Dataset of (inputs, target) pairs or of inputs alone, or {"train": ..., "val": ...}
of such. Inputs are an array, or several in a dict (by the names of the model's arguments) or tuple; each has one shape
throughout. Whole numbers of one dict that has an attention_mask may be of any length: shorter ones are filled up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from pxcompress.data.samples import Layout, Numbers, Samples, UserData
from pxcompress.data.targets import IGNORED, Targets, Values
from pxcompress.errors import DataError, InputError, ModelError, PxError, short
from pxcompress.models.factories import find_object
from pxcompress.models.signature import MASK, Signature, bounded
from pxcompress.types import Input

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_EXPECTED = "an iterable of (inputs, target) or inputs, or {'train': ..., 'val': ...} of such"

Array = NDArray[Any]
Value = Array | dict[str | int, Array]
"""One input, or several by the name or the place of the model's argument."""


def is_factory(spec: str) -> bool:
    """Whether `spec` is written as package.module:factory."""
    return _NAME.fullmatch(spec) is not None


def open_factory(spec: str) -> UserData:
    """All samples that the user's factory yields, in memory. Raises `DataError`."""
    halves = _halves(spec, _call(spec))
    items = {half: _items(spec, half, data) for half, data in halves.items()}
    every = [item for part in items.values() for item in part]
    inputs, signature = _read_inputs(spec, [value for value, _ in every])
    layout, classes, labels, targets = _read_targets(spec, [target for _, target in every], inputs)
    ids = [f"{half}/{number}" for half, part in items.items() for number in range(len(part))]
    samples = Samples.of(ids, labels, Numbers(inputs), targets)
    train_size = len(next(iter(items.values())))
    train = samples.take(np.arange(train_size))
    held_out = samples.take(np.arange(train_size, len(samples))) if len(items) == 2 else None
    outputs = len(classes) or None
    return UserData(
        classes, train, held_out, layout=layout, outputs=outputs, native_size=inputs.shape[1:], inputs=signature
    )


def _call(spec: str) -> object:
    try:
        factory = find_object(spec, "data")
    except ModelError as error:
        raise DataError(str(error).replace("an nn.Module", _EXPECTED)) from error
    if not callable(factory):
        raise DataError(f"data {spec!r} is a {type(factory).__name__}; expected a callable that returns {_EXPECTED}")
    try:
        return factory()
    except Exception as error:  # the user's callable may fail in any way
        raise DataError(f"data {spec!r}: calling it failed: {_described(error)}") from error


def _halves(spec: str, data: object) -> Mapping[str, Iterable[object]]:
    """The parts of what the factory returned, training data first."""
    halves: Mapping[str, Any] = data if isinstance(data, Mapping) else {"all": data}
    if isinstance(data, Mapping) and set(data) not in ({"train"}, {"train", "val"}):
        raise DataError(f"data {spec!r} returned the keys {short(str(list(data)))}; expected 'train' and 'val'")
    for part in halves.values():
        if not isinstance(part, Iterable | Dataset) or isinstance(part, str | bytes):
            raise DataError(f"data {spec!r} returned a {type(part).__name__}; expected {_EXPECTED}")
    return {half: halves[half] for half in sorted(halves)}


def _read_inputs(spec: str, values: Sequence[Value]) -> tuple[Array, tuple[Input, ...]]:
    """All inputs in one array (n, ...), and what is packed in it where they are several."""
    if all(isinstance(value, np.ndarray) for value in values):
        inputs = _stack(spec, "inputs", values)  # type: ignore[arg-type]
        if inputs.ndim < 2:
            raise DataError(f"data {spec!r}: inputs are single numbers; expected arrays as the model takes them")
        return inputs, ()
    names = list(values[0]) if isinstance(values[0], dict) else []
    for number, value in enumerate(values):
        if not isinstance(value, dict) or list(value) != names:
            listed = ", ".join(map(str, value)) if isinstance(value, dict) else "one array"
            raise DataError(
                f"data {spec!r}, item {number}: its inputs are {listed}; expected {', '.join(map(str, names))}"
            )
    rows: list[dict[str | int, Array]] = [value for value in values if isinstance(value, dict)]
    is_open = MASK in names and all(array.ndim == 1 and array.dtype.kind in "iub" for array in rows[0].values())
    rows = _filled_up(spec, rows) if is_open else rows
    stacks = {name: torch.from_numpy(_stack(spec, f"inputs {name!r}", [row[name] for row in rows])) for name in names}
    shapes = {name: (None,) if is_open else tuple(stack.shape[1:]) for name, stack in stacks.items()}
    try:
        signature = bounded([Input(name, shapes[name], stacks[name].dtype) for name in names], _each_alone(stacks))
    except InputError as error:
        raise DataError(f"data {spec!r}: {error}") from error
    parts = [stack.reshape(len(rows), -1).float() for stack in stacks.values()]
    return Signature(signature).joined(parts).numpy(), signature


def _each_alone(stacks: Mapping[str | int, torch.Tensor]) -> dict[str | int, Sequence[torch.Tensor]]:
    return {name: [stack] for name, stack in stacks.items()}


def _filled_up(spec: str, rows: Sequence[Mapping[str | int, Array]]) -> list[dict[str | int, Array]]:
    """Token ids and what belongs to them, with zeros behind up to the longest."""
    for number, row in enumerate(rows):
        if len({len(array) for array in row.values()}) > 1:
            sizes = ", ".join(f"{name}: {len(array)}" for name, array in row.items())
            raise DataError(f"data {spec!r}, item {number}: its inputs have lengths {sizes}; expected one length")
    longest = max(len(row[MASK]) for row in rows)
    return [{name: np.pad(array, (0, longest - len(array))) for name, array in row.items()} for row in rows]


def _items(spec: str, half: str, data: Any) -> list[tuple[Value, Array | None]]:
    """Inputs and targets of one half; a target is None where there are inputs alone."""
    items = []
    try:
        for item in _each(data):
            value, target = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
            items.append((_value(value), None if target is None else _array(target)))
    except PxError:
        raise
    except Exception as error:  # the user's data set may fail in any way
        raise DataError(
            f"data {spec!r}, item {len(items)} of {half}: reading it failed: {_described(error)}"
        ) from error
    if not items:
        raise DataError(f"data {spec!r} returned no items for {half}; expected {_EXPECTED}")
    return items


def _each(data: Any) -> Iterator[Any]:
    """Items of an iterable, or of a Dataset by its length: many raise no IndexError at their end."""
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not hasattr(data, "__iter__"):
        return (data[index] for index in range(len(data)))
    return iter(data)


def _value(value: object) -> Value:
    """One input as an array, several as arrays by name or place."""
    if isinstance(value, Mapping):
        return {str(name): _array(part) for name, part in value.items()}
    if isinstance(value, tuple | list) and any(isinstance(part, torch.Tensor | np.ndarray) for part in value):
        return {place: _array(part) for place, part in enumerate(value)}
    return _array(value)


def _array(value: object) -> Array:
    """A tensor, array, number or list of numbers as an array."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"a {type(value).__name__} holds no numbers; expected a tensor or array")
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _stack(spec: str, kind: str, arrays: Sequence[Array]) -> Array:
    for number, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            shapes = " and ".join(str(each.shape) for each in (arrays[0], array))
            raise DataError(f"data {spec!r}, item {number}: {kind} have shapes {shapes}; expected one shape for all")
    return np.stack(arrays)


def _read_targets(
    spec: str, targets: Sequence[Array | None], inputs: Array
) -> tuple[Layout, tuple[str, ...], NDArray[np.int64], Targets | None]:
    """Layout, names, labels, and targets that are no labels."""
    zeros = np.zeros(len(targets), dtype=np.int64)
    known_targets = [target for target in targets if target is not None]
    if not known_targets:
        return "unlabelled", (), zeros, None
    if len(known_targets) < len(targets):
        raise DataError(
            f"data {spec!r}: only {len(known_targets)} of {len(targets)} items have targets; expected all or none"
        )
    values = _stack(spec, "targets", known_targets)
    if not np.isfinite(values).all():
        number = int(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))[0])
        raise DataError(f"data {spec!r}, item {number}: its target holds NaN or infinity; mend or remove it")
    are_whole_numbers = values.dtype.kind != "f"
    if values.ndim == 1 and are_whole_numbers:
        return "classes", _numbered(spec, values), values.astype(np.int64), None
    if values.ndim == 3 and are_whole_numbers:
        _check_size(spec, values, inputs)
        return "masks", _numbered(spec, values[values != IGNORED]), zeros, Values(values.astype(np.int64))
    if values.ndim > 2:
        raise DataError(
            f"data {spec!r}: targets are {'whole' if are_whole_numbers else 'float'} numbers of shape "
            f"{values.shape[1:]}; expected a class, an integer mask (H, W), or a vector"
        )
    columns = values.reshape(len(values), -1).astype(np.float32)
    names = tuple(str(number) for number in range(columns.shape[1]))
    layout: Layout = "labels" if are_whole_numbers and np.isin(columns, (0, 1)).all() else "numbers"
    return layout, names, zeros, Values(columns)


def _numbered(spec: str, values: Array) -> tuple[str, ...]:
    """ "0", "1", ... up to the largest class."""
    if values.min(initial=0) < 0:
        raise DataError(f"data {spec!r}: a target is class {values.min()}; expected classes from 0 on")
    return tuple(str(number) for number in range(int(values.max(initial=0)) + 1))


def _check_size(spec: str, masks: Array, inputs: Array) -> None:
    if inputs.ndim == 4 and masks.shape[1:] != inputs.shape[2:]:
        mask_size, input_size = ("x".join(map(str, shape)) for shape in (masks.shape[1:], inputs.shape[2:]))
        raise DataError(f"data {spec!r}: masks are {mask_size}, their inputs {input_size}; expected one size")


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {short(error)}"
