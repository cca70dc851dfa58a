"""An opened model, on any runtime: its inputs and outputs, predictions, and calls to time."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from pxcompress.deploy.hardware import TF32_SWITCH
from pxcompress.deploy.quiet import shorten_message
from pxcompress.errors import InputError, OutOfMemoryError, PxError
from pxcompress.models.signature import read_signature
from pxcompress.onnx_in.channels import LAST, LAYOUT, are_channels_last
from pxcompress.proof import Placement

Array = npt.NDArray[Any]

Inputs = Array | Tensor | Mapping[str, Array]
"""A batch: an array (n, ...) for the only input, several inputs packed in one array, or arrays by input name."""

_NO_MEMORY = re.compile(r"(failed to|cannot|can't) allocate|out of memory|bad alloc|ALLOC_FAILED", re.IGNORECASE)
"""Phrases in runtimes' error messages when memory is too small; none of them has an exception for it."""

_WEIGHTS: Mapping[int, str] = {
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp64",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "int8",
}
"""ONNX's type of weights -> name of the precision; float32 is the default and has no name."""


@dataclass(frozen=True)
class Port:
    """Name, shape (None for sizes that may vary) and type of one input or output."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"({', '.join('any' if size is None else str(size) for size in self.shape)})"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of `shape` can be given; the first axis may have any size."""
        pairs = zip(self.shape[1:], shape[1:], strict=False)
        return len(self.shape) == len(shape) and all(port_size in (None, size) for port_size, size in pairs)


