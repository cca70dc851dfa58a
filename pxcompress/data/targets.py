"""What is asked of a model for a sample: a mask, numbers, several labels; without any of these it is the class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, from_numpy

from pxcompress.errors import DataError

IGNORED = 255
"""Value of mask pixels that belong to no class."""

Resize = Callable[[Image.Image], Tensor]
"""A one-channel image resized and cropped as the inputs are, by nearest neighbour, (1, H, W)."""


class Targets(Protocol):
    """Gives the target of a sample by its position, without batch axis: int64 (H, W) or float32 (k,)."""

    def __call__(self, position: int, image_size: tuple[int, int] | None, resize: Resize | None) -> Tensor:
        """`image_size` is the image's (width, height) as it lies there; inputs that are no images have none."""
        ...


@dataclass(frozen=True, eq=False)
class Values:
    """Targets in memory, (n, ...)."""

    values: NDArray[np.generic]

    def __call__(self, position: int, image_size: tuple[int, int] | None, resize: Resize | None) -> Tensor:
        return from_numpy(self.values[position])


@dataclass(frozen=True, eq=False)
class Masks:
    """One mask file per image, below `root`; `images` are the names of the images that they belong to."""

    root: Path
    names: tuple[str, ...]
    images: tuple[str, ...]
    classes: int

    def __call__(self, position: int, image_size: tuple[int, int] | None, resize: Resize | None) -> Tensor:
        name = self.names[position]
        mask = read_mask(self.root / name, name)
        height, width = mask.shape
        if image_size not in (None, (width, height)):
            size_text = "x".join(map(str, image_size or ()))
            raise DataError(
                f"mask {name!r} is {width}x{height}, its image {self.images[position]!r} {size_text}; "
                "expected one size: make the mask anew"
            )
        strange = mask[(mask >= self.classes) & (mask != IGNORED)]
        if strange.size:
            raise DataError(
                f"mask {name!r} holds the value {strange[0]}, which is no class; "
                f"expected 0 to {self.classes - 1}, or {IGNORED} for pixels that do not count"
            )
        pixels = from_numpy(mask)[None] if resize is None else resize(Image.fromarray(mask))
        return pixels[0].long()


def read_mask(path: Path, name: str) -> NDArray[np.int32]:
    """Class numbers of a mask file, (H, W); a palette image gives its indices. Raises `DataError`."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"mask {name!r} cannot be read ({reason}); replace it") from error
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise DataError(
            f"mask {name!r} has mode {image.mode}; expected one channel, grey or palette, whose values are classes: "
            "convert it"
        )
    return np.asarray(image).astype(np.int32)
