"""Images with masks and in tables, their targets by sample, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import ROLES, SMALL
from PIL import Image

from pxcompress.data import load_splits, open_source
from pxcompress.data.samples import Source
from pxcompress.errors import DataError, InputError
from pxcompress.tasks.task import Task
from pxcompress.types import Preprocessing

COUNT = 30


def save_images(folder: Path, count: int = COUNT, size: tuple[int, int] = (8, 8)) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{index}.png" for index in range(count)]
    for index, name in enumerate(names):
        pixels = np.random.default_rng([index, *folder.name.encode()]).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return names


def mask_of(index: int, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """Values 0 to 2, and 255 in one corner."""
    mask = np.random.default_rng(index).integers(0, 3, size, np.uint8)
    mask[0, 0] = 255
    return mask


def save_masked(root: Path, count: int = COUNT, size: tuple[int, int] = (8, 8)) -> Path:
    (root / "masks").mkdir(parents=True)
    for index, name in enumerate(save_images(root / "images", count, size)):
        Image.fromarray(mask_of(index, size)).save(root / "masks" / name)
    return root


def save_table(folder: Path, header: str, row: object, *, suffix: str = "csv") -> Path:
    """A table of images; `row` gives the cells beside the path, by the image's number."""
    names = save_images(folder / "files")
    lines = [header] if header else []
    lines += [row(index, f"files/{name}") for index, name in enumerate(names)]  # type: ignore[operator]
    path = folder / f"table.{suffix}"
    path.write_text("\n".join(lines))
    return path


def batches_by_id(source: Source, preprocessing: Preprocessing = SMALL) -> dict[str, torch.Tensor]:
    """Targets of all roles by sample id; the roles are disjoint, but for score and repair."""
    splits = load_splits(source, preprocessing, batch_size=4)
    targets: dict[str, torch.Tensor] = {}
    for role in ROLES:
        rows = torch.cat([batch for _, batch in getattr(splits, role)])
        assert len(rows) == len(splits.ids[role])
        assert role == "repair" or not targets.keys() & set(splits.ids[role])
        targets.update(zip(splits.ids[role], rows, strict=True))
    return targets


def error_of(spec: object, task: Task | None = None) -> str:
    with pytest.raises((DataError, InputError)) as caught:
        load_splits(open_source(str(spec), task), SMALL)
    assert "\n" not in str(caught.value)
    return str(caught.value)
