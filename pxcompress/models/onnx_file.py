"""Loads an ONNX file as a model, with the input size, preprocessing and class names that the file contains."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch

from pxcompress.errors import ModelError
from pxcompress.models.adapter import with_packed_inputs
from pxcompress.models.preprocess_file import read_beside
from pxcompress.onnx_in import OnnxModule, read_file
from pxcompress.onnx_in.channels import are_channels_last
from pxcompress.onnx_in.opening import read_proto
from pxcompress.onnx_in.operators.table import DTYPES
from pxcompress.types import ImageSize, Input

SUFFIX = ".onnx"

Asked = int | ImageSize | tuple[int, ...] | None

BYTES: Mapping[str, Any] = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
"""Preprocessing for files that take the bytes of an image."""

AUTO = "auto"

LAYOUTS: Mapping[str, bool | None] = {AUTO: None, "nchw": False, "nhwc": True}
"""The user's word for a layout -> whether images have channels last; None if the shape of the input decides."""

CHANNELS = 3
"""Number of channels of an image that is assumed if the file leaves it open."""


def is_onnx(name: str) -> bool:
    """Whether a model's name is that of an ONNX file."""
    return name.lower().endswith(SUFFIX)


@dataclass(frozen=True)
class Ports:
    """The inputs of an ONNX file, as the shape of one sample each; a size is None if the file leaves it open.

    `channels_last` says that its only input is images whose channels are the last axis.
    """

    file: str
    inputs: tuple[Input, ...]
    channels_last: bool

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Shape of the only input; an image's with channels first."""
        declared = self.inputs[0].shape
        return (declared[-1], *declared[:-1]) if self.channels_last else declared

    @property
    def takes_one_array(self) -> bool:
        """Whether the only input is of floats, or of image bytes, which modules take as floats too."""
        return len(self.inputs) == 1 and takes_floats(self.inputs[0])

    def blank(self) -> tuple[Input, ...]:
        """The inputs, whole numbers limited to 0 and 1, for work without data. Raises `ModelError` for open sizes."""
        for port in self.inputs:
            if None in port.shape:
                shape = " x ".join(str(size or "any") for size in port.shape)
                raise ModelError(f"{self.file} takes {port.name!r} of any size ({shape}); give --data")
        return tuple(each if each.dtype.is_floating_point else replace(each, low=0, high=1) for each in self.inputs)


def takes_floats(port: Input) -> bool:
    """Whether a module takes floats for this input, which is also so for the bytes of images."""
    return port.dtype.is_floating_point or (port.dtype == torch.uint8 and len(port.shape) == 3)


def ports_for(model: str, layout: str = AUTO) -> Ports | None:
    """The inputs of a model that is an ONNX file; None for other models. Raises `ModelError`."""
    return read_ports(model, layout) if is_onnx(model) else None


def read_ports(name: str, layout: str = AUTO) -> Ports:
    """Read the inputs of an ONNX file; `layout` says where images have their channels. Raises `ModelError`."""
    path = Path(name).expanduser()
    proto = read_proto(path)
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = tuple(_port(path, value) for value in proto.graph.input if value.name not in weights)
    if not inputs:
        raise ModelError(f"{path.name} takes no inputs; give a model")
    is_image = len(inputs) == 1 and len(inputs[0].shape) == 3
    if layout != AUTO and not is_image:
        raise ModelError(f"layout {layout!r} is given, but {path.name} does not take images alone; leave it out")
    is_last = LAYOUTS[layout]
    return Ports(
        path.name, inputs, is_image and (are_channels_last((None, *inputs[0].shape)) if is_last is None else is_last)
    )


def _port(path: Path, value: onnx.ValueInfoProto) -> Input:
    """Name, type and shape of one sample of an input. Raises `ModelError` for one without a shape."""
    shape = [dim.dim_value if dim.dim_value > 0 else None for dim in value.type.tensor_type.shape.dim]
    kind = value.type.tensor_type.elem_type
    if not shape or kind not in DTYPES:
        raise ModelError(f"{path.name}: input {value.name!r} has no shape or type; expected numbers of shape (n, ...)")
    return Input(value.name, tuple(shape[1:]), DTYPES[kind])


