"""YOLO's folders: data.yaml names classes and folders of images; each image has a .txt of its boxes, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from torchvision.datasets.folder import IMG_EXTENSIONS

from pxcompress.data.boxes.annotated import AnnotatedImage, AnnotationFile, Annotations
from pxcompress.data.samples import UserData
from pxcompress.errors import DataError, short

_COLUMNS = "class x y width height, shares of the image's sides"


def open_yolo(spec: str, path: Path) -> UserData | None:
    """The data that a data.yaml, or a folder with one, describes; None if there is none. Raises `DataError`."""
    index = path if path.suffix.lower() in (".yaml", ".yml") else next(iter(sorted(path.glob("data.y*ml"))), None)
    if index is None or not index.is_file():
        return None
    content = _read(spec, index)
    classes = _classes(content)
    root = _root(content)
    splits = [_images(content, root, name) for name in ("train", "val") if content.content.get(name)]
    if not splits:
        raise content.error("has no train: and val:; expected folders of images")
    read = tuple([_annotate(spec, image, len(classes)) for image in split] for split in splits)
    return Annotations(spec, root, classes, read, relative=True).user_data()


def _read(spec: str, path: Path) -> AnnotationFile:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise DataError(
            f"data {spec!r}: {path.name} cannot be read ({short(error)}); expected names:, train: and val:"
        ) from error
    if not isinstance(content, Mapping):
        raise DataError(f"data {spec!r}: {path.name} is something else; expected names:, train: and val:")
    return AnnotationFile(spec, path, content)


def _classes(index: AnnotationFile) -> tuple[str, ...]:
    names = index.content.get("names")
    if isinstance(names, Mapping) and sorted(names) == list(range(len(names))):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise index.error("has no names:; expected a list of classes, or numbers from 0 on with a name each")
    return tuple(map(str, names))


def _root(index: AnnotationFile) -> Path:
    """The folder that other paths are relative to: the `path:` in data.yaml if it exists, else the folder of
    data.yaml.
    """
    here = index.path.parent
    named = here / str(index.content.get("path") or "")
    return named if named.is_dir() else here


def _images(index: AnnotationFile, root: Path, split: str) -> list[Path]:
    """The image files of a split, which data.yaml gives as a folder, a .txt file of paths, or a list of these."""
    value = index.content[split]
    paths: list[Path] = []
    for entry in value if isinstance(value, list) else [value]:
        text = str(entry)
        place = next((each for each in (root / text, root / text.removeprefix("../")) if each.exists()), None)
        if place is None:
            raise index.error(f"says {split}: {text}, which is not below '{root}'; expected a folder of images")
        if place.suffix == ".txt":
            lines = place.read_text(encoding="utf-8-sig").split("\n")
            paths += [place.parent / line.strip() for line in lines if line.strip()]
        else:
            paths += [path for path in sorted(place.rglob("*")) if _is_image(path)]
    if not paths:
        raise index.error(
            f"says {split}: {short(str(value))}, where no images are; expected files such as .jpg or .png"
        )
    return paths


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(IMG_EXTENSIONS) and not path.name.startswith(".")


def _annotate(spec: str, image: Path, classes: int) -> AnnotatedImage:
    """An image with the boxes of its .txt file, which lies in labels/ if the image lies in images/, else beside it."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        place = len(parts) - 2 - parts[-2::-1].index("images")
        parts[place] = "labels"
    path = Path(*parts).with_suffix(".txt")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []
    except (OSError, UnicodeError) as error:
        raise DataError(f"data {spec!r}: {path.name} cannot be read ({short(error)}); expected {_COLUMNS}") from error
    rows = [_row(spec, path, number, line, classes) for number, line in enumerate(lines, 1) if line.strip()]
    return AnnotatedImage(image, np.array(rows, dtype=np.float64).reshape(-1, 6), path.name)


def _row(spec: str, path: Path, number: int, line: str, classes: int) -> Sequence[float]:
    """Parse one line of a .txt: class, four corners as shares of the image, and 0, since YOLO has no crowds.

    A polygon, which has more columns, becomes the box around it.
    """
    where = f"data {spec!r}: {path.name}, line {number}"
    try:
        values = [float(word) for word in line.split()]
    except ValueError as error:
        raise DataError(f"{where} is {short(line)!r}; expected numbers: {_COLUMNS}") from error
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        raise DataError(f"{where} has {len(values)} columns; expected 5: {_COLUMNS}")
    if values[0] not in range(classes):
        raise DataError(f"{where} has class {values[0]:g}; expected 0 to {classes - 1}, as data.yaml names them")
    return [values[0], *(_corners(values[1:])), 0.0]


def _corners(values: Sequence[float]) -> NDArray[np.float64]:
    if len(values) == 4:
        x, y, width, height = values
        return np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    points = np.array(values).reshape(-1, 2)
    return np.concatenate([points.min(0), points.max(0)])
