"""Fixtures of many modules; exports cost a second or more each, so that each is made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from command import Px, caller
from exports import Exported, export_model, make_cnn

from pxcompress.state import seeded


@pytest.fixture
def px(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Px:
    """Run the command line in this process."""
    return caller(monkeypatch, capfd)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that no other test has."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def wide_cnn(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_model(make_cnn(48), 16, tmp_path_factory.mktemp("wide"), "dense")


@pytest.fixture(scope="session")
def slim_cnn(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_model(make_cnn(8), 16, tmp_path_factory.mktemp("slim"), "model")


@pytest.fixture(scope="session")
def small_vit(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    with seeded(0):
        model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, num_classes=5).eval()
    return export_model(model, 16, tmp_path_factory.mktemp("vit"), "vit")