def load_onnx(
    name: str, checkpoint: Path | None, input_size: Asked, inputs: tuple[Input, ...] = (), layout: str = AUTO
) -> tuple[OnnxModule, tuple[str, ...]]:
    """Load the ONNX file `name` as a module, with notes for the user; its `pretrained_cfg` describes the input.

    `input_size`, the side of a square image or the shape of another input, counts where the file leaves sizes open.
    Several `inputs`, which the data have, are packed in one tensor of that shape. Raises `ModelError`, also for
    a `checkpoint`: the file has its weights.
    """
    if checkpoint is not None:
        raise ModelError(f"checkpoint {str(checkpoint)!r} is given, but {name!r} holds its own weights; leave it out")
    path = Path(name).expanduser()
    ports = read_ports(name, layout)
    if inputs:
        return _load_packed(path, inputs, tuple(input_size if isinstance(input_size, tuple) else ())), ()
    if not ports.takes_one_array:
        names = ", ".join(str(port.name) for port in ports.inputs)
        raise ModelError(
            f"{path.name} takes {names}, no images alone; give --data with arrays by these names: a .npz, a folder of "
            "such, or package.module:factory"
        )
    shape = _input_shape(path, ports.shape, input_size)
    sizes = (*shape[1:], shape[0]) if ports.channels_last else shape
    module = read_file(path, {str(ports.inputs[0].name): sizes}, channels_last=ports.channels_last)
    module.pretrained_cfg = {"input_size": shape, **_preprocessing(path, ports, shape[0])}
    size = " x ".join(map(str, shape))
    size_is_ignored = input_size is not None and _choose_shape(input_size, shape[0]) != shape
    return module, ((f"{path.name} takes inputs of {size}, no other size",) if size_is_ignored else ())


def sizes_of(module: OnnxModule) -> dict[str, list[int]]:
    """Input name -> shape of one sample that the file was read with; empty if the file itself fixes all sizes."""
    values = module.graph_inputs(module.source.example)
    is_open = any(
        not isinstance(size, int) or size < 1
        for value in module.source.model.graph.inputs
        for size in list(value.shape or ())[1:]
    )
    return {name: list(value.shape[1:]) for name, value in values.items()} if is_open else {}


def rebuild_onnx(name: str, kwargs: Mapping[str, Any]) -> OnnxModule:
    """Read an ONNX file again, with the `layout` and `sizes` in `kwargs` with which it was loaded first."""
    return read_file(name, kwargs.get("sizes"), channels_last=LAYOUTS[kwargs.get("layout", AUTO)])


def count_numbers(inputs: tuple[Input, ...]) -> int:
    """How many numbers one sample contains, over all inputs."""
    return sum(prod(size or 1 for size in each.shape) for each in inputs)


def _load_packed(path: Path, inputs: tuple[Input, ...], shape: tuple[int, ...]) -> OnnxModule:
    """The module of a file, taking all its `inputs` packed in one tensor (n, *shape)."""
    sizes = {str(each.name): [size for size in each.shape if size] for each in inputs if None not in each.shape}
    module = with_packed_inputs(read_file(path, sizes), inputs, shape or (count_numbers(inputs),))
    assert isinstance(module, OnnxModule)
    return module


def _preprocessing(path: Path, ports: Ports, channels: int) -> dict[str, Any]:
    """Preprocessing in timm's terms, as far as the ONNX file or a file beside it contains it."""
    metadata = {entry.key: entry.value for entry in read_proto(path).metadata_props}
    of_bytes = ports.inputs[0].dtype == torch.uint8
    return {**(BYTES if of_bytes else {}), **_values(metadata), **read_beside(path, channels)}


def _input_shape(path: Path, declared_shape: tuple[int | None, ...], input_size: Asked) -> tuple[int, ...]:
    """Shape of one sample: from the file, and from `input_size` where the file leaves it open. Raises `ModelError`."""
    asked_shape = _choose_shape(input_size, CHANNELS)
    if all(declared_shape):
        return tuple(size for size in declared_shape if size)
    if len(asked_shape) != len(declared_shape):
        shape_text = " x ".join(str(size or "any") for size in declared_shape)
        raise ModelError(f"{path.name} leaves the size of its input open ({shape_text}); give --input-size")
    return tuple(size_in_file or size for size_in_file, size in zip(declared_shape, asked_shape, strict=True))


def _choose_shape(input_size: Asked, channels: int) -> tuple[int, ...]:
    """The shape of one sample that the user asks for; empty if none."""
    if input_size is None:
        return ()
    if isinstance(input_size, int):
        return channels, input_size, input_size
    return (channels, *input_size) if isinstance(input_size, ImageSize) else tuple(input_size)


def _values(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Preprocessing and class names from metadata that pxcompress or Ultralytics wrote, in timm's terms."""
    try:
        if json.loads(metadata.get("input_mean", "[]")):
            return {
                "mean": tuple(json.loads(metadata["input_mean"])),
                "std": tuple(json.loads(metadata["input_std"])),
                "interpolation": metadata["interpolation"],
                "crop_pct": float(json.loads(metadata["crop"])),
                "crop_mode": metadata.get("crop_mode", "center"),
                "label_names": tuple(json.loads(metadata.get("classes", "[]"))),
            }
        if "names" in metadata and "imgsz" in metadata:
            names = ast.literal_eval(metadata["names"])
            values = {"mean": (0.0,) * CHANNELS, "std": (1.0,) * CHANNELS, "label_names": tuple(names.values())}
            return {**values, "crop_mode": "border"} if metadata.get("task") == "detect" else values
    except (ValueError, TypeError, KeyError, SyntaxError, AttributeError):  # another tool's words: nothing is known
        pass
    return {}
