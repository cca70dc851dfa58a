"""An ONNX file as a model: its input's size and values, and the names of its classes, as far as it says them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from pxcompress.errors import ModelError
from pxcompress.models.preprocess_file import read_beside
from pxcompress.onnx_in import OnnxModule, read_file
from pxcompress.onnx_in.channels import are_channels_last
from pxcompress.onnx_in.opening import read_proto
from pxcompress.types import ImageSize

SUFFIX = ".onnx"

Asked = int | ImageSize | tuple[int, ...] | None

BYTES: Mapping[str, Any] = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
"""Preprocessing for files that take the bytes of an image."""

CHANNELS = 3
"""Number of channels of an image, where the file leaves it open."""


def is_onnx(name: str) -> bool:
    """Whether the name of a model is that of an ONNX file."""
    return name.lower().endswith(SUFFIX)


def load_onnx(
    name: str, checkpoint: Path | None, input_size: int | ImageSize | tuple[int, ...] | None
) -> tuple[OnnxModule, tuple[str, ...]]:
    """The file's module, and what to know about it; its `pretrained_cfg` holds what the file says of its input.

    `input_size`, the side of a square image or the shape of another input, counts where the file leaves sizes open.
    Raises `ModelError`.
    """
    if checkpoint is not None:
        raise ModelError(f"checkpoint {str(checkpoint)!r} is given, but {name!r} holds its own weights; leave it out")
    path = Path(name).expanduser()
    proto = read_proto(path)
    initializer_names = {tensor.name for tensor in proto.graph.initializer}
    ports = [value for value in proto.graph.input if value.name not in initializer_names]
    if len(ports) != 1:
        names = ", ".join(port.name for port in ports)
        raise ModelError(f"{path.name} has {len(ports)} inputs ({names}); expected one; compress_module takes more")
    declared_shape = _declared_shape(path, ports[0])
    last = are_channels_last((None, *declared_shape))
    shape = _input_shape(path, [declared_shape[-1], *declared_shape[:-1]] if last else declared_shape, input_size)
    module = read_file(path, {ports[0].name: (*shape[1:], shape[0]) if last else shape})
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    of_bytes = ports[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    preprocessing = {**(BYTES if of_bytes else {}), **_values(facts), **read_beside(path, shape[0])}
    module.pretrained_cfg = {"input_size": shape, **preprocessing}
    asked_shape = _asked_shape(input_size, shape[0])
    size = " x ".join(map(str, shape))
    size_is_ignored = input_size is not None and asked_shape != shape
    return module, ((f"{path.name} takes inputs of {size}, no other size",) if size_is_ignored else ())


def _declared_shape(path: Path, port: onnx.ValueInfoProto) -> list[int]:
    """The shape of one sample as the file says it, 0 where it leaves it open. Raises `ModelError` for none."""
    shape = [max(dim.dim_value, 0) for dim in port.type.tensor_type.shape.dim][1:]
    if not shape:
        raise ModelError(f"{path.name}: input {port.name!r} has no shape; expected numbers of shape (n, ...)")
    return shape


def _input_shape(
    path: Path, declared_shape: list[int], input_size: int | ImageSize | tuple[int, ...] | None
) -> tuple[int, ...]:
    """The shape of one sample: what the file says, and for what it leaves open what is given. Raises `ModelError`."""
    asked_shape = _asked_shape(input_size, CHANNELS)
    if all(declared_shape):
        return tuple(declared_shape)
    if len(asked_shape) != len(declared_shape):
        shape_text = " x ".join(str(size or "any") for size in declared_shape)
        raise ModelError(f"{path.name} leaves the size of its input open ({shape_text}); give --input-size")
    return tuple(size_in_file or size for size_in_file, size in zip(declared_shape, asked_shape, strict=True))


def _asked_shape(input_size: Asked, channels: int) -> tuple[int, ...]:
    """The shape of one sample that is asked for; empty for none."""
    if input_size is None:
        return ()
    if isinstance(input_size, int):
        return channels, input_size, input_size
    return (channels, *input_size) if isinstance(input_size, ImageSize) else tuple(input_size)


def _values(facts: Mapping[str, str]) -> dict[str, Any]:
    """Preprocessing and class names that pxcompress or Ultralytics wrote into a file, in timm's terms."""
    try:
        if "input_mean" in facts:
            return {
                "mean": tuple(json.loads(facts["input_mean"])),
                "std": tuple(json.loads(facts["input_std"])),
                "interpolation": facts["interpolation"],
                "crop_pct": float(json.loads(facts["crop"])),
                "crop_mode": facts.get("crop_mode", "center"),
                "label_names": tuple(json.loads(facts.get("classes", "[]"))),
            }
        if "names" in facts and "imgsz" in facts:
            names = ast.literal_eval(facts["names"])
            values = {"mean": (0.0,) * CHANNELS, "std": (1.0,) * CHANNELS, "label_names": tuple(names.values())}
            return {**values, "crop_mode": "border"} if facts.get("task") == "detect" else values
    except (ValueError, TypeError, KeyError, SyntaxError, AttributeError):  # another tool's words: nothing is known
        pass
    return {}
