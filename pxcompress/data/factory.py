"""`package.module:factory`: a user's own data set, of inputs that a model takes as they are.

The factory returns an iterable or Dataset of (inputs, target) pairs or of inputs alone, or {"train": ..., "val": ...}
of such. All inputs have one shape.
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
from pxcompress.errors import DataError, ModelError, PxError, short
from pxcompress.models.factories import find_object

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_EXPECTED = "an iterable of (inputs, target) or inputs, or {'train': ..., 'val': ...} of such"

Array = NDArray[Any]


def is_factory(spec: str) -> bool:
    """Whether `spec` is written as package.module:factory."""
    return _NAME.fullmatch(spec) is not None


def open_factory(spec: str) -> UserData:
    """All samples that the user's factory yields, in memory. Raises `DataError`."""
    halves = _halves(spec, _call(spec))
    items = {half: _items(spec, half, data) for half, data in halves.items()}
    every = [item for part in items.values() for item in part]
    inputs = _stack(spec, "inputs", [value for value, _ in every])
    if inputs.ndim < 2:
        raise DataError(f"data {spec!r}: inputs are single numbers; expected arrays as the model takes them")
    layout, classes, labels, targets = _read_targets(spec, [target for _, target in every], inputs)
    ids = [f"{half}/{number}" for half, part in items.items() for number in range(len(part))]
    samples = Samples.of(ids, labels, Numbers(inputs), targets)
    train_size = len(next(iter(items.values())))
    train = samples.take(np.arange(train_size))
    held_out = samples.take(np.arange(train_size, len(samples))) if len(items) == 2 else None
    outputs = len(classes) or None
    return UserData(classes, train, held_out, layout=layout, outputs=outputs, native_size=inputs.shape[1:])


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


def _items(spec: str, half: str, data: Any) -> list[tuple[Array, Array | None]]:
    """Inputs and targets of one half; a target is None where there are inputs alone."""
    items = []
    try:
        for item in _each(data):
            value, target = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
            items.append((_array(value), None if target is None else _array(target)))
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
