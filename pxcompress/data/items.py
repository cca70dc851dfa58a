"""A user's own samples, given one by one, as data: all inputs in one array, and the targets.

Inputs are an array, or several by the name or the place of the model's arguments; each has one shape throughout. Whole
numbers of one dict that has an attention_mask may be of any length: shorter ones are filled up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pxcompress.data.box_tables import are_boxes, make_box_table
from pxcompress.data.ports import arrange_for_ports
from pxcompress.data.samples import Layout, Numbers, Samples, UserData
from pxcompress.data.targets import IGNORED, Targets, Values
from pxcompress.errors import DataError, InputError
from pxcompress.models.onnx_file import Ports
from pxcompress.models.signature import MASK, Signature, bound_inputs
from pxcompress.types import Input

Array = NDArray[Any]
Value = Array | dict[str | int, Array]
"""The inputs of a sample: one array, or several by the name or position of the model's argument."""


@dataclass(frozen=True, eq=False)
class Item:
    """One sample, without a batch axis; `target` is None where there are only inputs."""

    id: str
    value: Value
    target: Array | None


def collect_items(spec: str, splits: Mapping[str, Sequence[Item]], ports: Ports | None = None) -> UserData:
    """The samples of one or two splits, training data first, as `UserData`; `ports` are the inputs of an ONNX file.

    Raises `DataError` for samples whose shapes or types differ, or that the ONNX file does not accept.
    """
    every = [item for part in splits.values() for item in part]
    inputs, signature = _read_inputs(spec, [item.value for item in every], ports)
    layout, classes, labels, targets = _read_targets(spec, every, inputs)
    samples = Samples.of([item.id for item in every], labels, Numbers(inputs), targets)
    train_size = len(next(iter(splits.values())))
    train = samples.take(np.arange(train_size))
    held_out = samples.take(np.arange(train_size, len(samples))) if len(splits) == 2 else None
    outputs = len(classes) or None
    return UserData(
        classes, train, held_out, layout=layout, outputs=outputs, native_size=inputs.shape[1:], inputs=signature
    )


