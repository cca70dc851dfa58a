"""Data sets that a user's own function, `package.module:factory`, returns.

The factory returns an iterable or Dataset of (inputs, target) pairs or of inputs alone, or {"train": ..., "val": ...}
of such. Inputs are an array, or several in a dict (by the names of the model's arguments) or tuple.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from pxcompress.data.items import Array, Item, Value, collect_items
from pxcompress.data.samples import Layout, UserData
from pxcompress.errors import DataError, ModelError, PxError, describe, short
from pxcompress.imports import find_object, own_code
from pxcompress.models.onnx_file import Ports

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_EXPECTED = "an iterable of (inputs, target) or inputs, or {'train': ..., 'val': ...} of such"


def is_factory(spec: str) -> bool:
    """Whether `spec` is written as package.module:factory."""
    return _NAME.fullmatch(spec) is not None


def open_factory(spec: str, ports: Ports | None = None, layouts: Sequence[Layout] = ()) -> UserData:
    """All samples that the user's factory yields, in memory; `ports` and `layouts` as in `collect_items`.

    Raises `DataError`.
    """
    splits = _name_splits(spec, _call(spec))
    return collect_items(spec, {split: _items(spec, split, data) for split, data in splits.items()}, ports, layouts)


def _call(spec: str) -> object:
    try:
        factory = find_object(spec, "data")
    except ModelError as error:
        raise DataError(str(error).replace("an nn.Module", _EXPECTED)) from error
    if not callable(factory):
        raise DataError(f"data {spec!r} is a {type(factory).__name__}; expected a callable that returns {_EXPECTED}")
    try:
        with own_code():
            return factory()
    except Exception as error:  # the user's callable may fail in any way
        raise DataError(f"data {spec!r}: calling it failed: {describe(error)}") from error


def _name_splits(spec: str, data: object) -> Mapping[str, Iterable[object]]:
    """The samples that the factory returned, by split, "train" first; by the name "all" where it has no splits."""
    splits: Mapping[str, Any] = data if isinstance(data, Mapping) else {"all": data}
    if isinstance(data, Mapping) and set(data) not in ({"train"}, {"train", "val"}):
        raise DataError(f"data {spec!r} returned the keys {short(str(list(data)))}; expected 'train' and 'val'")
    for part in splits.values():
        if not isinstance(part, Iterable | Dataset) or isinstance(part, str | bytes):
            raise DataError(f"data {spec!r} returned a {type(part).__name__}; expected {_EXPECTED}")
    return {split: splits[split] for split in sorted(splits)}


def _items(spec: str, split: str, data: Any) -> list[Item]:
    """The samples (inputs and targets) of one split. Raises `DataError`."""
    items: list[Item] = []
    try:
        with own_code():
            for item in _each(data):
                value, target = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
                items.append(Item(f"{split}/{len(items)}", _value(value), None if target is None else _array(target)))
    except PxError:
        raise
    except Exception as error:  # the user's data set may fail in any way
        raise DataError(f"data {spec!r}, item {len(items)} of {split}: reading it failed: {describe(error)}") from error
    if not items:
        raise DataError(f"data {spec!r} returned no items for {split}; expected {_EXPECTED}")
    return items


def _each(data: Any) -> Iterator[Any]:
    """Iterate over an iterable, or over a Dataset by its length, since many datasets raise no IndexError at their
    end.
    """
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not hasattr(data, "__iter__"):
        return (data[index] for index in range(len(data)))
    return iter(data)


def _value(value: object) -> Value:
    """The inputs of one sample: one as an array, several as arrays by name or position."""
    if isinstance(value, Mapping):
        return {str(name): _array(part) for name, part in value.items()}
    if isinstance(value, tuple | list) and any(isinstance(part, torch.Tensor | np.ndarray) for part in value):
        return {place: _array(part) for place, part in enumerate(value)}
    return _array(value)


def _array(value: object) -> Array:
    """A tensor, array, number or list of numbers as a NumPy array. Raises for other types."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"a {type(value).__name__} holds no numbers; expected a tensor or array")
    return array.astype(np.float32) if array.dtype.kind == "f" else array
