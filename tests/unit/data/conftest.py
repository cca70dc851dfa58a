"""Folders of images that several modules read."""

import pytest
from image_data import save_images

from pxcompress.data import batches as batches_module


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def lazy(monkeypatch):
    """Nothing fits into memory."""
    monkeypatch.setattr(batches_module, "_MEMORY_BYTES", 0)


@pytest.fixture
def folder(tmp_path):
    return save_images(tmp_path / "data", {"cat": 30, "dog": 30, "eel": 15})


@pytest.fixture
def halves(tmp_path):
    save_images(tmp_path / "data" / "train", {"cat": 30, "dog": 30})
    save_images(tmp_path / "data" / "val", {"cat": 10, "dog": 14}, start=1)
    return tmp_path / "data"
