"""Folders of images with boxes, written in each format: coloured squares on noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 32
NAMES = ("red", "green", "blue")

Boxes = list[tuple[int, int, int, int, int]]
"""Class, x1, y1, x2, y2 in pixels."""


def draw(number: int) -> tuple[Image.Image, Boxes]:
    """An image and its boxes; every fifth has none."""
    rng = np.random.default_rng(number)
    pixels, boxes = rng.integers(0, 90, (HEIGHT, WIDTH, 3), np.uint8), []
    for label in rng.permutation(3)[: 0 if number % 5 == 4 else rng.integers(1, 4)]:
        side = int(rng.integers(8, 13))
        x, y = int(rng.integers(0, WIDTH - side)), int(rng.integers(0, HEIGHT - side))
        pixels[y : y + side, x : x + side] = rng.integers(0, 60)
        pixels[y : y + side, x : x + side, label] = 220
        boxes.append((int(label), x, y, x + side, y + side))
    return Image.fromarray(pixels), boxes


def write_coco(root: Path, halves: Sequence[tuple[str, range]]) -> Path:
    """annotations/instances_HALF.json beside HALF/; category ids are 10, 20, 30."""
    (root / "annotations").mkdir(parents=True)
    for half, numbers in halves:
        (root / half).mkdir()
        images, annotations = [], []
        for number in numbers:
            image, boxes = draw(number)
            image.save(root / half / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
            annotations += [
                {"image_id": number, "category_id": 10 * (1 + k), "bbox": [x, y, right - x, bottom - y], "iscrowd": 0}
                for k, x, y, right, bottom in boxes
            ]
        categories = [{"id": 10 * (1 + k), "name": name} for k, name in enumerate(NAMES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{half}.json").write_text(json.dumps(content))
    return root


def write_yolo(root: Path, halves: Sequence[tuple[str, range]]) -> Path:
    """images/HALF/ beside labels/HALF/, and data.yaml; images without boxes have no .txt."""
    for half, numbers in halves:
        for folder in ("images", "labels"):
            (root / folder / half).mkdir(parents=True)
        for number in numbers:
            image, boxes = draw(number)
            image.save(root / "images" / half / f"{number}.png")
            lines = [
                f"{k} {(x + right) / 2 / WIDTH} {(y + low) / 2 / HEIGHT} {(right - x) / WIDTH} {(low - y) / HEIGHT}"
                for k, x, y, right, low in boxes
            ]
            if lines:
                (root / "labels" / half / f"{number}.txt").write_text("\n".join(lines))
    paths = "\n".join(f"{half}: images/{half}" for half, _ in halves)
    (root / "data.yaml").write_text(f"{paths}\nnames: [{', '.join(NAMES)}]\n")
    return root


def write_voc(root: Path, halves: Sequence[tuple[str, range]]) -> Path:
    """JPEGImages/ (here PNG), Annotations/ and ImageSets/Main/, with pixels counted from 1."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for half, numbers in halves:
        (root / "ImageSets" / "Main" / f"{half}.txt").write_text("\n".join(map(str, numbers)))
        for number in numbers:
            image, boxes = draw(number)
            image.save(root / "JPEGImages" / f"{number}.png")
            objects = "".join(
                f"<object><name>{NAMES[k]}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>"
                f"<ymin>{y + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
                for k, x, y, right, bottom in boxes
            )
            size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
            (root / "Annotations" / f"{number}.xml").write_text(
                f"<annotation><filename>{number}.png</filename>{size}{objects}</annotation>"
            )
    return root


WRITERS = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}