def _read_inputs(spec: str, values: Sequence[Value], ports: Ports | None) -> tuple[Array, tuple[Input, ...]]:
    """All inputs in one array (n, ...), and, where samples have several inputs, a list that says how they are
    packed.
    """
    stacks = _stack_inputs(spec, values)
    if ports is not None:
        stacks = arrange_for_ports(spec, stacks, ports)
    if list(stacks) == [None]:
        inputs = stacks[None]
        if inputs.ndim < 2:
            raise DataError(f"data {spec!r}: inputs are single numbers; expected arrays as the model takes them")
        return inputs, ()
    tensors = {name: torch.from_numpy(stack) for name, stack in stacks.items() if name is not None}
    is_open = _is_open(stacks) and (ports is None or all(None in port.shape for port in ports.inputs))
    shapes = {name: (None,) if is_open else tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
    try:
        signature = bound_inputs(
            [Input(name, shapes[name], tensor.dtype) for name, tensor in tensors.items()], _each_alone(tensors)
        )
    except InputError as error:
        raise DataError(f"data {spec!r}: {error}") from error
    parts = [tensor.reshape(len(values), -1).float() for tensor in tensors.values()]
    return Signature(signature).join(parts).numpy(), signature


def _stack_inputs(spec: str, values: Sequence[Value]) -> dict[str | int | None, Array]:
    """Arrays (n, ...) of all samples, by the input's name or position.

    None is the key where samples are single arrays.
    """
    if all(isinstance(value, np.ndarray) for value in values):
        return {None: _stack(spec, "inputs", values)}  # type: ignore[arg-type]
    names = list(values[0]) if isinstance(values[0], dict) else []
    for number, value in enumerate(values):
        if not isinstance(value, dict) or list(value) != names:
            listed = ", ".join(map(str, value)) if isinstance(value, dict) else "one array"
            raise DataError(
                f"data {spec!r}, item {number}: its inputs are {listed}; expected {', '.join(map(str, names))}"
            )
    rows: list[dict[str | int, Array]] = [value for value in values if isinstance(value, dict)]
    rows = _fill_up(spec, rows) if _is_open({name: array[None] for name, array in rows[0].items()}) else rows
    return {name: _stack(spec, f"inputs {name!r}", [row[name] for row in rows]) for name in names}


def _is_open(stacks: Mapping[Any, Array]) -> bool:
    """Whether inputs (n, ...) are token ids whose length may vary: whole numbers with an attention mask."""
    return MASK in stacks and all(array.ndim == 2 and array.dtype.kind in "iub" for array in stacks.values())


def _each_alone(stacks: Mapping[str | int, torch.Tensor]) -> dict[str | int, Sequence[torch.Tensor]]:
    return {name: [stack] for name, stack in stacks.items()}


def _fill_up(spec: str, rows: Sequence[Mapping[str | int, Array]]) -> list[dict[str | int, Array]]:
    """Pad token ids, and other inputs of their length, with zeros at the end to the longest sample."""
    for number, row in enumerate(rows):
        if len({len(array) for array in row.values()}) > 1:
            sizes = ", ".join(f"{name}: {len(array)}" for name, array in row.items())
            raise DataError(f"data {spec!r}, item {number}: its inputs have lengths {sizes}; expected one length")
    longest = max(len(row[MASK]) for row in rows)
    return [{name: np.pad(array, (0, longest - len(array))) for name, array in row.items()} for row in rows]


def _stack(spec: str, kind: str, arrays: Sequence[Array]) -> Array:
    for number, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            shapes = " and ".join(str(each.shape) for each in (arrays[0], array))
            raise DataError(f"data {spec!r}, item {number}: {kind} have shapes {shapes}; expected one shape for all")
    return np.stack(arrays)


def _read_targets(
    spec: str, items: Sequence[Item], inputs: Array
) -> tuple[Layout, tuple[str, ...], NDArray[np.int64], Targets | None]:
    """The layout, the class names, the labels (n,), and targets that are no labels, if any. Raises `DataError`."""
    zeros = np.zeros(len(items), dtype=np.int64)
    known_targets = [item.target for item in items if item.target is not None]
    if not known_targets:
        return "unlabelled", (), zeros, None
    if len(known_targets) < len(items):
        raise DataError(
            f"data {spec!r}: only {len(known_targets)} of {len(items)} items have targets; expected all or none"
        )
    for number, target in enumerate(known_targets):
        if not np.isfinite(target).all():
            raise DataError(f"data {spec!r}, item {number}: its target holds NaN or infinity; mend or remove it")
    if are_boxes(known_targets) and (sides := _image_sides(items[0].value)):
        table = make_box_table(spec, known_targets, sides)
        return "boxes", tuple(str(kind) for kind in range(int(table[0, -1, 5]))), zeros, Values(table)
    values = _stack(spec, "targets", known_targets)
    are_whole_numbers = values.dtype.kind != "f"
    if values.ndim == 1 and are_whole_numbers:
        return "classes", _number_classes(spec, values), values.astype(np.int64), None
    if values.ndim == 3 and are_whole_numbers:
        _check_size(spec, values, inputs)
        return "masks", _number_classes(spec, values[values != IGNORED]), zeros, Values(values.astype(np.int64))
    if values.ndim > 2:
        raise DataError(
            f"data {spec!r}: targets are {'whole' if are_whole_numbers else 'float'} numbers of shape "
            f"{values.shape[1:]}; expected a class, an integer mask (H, W), boxes (k, 5), or a vector"
        )
    columns = values.reshape(len(values), -1).astype(np.float32)
    names = tuple(str(number) for number in range(columns.shape[1]))
    layout: Layout = "labels" if are_whole_numbers and np.isin(columns, (0, 1)).all() else "numbers"
    return layout, names, zeros, Values(columns)


def _image_sides(value: Value) -> tuple[int, int] | None:
    """Width and height of the first input of shape (channels, height, width); None if there is none."""
    arrays = value.values() if isinstance(value, dict) else [value]
    return next(((array.shape[2], array.shape[1]) for array in arrays if array.ndim == 3), None)


def _number_classes(spec: str, values: Array) -> tuple[str, ...]:
    """Class names "0", "1", ... up to the largest class in `values`. Raises `DataError`."""
    if values.min(initial=0) < 0:
        raise DataError(f"data {spec!r}: a target is class {values.min()}; expected classes from 0 on")
    return tuple(str(number) for number in range(int(values.max(initial=0)) + 1))


def _check_size(spec: str, masks: Array, inputs: Array) -> None:
    if inputs.ndim == 4 and masks.shape[1:] != inputs.shape[2:]:
        mask_size, input_size = ("x".join(map(str, shape)) for shape in (masks.shape[1:], inputs.shape[2:]))
        raise DataError(f"data {spec!r}: masks are {mask_size}, their inputs {input_size}; expected one size")
