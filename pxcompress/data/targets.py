"""Targets of samples other than a class: masks, boxes, numbers and labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, from_numpy

from pxcompress.data.resizing import IGNORED as IGNORED
from pxcompress.data.resizing import Resize as Resize
from pxcompress.errors import DataError


class Targets(Protocol):
    """A function from a sample's position to its target, without a batch axis: int64 (H, W), float32 (k,) or (boxes,
    6).
    """

    def __call__(self, position: int, image_size: tuple[int, int] | None, resize: Resize | None) -> Tensor:
        """The target at `position`.

        `image_size` is the original image's (width, height), and `resize` how the image was resized, which boxes and
        masks follow; both are None for inputs that are no images.
        """
        ...


@dataclass(frozen=True, eq=False)
class Values:
    """Targets that are stored in memory as one array, (n, ...)."""

    values: NDArray[np.generic]

    def __call__(self, position: int, image_size: tuple[int, int] | None, resize: Resize | None) -> Tensor:
        return from_numpy(self.values[position])


@dataclass(frozen=True, eq=False)
class Masks:
    """Targets that are mask files below `root`, one for each image; `images` are the images' names for messages."""

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
        pixels = from_numpy(mask)[None] if resize is None else resize.mask(Image.fromarray(mask))
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


BOX_COLUMNS = 6
"""Columns that describe a box: class, four corners, and whether it is a crowd."""


@dataclass(frozen=True, eq=False)
class BoxRows:
    """Boxes of every image: `rows[i]` (k, 6) is class, x1, y1, x2, y2 in pixels of image i, 1 for a crowd.

    Objects with joints have more columns: their area, then x, y, and 1 for one that is marked, of every joint.
    With `relative` corners are shares of the image's sides; `sizes` are widths and heights that the annotations say,
    (0, 0) where they do not. A target is (`most` + 1, 6): boxes in pixels of the input,
    cut off at its edges, then rows with class -1; the last one is -1, 0, 0, width, height of the input, `classes`.
    Joints are not cut off.
    """

    rows: tuple[NDArray[np.float64], ...]
    sizes: tuple[tuple[int, int], ...]
    images: tuple[str, ...]
    classes: int
    most: int
    relative: bool = False

    def __call__(self, position: int, image_size: tuple[int, int] | None, resize: Resize | None) -> Tensor:
        if image_size is None or resize is None:
            raise DataError("boxes are given for inputs that are no images; give other data")
        if (size := self.sizes[position]) not in ((0, 0), image_size):
            size_text, annotation_text = ("x".join(map(str, each)) for each in (image_size, size))
            raise DataError(
                f"image {self.images[position]!r} is {size_text}, its annotation says {annotation_text}; mend the "
                "annotation"
            )
        rows, sides = self.rows[position].copy(), resize.input_sides
        if self.relative:
            rows[:, 1:5] *= np.tile(image_size, 2)
        _move_joints_(rows, image_size, resize)
        rows[:, 1:5] = resize.corners(rows[:, 1:5], image_size).clip(0, np.tile(sides, 2))
        rows = rows[((rows[:, 3:5] - rows[:, 1:3]) > 0).all(1)]
        target = np.zeros((self.most + 1, rows.shape[1]), dtype=np.float32)
        target[:, 0] = -1
        target[: len(rows)] = rows
        target[-1, 3:6] = *sides, self.classes
        return from_numpy(target)


def _move_joints_(rows: NDArray[np.float64], image_size: tuple[int, int], resize: Resize) -> None:
    """Map joints and areas in `rows`, if there are any, from the original image to the input, in place."""
    if rows.shape[1] > BOX_COLUMNS:
        left, top, right, bottom = resize.corners(np.array([[0.0, 0, 1, 1]]), image_size)[0]
        rows[:, BOX_COLUMNS] *= (right - left) * (bottom - top)
        for joint in range(BOX_COLUMNS + 1, rows.shape[1], 3):
            rows[:, joint : joint + 2] = resize.corners(np.tile(rows[:, joint : joint + 2], 2), image_size)[:, :2]
