"""Files whose images have their channels last: the module takes them first, as everything else here does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pxcompress.onnx_in.module import OnnxModule

LAYOUT, LAST = "input_layout", "nhwc"
"""Key and value of an ONNX file's metadata by which its images have their channels last, whatever its shapes tell."""

IMAGE_CHANNELS = (1, 3, 4)
"""Channels that images may have: grey, colour, with transparency."""


def are_channels_last(shape: Sequence[int | None]) -> bool:
    """Whether inputs of this shape (n, ...), None or 0 where it is open, are images with their channels last."""
    return len(shape) == 4 and shape[3] in IMAGE_CHANNELS and shape[1] not in IMAGE_CHANNELS


def to_channels_last(images: Tensor) -> Tensor:
    """(n, channels, height, width) -> (n, height, width, channels)."""
    return images.permute(0, 2, 3, 1)


def take_floats_(module: OnnxModule) -> None:
    """Let the bytes of images come as float numbers from 0 to 255, in place."""
    example = {
        name: value.float() if value.dtype == torch.uint8 and value.dim() == 4 else value
        for name, value in module.source.example.items()
    }
    module.source = replace(module.source, example=example)


def put_channels_first_(module: OnnxModule) -> None:
    """Let a module whose only input is images take their channels first, in place."""
    from pxcompress.onnx_in.module import Step

    (name,) = module.input_names
    inner = f"{name}:channels_last"
    for step in module.steps:
        step.inputs = [inner if each == name else each for each in step.inputs]
    module.steps.insert(0, Step("Transpose", to_channels_last, [name], [inner]))
    module.channels_last = True
    example = module.source.example
    module.source = replace(module.source, example={**example, name: example[name].permute(0, 3, 1, 2)})
