"""Images of which one class is called like markup, and a run on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command import image_folder
from models import CLASSES, FlattenCNN
from odd_nets import MARKUP, SIZE
from safetensors.torch import save_file

from pxcompress.state import seeded


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PXCOMPRESS_CACHE", str(place))
        yield place


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in which one class is called like markup."""
    root = image_folder(tmp_path_factory.mktemp("images"), {"train": 12, "val": 12}, CLASSES, SIZE)
    for part in root.iterdir():
        (part / "class0").rename(part / MARKUP)
    return root


@pytest.fixture(scope="module")
def run_options(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a run that takes little time."""
    weights = tmp_path_factory.mktemp("weights") / "flatten.safetensors"
    with seeded(1):
        save_file(FlattenCNN().state_dict(), weights)
    options = ["--model", "models:FlattenCNN", "--data", str(images), "--checkpoint", str(weights), "--ratio", "0.5"]
    return [*options, "--input-size", str(SIZE), "--round-to", "1", "--score", "magnitude"]
