"""Resizing images to the size that a model takes, with the masks and boxes in them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from pxcompress.types import Preprocessing

IGNORED = 255
"""Value of mask pixels that belong to no class, such as padding, and count in no measure."""


class Resize:
    """Resizes and crops images, masks and boxes in the same way, as `preprocessing` says, by timm's transforms."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing
        channels = preprocessing.input_size[0]
        self._image = self._transform(channels, preprocessing.interpolation, preprocessing.mean)
        self._mask = self._transform(1, "nearest", (IGNORED / 255,))

    def image(self, image: Image.Image) -> Tensor:
        """An image as pixels of the input, (channels, height, width) uint8.

        Padding has the colour that normalises to zero.
        """
        return self._image(image)

    def mask(self, image: Image.Image) -> Tensor:
        """A one-channel mask, resized by nearest neighbour, (1, height, width); padding is `IGNORED`."""
        return self._mask(image)

    def corners(self, corners: NDArray[np.float64], image_size: tuple[int, int]) -> NDArray[np.float64]:
        """Map corners x1, y1, x2, y2 (k, 4) from an image of (width, height) to the input.

        They may lie outside of it.
        """
        scales, offsets = self._map(*image_size)
        return corners * np.tile(scales, 2) + np.tile(offsets, 2)

    @property
    def input_sides(self) -> tuple[int, int]:
        """Width and height of the input."""
        height, width = self._preprocessing.input_size[-2:]
        return width, height

    def _map(self, width: int, height: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Scales and offsets, each for x and y, that map image coordinates to input coordinates."""
        full = [math.floor(side / self._preprocessing.crop) for side in self.input_sides]
        crop_mode = self._preprocessing.crop_mode
        if crop_mode == "squash":
            size = (full[0], full[1])
        elif crop_mode == "center" and full[0] == full[1]:
            size = _with_shorter_side(full[0], width, height)
        else:
            ratio = (max if crop_mode == "border" else min)(width / full[0], height / full[1])
            size = round(width / ratio), round(height / ratio)
        x, y = (_margin(own, side) for own, side in zip(size, self.input_sides, strict=True))
        return (size[0] / width, size[1] / height), (x, y)

    def _transform(self, channels: int, interpolation: str, mean: tuple[float, ...]) -> Callable[[Image.Image], Tensor]:
        height, width = self._preprocessing.input_size[-2:]
        transform: Callable[[Image.Image], Tensor] = create_transform(
            input_size=(channels, height, width),
            is_training=False,
            interpolation=interpolation,
            crop_pct=self._preprocessing.crop,
            crop_mode=self._preprocessing.crop_mode,
            mean=mean,
            normalize=False,
        )
        return transform


def _with_shorter_side(side: int, width: int, height: int) -> tuple[int, int]:
    """Width and height of an image after scaling its shorter side to `side`."""
    return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


def _margin(own: int, side: int) -> int:
    """Offset that centres a length `own` in a length `side`; negative where it is cropped."""
    return (side - own) // 2 if own <= side else -round((own - side) / 2)
