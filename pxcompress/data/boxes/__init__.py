"""Data with boxes, one file a format: COCO's JSON, YOLO's text files, Pascal VOC's XML."""

from __future__ import annotations

from pathlib import Path

from pxcompress.data.boxes.coco import open_coco
from pxcompress.data.boxes.voc import open_voc
from pxcompress.data.boxes.yolo import open_yolo
from pxcompress.data.samples import UserData

FILES = (".json", ".yaml", ".yml")
"""Endings of single files that describe data with boxes: COCO's annotations.json, YOLO's data.yaml."""


def open_boxes(spec: str, path: Path) -> UserData | None:
    """The data with boxes at `path`, a folder or a file; None if it is in none of the formats. Raises `DataError`."""
    for opened in (open_yolo, open_coco, open_voc):
        if (data := opened(spec, path)) is not None:
            return data
    return None
