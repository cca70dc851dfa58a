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
"""How far a box may reach out of its image by rounding errors, in pixels and as a share; it is cut at the edge."""


@dataclass(frozen=True, eq=False)
class AnnotationFile:
    """The content of one JSON or YAML file that describes data, as it was parsed."""

    spec: str
    path: Path
    content: Mapping[str, Any]

    def error(self, text: str) -> DataError:
        """The `DataError` for a problem of this file, which `text` describes."""
        return DataError(f"data {self.spec!r}: {self.path.name} {text}")


@dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """One image file, its boxes as in `BoxRows`, the file that they come from (`source`), and its size, (0, 0) if
    unknown.
    """

    path: Path
    rows: NDArray[np.float64]
    source: str
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Annotations:
    """All annotated images of a data set; with `relative`, box corners are shares of the image's sides."""

    spec: str
    root: Path
    classes: tuple[str, ...]
    splits: tuple[Sequence[AnnotatedImage], ...]
    relative: bool = False

    def user_data(self) -> UserData:
        """The data as `UserData`, training split first.

        Raises `DataError` for missing images and for boxes outside of them.
        """
        images = [image for split in self.splits for image in split]
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
        first = len(self.splits[0])
        flat = sum(len(image.rows) for image in images) - sum(map(len, shaped))
        notes = (f"{flat} boxes without width or height are left out",) if flat else ()
        held_out = samples.take(np.arange(first, len(names))) if len(self.splits) == 2 else None
        train = samples.take(np.arange(first))
        layout: Layout = "boxes" if shaped[0].shape[1] == BOX_COLUMNS else "keypoints"
        return UserData(self.classes, train, held_out, notes, layout=layout, outputs=len(self.classes))

    def _check_images(self, images: Sequence[AnnotatedImage]) -> None:
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

    def _check_boxes(self, image: AnnotatedImage) -> None:
        """Raise `DataError` for boxes that are not finite, whose right or lower side comes first, or that leave their
        image.
        """
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


def split_of(name: str) -> str | None:
    """The split, "train" or "val", that a file or folder belongs to by its name; None if the name does not say."""
    words = name.lower()
    if any(word in words for word in TRAIN_FOLDERS):
        return "train"
    return "val" if any(word in words for word in HELD_OUT_FOLDERS) else None


def _with_area(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows of boxes whose width and height are above 0."""
    return rows[((rows[:, 3:5] - rows[:, 1:3]) > 0).all(1)]


def _relative_name(path: Path, root: Path) -> str:
    """The path relative to `root`, or the whole path for an image that lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
