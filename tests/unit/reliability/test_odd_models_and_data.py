"""Models that cannot be used, odd ones that can, and data as people have them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import Outcome, Px, one_line
from odd_nets import SIZE
from PIL import Image


def _sweep(px: Px, model: str, data: Path, out: Path) -> Outcome:
    options = ["--data", data, "--input-size", SIZE, "--ratios", "0.5", "--round-to", 1, "--out", out, "--quiet"]
    return px("sweep", "--model", f"odd_nets:{model}", *options)


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("Nan", 2, "returns NaN or infinity for"),
        ("Insatiable", 3, "stage 'weights' ran out of memory"),
        ("five_channels", 2, "the model takes 5 channels; images have 1 (grey), 3 (RGB) or 4 (RGBA)"),
    ],
)
def test_models_that_cannot_be_used(px: Px, images: Path, tmp_path: Path, model: str, code: int, message: str) -> None:
    assert message in one_line(_sweep(px, model, images, tmp_path / "out"), code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["Constant", "Nothing", "Channels", "four_channels"])
def test_models_that_are_odd_but_work(px: Px, images: Path, tmp_path: Path, model: str) -> None:
    outcome = _sweep(px, model, images, tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")


def test_data_as_people_have_them(px: Px, images: Path, tmp_path: Path) -> None:
    """Grey and transparent images, a large one, a class with one image in each half, and files that are no images."""
    data = tmp_path / "data"
    shutil.copytree(images, data)
    for mode, label in (("L", 1), ("RGBA", 2)):
        for path in data.glob(f"*/class{label}/*.png"):
            with Image.open(path) as image:
                image.convert(mode).save(path)
    for path in data.glob("*/class3/*.png"):
        if path.name != "0.png":
            path.unlink()
    Image.new("1", (10_000, 9_000)).save(data / "train" / "class1" / "large.png")
    (data / "README.md").write_text("x")
    (data / "train" / "class1" / "Thumbs.db").write_bytes(b"\x00")
    (data / "train" / "class1" / "folder.png").mkdir()
    outcome = _sweep(px, "FlattenCNN", data, tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    Image.new("1", (20_000, 10_000)).save(data / "train" / "class1" / "huge.png")
    line = one_line(_sweep(px, "FlattenCNN", data, tmp_path / "other"))
    assert "huge.png" in line
    assert "--skip-corrupt" in line
