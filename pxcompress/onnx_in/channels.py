"""Handles ONNX files whose images have channels last, while modules take channels first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pxcompress.onnx_in.module import OnnxModule

LAYOUT, LAST = "input_layout", "nhwc"
"""Key and value in an ONNX file's metadata that say that its images have channels last, whatever its shapes."""

IMAGE_CHANNELS = (1, 3, 4)
"""Numbers of channels that images may have: grey, colour, with transparency."""


def are_channels_last(shape: Sequence[int | None]) -> bool:
    """Whether inputs of this shape (n, ...), with None or 0 for open sizes, look like images with channels last."""
    return len(shape) == 4 and shape[3] in IMAGE_CHANNELS and shape[1] not in IMAGE_CHANNELS


def to_channels_last(images: Tensor) -> Tensor:
    """Reorder images: (n, channels, height, width) -> (n, height, width, channels)."""
    return images.permute(0, 2, 3, 1)


def take_floats_(module: OnnxModule) -> None:
    """Make a module that takes the bytes of images accept floats from 0 to 255, in place."""
    example = {
        name: value.float() if value.dtype == torch.uint8 and value.dim() == 4 else value
        for name, value in module.source.example.items()
    }
    module.source = replace(module.source, example=example)


def put_channels_first_(module: OnnxModule) -> None:
    """Make a module whose only input is images take them with channels first, in place."""
    from pxcompress.onnx_in.module import Step

    (name,) = module.input_names
    inner = f"{name}:channels_last"
    for step in module.steps:
        step.inputs = [inner if each == name else each for each in step.inputs]
    module.steps.insert(0, Step("Transpose", to_channels_last, [name], [inner]))
    module.channels_last = True
    example = module.source.example
    module.source = replace(module.source, example={**example, name: example[name].permute(0, 3, 1, 2)})
