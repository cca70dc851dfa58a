"""What the embedded sets of images have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
"""Side of the square image that models get, pixels."""


@dataclass(frozen=True, eq=False)
class StoredImages:
    """Reads images from memory, (n, height, width, 3) uint8."""

    images: NDArray[np.uint8]

    def __call__(self, position: int) -> Image.Image:
        return Image.fromarray(self.images[position])
