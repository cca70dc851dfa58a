"""Images with boxes, whatever format they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pxcompress.data.folder import HELD_OUT_FOLDERS, TRAIN_FOLDERS, Files
from pxcompress.data.samples import Layout, Samples, UserData
from pxcompress.data.targets import BOX_COLUMNS, BoxRows
from pxcompress.errors import DataError

SLACK_PIXELS, SLACK_SHARE = 2.0, 0.01
"""How far a box may reach out of its image, by rounding; it is cut off there."""


@dataclass(frozen=True, eq=False)
class AnnotationFile:
    """One JSON or YAML file that describes data, as it lies there."""

    spec: str
    path: Path
    content: Mapping[str, Any]

    def error(self, text: str) -> DataError:
        """The error for what is wrong with the file, `text`."""
        return DataError(f"data {self.spec!r}: {self.path.name} {text}")


@dataclass(frozen=True, eq=False)
class Annotated:
    """One image file and its boxes, as in `BoxRows`, of which `source` tells; its size, (0, 0) if unknown."""

    path: Path
    rows: NDArray[np.float64]
    source: str
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Annotations:
    """All images of some data; with `relative` boxes are shares of the images' sides."""

    spec: str
    root: Path
    classes: tuple[str, ...]
    halves: tuple[Sequence[Annotated], ...]
    relative: bool = False

    def user_data(self) -> UserData:
        """The data, training half first. Raises `DataError` for missing images and boxes outside of theirs."""
        images = [image for half in self.halves for image in half]
        self._check_images(images)
        for image in images:
            self._check_boxes(image)
        names = tuple(_relative_name(image.path, self.root) for image in images)
        self._check_once(names)
        shaped = [_with_area(image.rows) for image in images]
        most, sizes = max(map(len, shaped)), tuple(image.size for image in images)
        targets = BoxRows(tuple(shaped), sizes, names, len(self.classes), most, self.relative)
        if not most:
            raise DataError(f"data {self.spec!r} have {len(images)} images and no box; expected boxes for some of them")
        samples = Samples.of(names, np.zeros(len(names), dtype=np.int64), Files(self.root, names), targets)
        first = len(self.halves[0])
        flat = sum(len(image.rows) for image in images) - sum(map(len, shaped))
        notes = (f"{flat} boxes without width or height are left out",) if flat else ()
        held_out = samples.take(np.arange(first, len(names))) if len(self.halves) == 2 else None
        train = samples.take(np.arange(first))
        layout: Layout = "boxes" if shaped[0].shape[1] == BOX_COLUMNS else "keypoints"
        return UserData(self.classes, train, held_out, notes, layout=layout, outputs=len(self.classes))

    def _check_images(self, images: Sequence[Annotated]) -> None:
        if not images:
            raise DataError(f"data {self.spec!r} name no images; expected images with boxes")
        if missing := [image for image in images if not image.path.is_file()]:
            raise DataError(
                f"data {self.spec!r}: {missing[0].source} names image '{missing[0].path}', which is not there "
                f"({len(missing)} of {len(images)} are missing); add them, or take them out of it"
            )

    def _check_once(self, names: Sequence[str]) -> None:
        first: set[str] = set()
        for name in names:
            if name in first:
                raise DataError(f"data {self.spec!r}: image {name!r} is named twice; expected every image once")
            first.add(name)

    def _check_boxes(self, image: Annotated) -> None:
        """Boxes have numbers, of which the right one is not below the left one, and lie in their image."""
        corners = image.rows[:, 1:5]
        wrong = ~np.isfinite(corners).all(1) | ((corners[:, 2:] - corners[:, :2]) < 0).any(1)
        sides = (1.0, 1.0) if self.relative else image.size
        if max(sides):
            slack = SLACK_SHARE if self.relative else max(SLACK_PIXELS, SLACK_SHARE * max(sides))
            wrong |= (corners < -slack).any(1) | (corners > np.tile(sides, 2) + slack).any(1)
        if wrong.any():
            box = ", ".join(f"{value:g}" for value in corners[int(wrong.argmax())])
            limits = "0 to 1" if self.relative else "x".join(map(str, image.size))
            raise DataError(
                f"data {self.spec!r}: {image.source} has a box from ({box}) in image {image.path.name!r}, which lies "
                f"outside of it or is turned around; expected x1 <= x2 and y1 <= y2 within {limits}"
            )


def half_of(name: str) -> str | None:
    """The half that a file or folder of this name is for, "train" or "val"; None where that does not show."""
    words = name.lower()
    if any(word in words for word in TRAIN_FOLDERS):
        return "train"
    return "val" if any(word in words for word in HELD_OUT_FOLDERS) else None


def _with_area(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The boxes that have a width and a height."""
    return rows[((rows[:, 3:5] - rows[:, 1:3]) > 0).all(1)]


def _relative_name(path: Path, root: Path) -> str:
    """The path below `root`, or as it is for an image that lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