@dataclass(frozen=True, eq=False)
class Session(ABC):
    """A model that is ready to run; `placement` says on which device and provider.

    `threads` are CPU threads, not pinned to cores. `metadata` is what the file says about itself. A backend adds how
    its runtime computes one batch (`run`) and how it prepares a call that is timed (`bind_feed`); both get arrays of
    the right names, types and shapes, and raise one of `errors` where the runtime cannot run.
    """

    path: Path
    placement: Placement
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    threads: int
    metadata: Mapping[str, str]
    errors: ClassVar[tuple[type[Exception], ...]] = (RuntimeError, ValueError)

    @abstractmethod
    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        """The outputs for one batch in the order of `outputs`; arrays are in host memory."""

    @abstractmethod
    def bind_feed(self, feed: Mapping[str, Array]) -> Callable[[], None]:
        """A function for one call on `feed`, warmed up, without copies from the host.

        It returns when results are ready.
        """

    @property
    def input(self) -> Port:
        """The only input. Raises `InputError` where there are others, or none."""
        if len(self.inputs) != 1:
            names = ", ".join(port.name for port in self.inputs)
            raise InputError(f"{self.path} has {len(self.inputs)} inputs ({names}); expected one: images")
        return self.inputs[0]

    @property
    def output(self) -> Port:
        """The first output."""
        return self.outputs[0]

    @property
    def device(self) -> str:
        """Device of inputs and outputs while timing: "cuda" or "cpu"."""
        return self.placement.device

    @property
    def precision(self) -> str:
        """Precision that the file names ("int8", "fp16"), else that of most weights; "tf32" where float32 is not kept.

        cuDNN uses TF32 whatever ONNX Runtime is told, unless NVIDIA_TF32_OVERRIDE=0.
        """
        if weights_precision := self.metadata.get("precision") or read_weight_type(self.path):
            return weights_precision
        tf32 = self.device == "cuda" and os.environ.get(TF32_SWITCH) != "0"
        return "tf32" if tf32 else "fp32"

    def predict(self, inputs: Inputs) -> Array:
        """The first output for a batch of inputs; see `outputs_of`."""
        return self._predict(inputs)[0]

    def outputs_of(self, inputs: Inputs) -> dict[str, Tensor]:
        """All outputs for a batch of inputs, by name, on the CPU. Raises `InputError` if the model cannot run on it.

        A file with a fixed batch size is called as often as needed; the last call repeats inputs to fill the batch.
        """
        arrays = self._predict(inputs)
        return {port.name: torch.from_numpy(array) for port, array in zip(self.outputs, arrays, strict=True)}

    def _predict(self, inputs: Inputs) -> list[Array]:
        feed = self.feed(inputs)
        samples, file_batch = len(next(iter(feed.values()))), self.inputs[0].shape[0] if self.inputs[0].shape else None
        if file_batch is None:
            return self._run_in_halves(feed, samples)
        if file_batch == samples:
            return self._run(feed)
        chunks = zip(*(whole_batches(array, file_batch) for array in feed.values()), strict=True)
        parts = [self._run(dict(zip(feed, chunk, strict=True))) for chunk in chunks]
        return [np.concatenate(arrays)[:samples] for arrays in zip(*parts, strict=True)]

    def bind(self, inputs: Inputs) -> Callable[[], None]:
        """A function for one inference call on buffers that are bound once; it returns when results are ready.

        It has been called once already. On a GPU it measures device time, without copies from and to the host. Raises
        `InputError` where it cannot run, and for another batch size than the file's fixed one.
        """
        feed = self.feed(inputs)
        for port in self.inputs:
            if port.shape and port.shape[0] not in (None, len(feed[port.name])):
                samples = len(feed[port.name])
                raise InputError(f"{self.path} has a fixed batch of {port.shape[0]}; given {samples} samples")
        try:
            return self.bind_feed(feed)
        except self.errors as error:
            raise self._make_error(feed, error) from error

    def _run_in_halves(self, feed: Mapping[str, Array], samples: int) -> list[Array]:
        """Run as `_run` does; when memory is too small, in batches halved again and again, down to one sample."""
        try:
            return self._run(feed)
        except OutOfMemoryError:
            if samples < 2 or any(len(array) != samples for array in feed.values()):
                raise
        half = samples // 2
        first = self._run_in_halves({name: array[:half] for name, array in feed.items()}, half)
        second = self._run_in_halves({name: array[half:] for name, array in feed.items()}, samples - half)
        return [np.concatenate(pair) for pair in zip(first, second, strict=True)]

    def _run(self, feed: Mapping[str, Array]) -> list[Array]:
        try:
            return self.run(feed)
        except self.errors as error:
            raise self._make_error(feed, error) from error

    def _make_error(self, feed: Mapping[str, Array], error: Exception) -> PxError:
        """The error for inputs on which the model does not run, or for which memory is too small."""
        shapes = " and ".join(str(array.shape) for array in feed.values())
        if _NO_MEMORY.search(str(error)):
            where = f"inputs of shape {shapes} do not fit into the memory of {self.placement.asked}"
            return OutOfMemoryError(f"{self.path.name}: {where}; give a smaller --batch-size, or --provider cpu")
        problem = f"{self.path.name} does not run on inputs of shape {shapes} on {self.placement.asked}"
        return InputError(f"{problem}: {shorten_message(str(error))}")

    def _unpack(self, inputs: Array | Tensor) -> Mapping[str, Array | Tensor]:
        """Arrays by input name; several inputs packed in one array are unpacked as the file's metadata says."""
        signature = read_signature(self.metadata)
        if not signature.inputs:
            return {self.input.name: inputs}
        values = signature.unpack(torch.as_tensor(inputs)).values()
        return dict(zip((port.name for port in self.inputs), values, strict=True))

    def takes_channels_last(self, port: Port) -> bool:
        """Whether an input is an image with channels last, by the file's metadata or by its shape."""
        is_declared = self.metadata.get(LAYOUT) == LAST and len(port.shape) == 4
        return is_declared or are_channels_last(port.shape)

    def _is_to_be_turned(self, port: Port, shape: tuple[int, ...]) -> bool:
        """Whether an image of this shape has channels first while the file takes channels last."""
        if self.metadata.get(LAYOUT) == LAST and len(port.shape) == 4:
            return list(shape[1:]) == json.loads(self.metadata["input_size"]) or not port.fits(shape)
        return not port.fits(shape) and are_channels_last(port.shape)

    def feed(self, inputs: Inputs) -> dict[str, Array]:
        """Arrays by input name in the file's types, from a batch of inputs. Raises `InputError` for other shapes.

        Images may have their channels first, or where the file has them.
        """
        arrays = inputs if isinstance(inputs, Mapping) else self._unpack(inputs)
        feed = {}
        for port in self.inputs:
            value = arrays[port.name]
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            if self._is_to_be_turned(port, array.shape):
                array = np.moveaxis(array, 1, -1)
            if not port.fits(array.shape):
                raise InputError(f"{self.path.name} expects inputs of shape {port}; given {np.shape(value)}")
            feed[port.name] = _convert(array, port.dtype)
        return feed


def _convert(array: Array, dtype: np.dtype[Any]) -> Array:
    """`array` converted to a type; floats for a whole-number type are rounded and clipped to its range."""
    if np.issubdtype(dtype, np.integer) and np.issubdtype(array.dtype, np.floating):
        bounds = np.iinfo(dtype)
        array = np.rint(array).clip(bounds.min, bounds.max)
    return np.asarray(array, dtype=dtype, order="C")


def whole_batches(array: Array, size: int) -> list[Array]:
    """`array` split into parts of exactly `size` rows; the last part repeats its last row."""
    rows = np.pad(array, [(0, -len(array) % size), *[(0, 0)] * (array.ndim - 1)], mode="edge")
    return np.split(rows, len(rows) // size)


def read_weight_type(path: Path) -> str:
    """Precision of most weights of a file; "" for float32 and for types without a name here."""
    counts: Counter[int] = Counter()
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        counts[tensor.data_type] += prod(tensor.dims)
    return _WEIGHTS.get(max(counts, key=lambda kind: counts[kind]), "") if counts else ""
