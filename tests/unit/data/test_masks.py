"""Images with masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_layouts import COUNT, batches_by_id, error_of, mask_of, save_images, save_masked
from PIL import Image

from pxcompress.data import batches as batches_module
from pxcompress.data import load_splits, open_source
from pxcompress.tasks.agreement import Agreement
from pxcompress.types import Preprocessing


@pytest.mark.parametrize("memory", [10**9, 0], ids=["stored", "lazy"])
def test_masks(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(batches_module, "_MEMORY_BYTES", memory)
    source = open_source(str(save_masked(tmp_path / "d")))
    assert (source.layout, source.classes, source.outputs) == ("masks", ("0", "1", "2"), 3)
    targets = batches_by_id(source)
    assert len(targets) == COUNT
    for name, target in targets.items():
        assert target.dtype == torch.int64
        np.testing.assert_array_equal(target, mask_of(int(Path(name).stem)))


def test_masks_are_cropped_as_images(tmp_path):
    """An image whose values are those of its mask stays equal to it, where both are resized by nearest neighbour."""
    root = tmp_path / "d"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
        for index in range(COUNT):
            Image.fromarray(mask_of(index, (20, 31))).save(root / name / f"{index}.png")
    nearest = Preprocessing((1, 8, 10), (0.0,), (1.0,), interpolation="nearest", crop=0.8)
    for inputs, targets in load_splits(open_source(str(root)), nearest).score:
        np.testing.assert_array_equal((inputs[:, 0] * 255).round().long(), targets)


@pytest.mark.parametrize("mode", ["P", "I;16", "1"])
def test_modes_of_masks(tmp_path, mode):
    root = save_masked(tmp_path / "d")
    for path in (root / "masks").iterdir():
        values = mask_of(int(path.stem))
        if mode == "P":
            image = Image.frombytes("P", (8, 8), values.tobytes())
            image.putpalette([7, 8, 9] * 256)
        else:
            image = Image.fromarray(values.astype(np.uint16) if mode == "I;16" else values == 1)
        image.save(path)
    for name, target in batches_by_id(open_source(str(root))).items():
        values = mask_of(int(Path(name).stem))
        np.testing.assert_array_equal(target, values == 1 if mode == "1" else values)


def test_masks_in_halves_with_class_names(tmp_path):
    save_masked(tmp_path / "train")
    save_masked(tmp_path / "val", 12)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\nbus\n")
    source = open_source(str(tmp_path))
    assert source.classes == ("sky", "road", "car", "bus")
    assert all(name.startswith("val/") for name in source.held_out.ids)
    assert len(source.held_out) == 12
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    assert "value 2, which is no class" in error_of(tmp_path)


def test_bad_masks(tmp_path):
    root = save_masked(tmp_path / "d")
    Image.new("L", (8, 9)).save(root / "masks/3.png")
    message = error_of(root)
    assert "'masks/3.png' is 8x9" in message
    assert "'images/3.png' 8x8" in message
    Image.new("RGB", (8, 8)).save(root / "masks/3.png")
    assert "mode RGB" in error_of(root)
    (root / "masks/3.png").write_bytes(b"nothing")
    assert "'masks/3.png' cannot be read" in error_of(root)
    (root / "masks/3.png").unlink()
    assert "'images/3.png'" in error_of(root)
    (root / "images/3.png").unlink()
    (root / "images/4.png").unlink()
    assert "'masks/4.png'" in error_of(root)


def test_images_without_masks(tmp_path):
    save_images(tmp_path / "images")
    assert "masks/" in error_of(tmp_path)
    assert open_source(str(tmp_path), Agreement()).layout == "unlabelled"


def test_masks_of_one_class(tmp_path):
    root = save_masked(tmp_path / "d")
    for path in (root / "masks").iterdir():
        Image.fromarray(np.array([[0, 255]], np.uint8)).save(path)
    assert "fewer than two classes" in error_of(root)
