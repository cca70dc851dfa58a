"""Checks arrays against the inputs of an ONNX file: their names, types and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pxcompress.errors import DataError, unknown
from pxcompress.models.onnx_file import Ports, takes_floats
from pxcompress.types import Input

Array = NDArray[Any]
Stacks = dict[str | int | None, Array]
"""Arrays (n, ...) of all samples, by the input's name or position; None is the key of a single unnamed input."""


def arrange_for_ports(spec: str, stacks: Mapping[str | int | None, Array], ports: Ports) -> Stacks:
    """The arrays by the ONNX file's input names, in its order, as the module in PyTorch takes them.

    The only input is named None where it is floats or the bytes of images, which modules take as floats. Images may lie
    as the file has them, or with their channels first. `spec` names the data. Raises `DataError` for others.
    """
    named = _by_port(spec, stacks, ports)
    laid: Stacks = {port.name: _as_module_takes(spec, port, named[port.name], ports) for port in ports.inputs}
    return {None: laid[ports.inputs[0].name]} if ports.takes_one_array else laid


def _by_port(spec: str, stacks: Mapping[str | int | None, Array], ports: Ports) -> dict[str | int, Array]:
    """Arrays by input name; those that are given by position take the names in the file's order. Raises `DataError`."""
    names = [port.name for port in ports.inputs]
    listed = ", ".join(map(str, names))
    if not all(isinstance(key, str) for key in stacks):
        if len(stacks) != len(names):
            count = "one array" if len(stacks) == 1 else f"{len(stacks)} arrays"
            raise DataError(
                f"data {spec!r} have {count} a sample, {ports.file} takes {len(names)} inputs; give them by name: "
                f"{listed}"
            )
        return dict(zip(names, stacks.values(), strict=True))
    for key in stacks:
        if key not in names:
            raise DataError(f"data {spec!r}: {unknown(f'input of {ports.file}:', str(key), list(map(str, names)))}")
    if missing := [name for name in names if name not in stacks]:
        raise DataError(f"data {spec!r} have no {missing[0]!r}, which {ports.file} takes; its inputs are {listed}")
    return {str(key): array for key, array in stacks.items()}


def _as_module_takes(spec: str, port: Input, array: Array, ports: Ports) -> Array:
    """All samples of one input, (n, ...), in the type and axis order that the module takes. Raises `DataError`."""
    floats = takes_floats(port)
    if array.dtype.kind == "f" and not floats:
        raise DataError(
            f"data {spec!r}: input {port.name!r} is {array.dtype}, {ports.file} takes {_name(port.dtype)}: convert it"
        )
    if array.dtype.kind != "f" and port.dtype.is_floating_point:
        raise DataError(
            f"data {spec!r}: input {port.name!r} is {array.dtype}, {ports.file} takes {_name(port.dtype)}: convert it, "
            "scaled as the file takes it"
        )
    laid = _lay_out(array, port, ports)
    if laid is None:
        shape_text, expected = (
            " x ".join(str(size or "any") for size in shape) for shape in (array.shape[1:], port.shape)
        )
        raise DataError(
            f"data {spec!r}: samples of input {port.name!r} are {shape_text}, {ports.file} takes {expected}; expected "
            "arrays (n, ...) of such"
        )
    return laid.astype(np.float32 if floats else _name(port.dtype), copy=False)


def _lay_out(array: Array, port: Input, ports: Ports) -> Array | None:
    """The samples in the axis order that the module takes; None if their shape does not fit the file."""
    if _fits(array.shape[1:], port.shape):
        return np.moveaxis(array, -1, 1) if ports.channels_last else array
    turned = (port.shape[-1], *port.shape[:-1])
    return array if ports.channels_last and _fits(array.shape[1:], turned) else None


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(size in (None, own) for own, size in pairs)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
