"""COCO's JSON (https://cocodataset.org/#format-data): annotations/*.json beside images, or a .json in every split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pxcompress.data.boxes.annotated import AnnotatedImage, AnnotationFile, Annotations, split_of
from pxcompress.data.samples import UserData
from pxcompress.data.targets import BOX_COLUMNS
from pxcompress.errors import DataError, short

_EXPECTED = "a COCO file: an object with the lists images, annotations and categories"


def open_coco(spec: str, path: Path) -> UserData | None:
    """The data of one COCO file, or of a folder that contains some; None if there is none. Raises `DataError`."""
    paths = [path] if path.suffix.lower() == ".json" and path.is_file() else _json_files(path)
    if not paths:
        return None
    root = path if path.is_dir() else path.parent.parent if path.parent.name == "annotations" else path.parent
    files = [_read(spec, each) for each in paths]
    categories = [_categories(file) for file in files]
    if any(each != categories[0] for each in categories):
        raise files[-1].error(f"has other categories than {files[0].path.name}; expected the same ids and names")
    numbers = {identity: place for place, identity in enumerate(categories[0])}
    joints = max(map(_count_joints, files))
    splits = tuple(_annotate(file, root, numbers, joints) for file in files)
    return Annotations(spec, root, tuple(categories[0].values()), splits).user_data()


def _json_files(root: Path) -> list[Path]:
    """COCO files of a folder: the training file, then the held-out file; a single file holds everything."""
    if not root.is_dir():
        return []
    files = [
        path
        for folder in (root / "annotations", *sorted(each for each in root.iterdir() if each.is_dir()), root)
        for path in sorted(folder.glob("*.json"))
        if "annotations" in path.name or path.parent.name == "annotations"
    ]
    files = list(dict.fromkeys(files))
    files = [path for path in files if path.name.startswith("instances_")] or files
    by_split: dict[str, Path] = {}
    for path in files:
        split = split_of(path.stem) or (split_of(path.parent.name) if path.parent != root else None)
        by_split.setdefault(split or "train", path)
    return [by_split[split] for split in ("train", "val") if split in by_split]


def _read(spec: str, path: Path) -> AnnotationFile:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeError, json.JSONDecodeError) as error:
        raise DataError(f"data {spec!r}: {path.name} cannot be read ({short(error)}); expected {_EXPECTED}") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, Mapping) or not all(isinstance(content.get(name), list) for name in lists):
        raise DataError(f"data {spec!r}: {path.name} is something else; expected {_EXPECTED}")
    file = AnnotationFile(spec, path, content)
    for name in lists[::2]:
        if not content[name]:
            raise file.error(f"has no {name}; expected {_EXPECTED}")
    return file


def _categories(file: AnnotationFile) -> dict[int, str]:
    """Category id -> name, sorted by id."""
    try:
        names = {int(each["id"]): str(each["name"]) for each in file.content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise file.error("has a category without id and name; expected both") from error
    return dict(sorted(names.items()))


def _count_joints(file: AnnotationFile) -> int:
    """Number of joints (keypoints) of an object, from the categories; 0 where no object has a visible one."""
    marked = any(any((each.get("keypoints") or ())[2::3]) for each in file.content["annotations"])
    return max(len(each.get("keypoints") or ()) for each in file.content["categories"]) if marked else 0


def _annotate(file: AnnotationFile, root: Path, numbers: Mapping[int, int], joints: int) -> list[AnnotatedImage]:
    """The images of a COCO file with their boxes; an image may have none. `numbers` maps category ids to classes."""
    columns = BOX_COLUMNS + (1 + 3 * joints if joints else 0)
    try:
        images = {each["id"]: (str(each["file_name"]), _size(each)) for each in file.content["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise file.error("has an image without id and file_name; expected both") from error
    rows: dict[Any, list[list[float]]] = {identity: [] for identity in images}
    for annotation in file.content["annotations"]:
        identity, row = _row(file, annotation, numbers)
        if identity not in rows:
            raise file.error(f"has a box of image {identity!r}, which it does not list; add the image to 'images'")
        rows[identity].append(row + (_joints(file, annotation, joints) if joints else []))
    folder = _image_folder(file, root, next(iter(images.values()))[0])
    return [
        AnnotatedImage(
            folder / name, np.array(rows[identity], dtype=np.float64).reshape(-1, columns), file.path.name, size
        )
        for identity, (name, size) in images.items()
    ]


def _size(image: Mapping[str, Any]) -> tuple[int, int]:
    return int(image.get("width") or 0), int(image.get("height") or 0)


def _row(file: AnnotationFile, annotation: Any, numbers: Mapping[int, int]) -> tuple[Any, list[float]]:
    """The image id of an annotation, and its row of class, corners and crowd flag."""
    try:
        identity, category = annotation["image_id"], annotation["category_id"]
        x, y, width, height = map(float, annotation["bbox"])
        crowd = float(annotation.get("iscrowd") or 0)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise file.error(
            f"has the annotation {short(str(annotation), 80)!r}; expected image_id, category_id and bbox, four numbers "
            "x, y, width, height"
        ) from error
    if category not in numbers:
        raise file.error(
            f"has a box of category {category!r}; expected one of its categories: {short(str(list(numbers)), 80)}"
        )
    return identity, [numbers[category], x, y, x + width, y + height, crowd]


def _joints(file: AnnotationFile, annotation: Any, count: int) -> list[float]:
    """The object's area, then x, y and a flag "marked" for each of its `count` joints."""
    try:
        area = float(annotation.get("area") or annotation["bbox"][2] * annotation["bbox"][3])
        values = [float(value) for value in annotation.get("keypoints") or [0] * 3 * count]
    except (TypeError, ValueError) as error:
        raise file.error(f"has keypoints {short(str(annotation['keypoints']), 80)}; expected numbers") from error
    if len(values) != 3 * count:
        raise file.error(f"has an object with {len(values)} numbers as keypoints; expected 3 for each of {count}")
    return [area, *(float(value > 0) if place % 3 == 2 else value for place, value in enumerate(values))]


def _image_folder(file: AnnotationFile, root: Path, name: str) -> Path:
    """The folder of a file's images: the first candidate that contains the image `name`, else the likeliest."""
    part = file.path.stem.removeprefix("instances_").removeprefix("person_keypoints_")
    split = split_of(part) or ""
    here = file.path.parent
    folders: Sequence[Path] = [here, root / part, root / "images" / part, root / split, root / "images" / split]
    folders = [*folders, root / "images", root, *(each for each in here.parent.glob("images/*") if each.is_dir())]
    return next((folder for folder in folders if (folder / name).is_file()), root / part)
