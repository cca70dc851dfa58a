"""A certified run and one that is refused, made once and read by all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from certified import SIZE, train
from command import Outcome, call_once, image_folder, shared_folder
from models import CLASSES, FlattenCNN
from safetensors.torch import save_file

from pxcompress.recipe import Recipe
from pxcompress.state import seeded
from pxcompress.workload import load_workload

RUNS = {
    "certified": "--ratio 0.6 --repair fold --max-drop 0.3 --steps 3 --temperature-scaling",
    "refused": "--ratio 0.8 --min-keep 0 --repair none --max-drop 0.05 --risk disagreement --steps 2",
}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, weights, both runs, and the record of the split that these used; not to be modified."""
    return shared_folder(tmp_path_factory, "certificates", _fill)


def _fill(root: Path) -> None:
    image_folder(root / "images", {"train": 24, "val": 30}, CLASSES, SIZE)
    _save_weights(root / "images", root / "flatten.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PXCOMPRESS_CACHE", str(root / "cache"))
        for name, words in RUNS.items():
            outcome = call_once("run", *_options(root), *words.split(), "--out", root / "runs" / name)
            (root / f"{name}.json").write_text(json.dumps(asdict(outcome)))


def _save_weights(images: Path, path: Path) -> None:
    """Those of a model that is trained until it is right, so that answers can turn wrong."""
    with seeded(1):
        save_file(FlattenCNN().state_dict(), path)
        recipe = Recipe("models:FlattenCNN", 0.5, data=str(images), checkpoint=str(path), input_size=SIZE)
        workload = load_workload(recipe)
        save_file(train(workload.loaded.model, workload.splits.score).state_dict(), path)


def _options(root: Path) -> list[object]:
    model = ["--model", "models:FlattenCNN", "--data", root / "images", "--checkpoint", root / "flatten.safetensors"]
    return [*model, "--input-size", SIZE, "--score", "magnitude", "--budget", "channels", "--round-to", 1, "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def cache(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own for every module, with the record of the split that the two runs used."""
    folder = tmp_path_factory.mktemp("certificates") / "cache"
    shutil.copytree(shared / "cache", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PXCOMPRESS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def images(shared: Path) -> Path:
    """An image folder: noise around a colour of the class; 75 images to certify on."""
    return shared / "images"


@pytest.fixture(scope="session")
def options(shared: Path) -> list[object]:
    """What every run here has in common."""
    return _options(shared)


@pytest.fixture(scope="session")
def certified(shared: Path) -> tuple[Path, Outcome]:
    """A run of which a smaller model passes, with a temperature."""
    return shared / "runs" / "certified", Outcome(**json.loads((shared / "certified.json").read_text()))


@pytest.fixture(scope="session")
def refused(shared: Path) -> tuple[Path, Outcome]:
    """A run of which every smaller model fails: most units go, nothing is repaired, one error in 75 is too many."""
    return shared / "runs" / "refused", Outcome(**json.loads((shared / "refused.json").read_text()))


@pytest.fixture
def copy(certified: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A certified run folder to tamper with."""
    shutil.copytree(certified[0], tmp_path / "copy")
    return tmp_path / "copy"
