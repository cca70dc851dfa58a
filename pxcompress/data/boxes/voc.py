"""Pascal VOC: JPEGImages/, Annotations/*.xml and lists of names in ImageSets/Main/, read by torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from torchvision.datasets import VOCDetection

from pxcompress.data.boxes.annotated import AnnotatedImage, Annotations
from pxcompress.data.samples import UserData
from pxcompress.errors import DataError, short

_LISTS = (("train", "trainval"), ("val", "test"))


def open_voc(spec: str, path: Path) -> UserData | None:
    """The data of a Pascal VOC folder such as VOCdevkit/VOC2012; None if it is none. Raises `DataError`."""
    roots = [path, *sorted(path.glob("VOC*")), *sorted(path.glob("VOCdevkit/VOC*"))]
    root = next((each for each in roots if (each / "Annotations").is_dir() and (each / "JPEGImages").is_dir()), None)
    if root is None:
        return None
    names = [listed for split in _LISTS if (listed := _list_names(root, split))]
    if not names:
        names = [[file.stem for file in sorted((root / "Annotations").glob("*.xml"))]]
    parsed = [[(name, _parse(spec, root / "Annotations" / f"{name}.xml")) for name in split] for split in names]
    objects = [each for split in parsed for _, image in split for each in image.get("object", [])]
    classes = tuple(sorted({str(each.get("name")) for each in objects}))
    splits = tuple([_annotate(spec, root, name, image, classes) for name, image in split] for split in parsed)
    return Annotations(spec, root, classes, splits).user_data()


def _list_names(root: Path, names: tuple[str, ...]) -> list[str]:
    """Image names from the first of the lists `names` that exists; empty if none does."""
    for name in names:
        path = root / "ImageSets" / "Main" / f"{name}.txt"
        if path.is_file():
            return [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return []


def _parse(spec: str, path: Path) -> Mapping[str, Any]:
    try:
        parsed = VOCDetection.parse_voc_xml(ElementTree.parse(path).getroot())
        annotation = parsed["annotation"]
    except (OSError, ElementTree.ParseError, KeyError) as error:
        raise DataError(f"data {spec!r}: {path.name} cannot be read ({short(error)}); expected VOC's XML") from error
    if not isinstance(annotation, Mapping):
        raise DataError(f"data {spec!r}: {path.name} is empty; expected an <annotation> with <filename> and <object>")
    return annotation


def _annotate(spec: str, root: Path, name: str, image: Mapping[str, Any], classes: tuple[str, ...]) -> AnnotatedImage:
    """An image with its boxes, from VOC's XML: pixels count from 1 there, "difficult" objects are flagged like
    crowds.
    """
    file = f"{name}.xml"
    try:
        size = int(image["size"]["width"]), int(image["size"]["height"])
        rows = [
            [
                classes.index(each["name"]),
                float(each["bndbox"]["xmin"]) - 1,
                float(each["bndbox"]["ymin"]) - 1,
                float(each["bndbox"]["xmax"]),
                float(each["bndbox"]["ymax"]),
                float(each.get("difficult", 0)),
            ]
            for each in image.get("object", [])
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"data {spec!r}: {file} has an object without name or bndbox, or no size; expected VOC's XML"
        ) from error
    path = root / "JPEGImages" / str(image.get("filename") or f"{name}.jpg")
    return AnnotatedImage(path, np.array(rows, dtype=np.float64).reshape(-1, 6), file, size)
