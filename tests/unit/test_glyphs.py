"""The generated data set: pure in its random generator, even in its classes, in fonts that have the characters."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from pxcompress.cache import cache_dir
from pxcompress.demo import images as images_of_demo
from pxcompress.demo.drawing import FONTS, character_mask, font_path
from pxcompress.demo.glyphs import CLASSES, PARTS, SIZE, glyph_arrays, glyph_image, glyph_mask
from pxcompress.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_classes_are_distinct_and_many():
    assert len(set(CLASSES)) == len(CLASSES) >= 36


@pytest.mark.parametrize("font", FONTS)
def test_every_font_draws_every_character_differently(font):
    drawn = [bytes(ImageFont.truetype(str(font_path(font)), 40).getmask(character)) for character in CLASSES]
    assert all(any(mask) for mask in drawn)
    assert len(set(drawn)) == len(CLASSES)


@pytest.mark.parametrize("font", FONTS)
def test_fonts_are_latin_and_not_symbols(font):
    """A symbol font draws other shapes in the letters' places: an upright letter must resemble DejaVu's."""

    def masks(name: str) -> np.ndarray:
        drawn = [np.asarray(character_mask(character, name), dtype=np.float64) for character in "DEHLXZ347"]
        return np.stack([mask.reshape(8, 8, 8, 8).mean((1, 3)) for mask in drawn])

    ours, reference = masks(font).reshape(9, -1), masks("DejaVuSans").reshape(9, -1)
    alike = np.corrcoef(ours, reference)[:9, 9:]
    assert np.diag(alike).mean() > alike[~np.eye(9, dtype=bool)].mean() + 0.15


@pytest.mark.parametrize("label", [0, 17, len(CLASSES) - 1])
def test_image_depends_on_label_and_generator_only(label):
    first, again = (np.asarray(glyph_image(label, np.random.default_rng(3))) for _ in range(2))
    other = np.asarray(glyph_image(label, np.random.default_rng(4)))
    assert first.shape == (SIZE, SIZE, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_characters_stand_out_from_clutter():
    """With the same randomness, another label changes pixels, so that the label is in the image."""
    for index in range(40):
        one, two = (np.asarray(glyph_image(label, np.random.default_rng(index))).astype(int) for label in (3, 9))
        assert np.abs(one - two).max() > 25


def test_arrays_are_prefixes_of_each_other_and_parts_differ():
    long, labels = glyph_arrays("train", 50)
    short, _ = glyph_arrays("train", 20)
    assert np.array_equal(long[:20], short)
    assert np.bincount(labels, minlength=len(CLASSES)).max() == 2
    firsts = [glyph_arrays(part, 20)[0] for part in PARTS] + [glyph_arrays("train", 20, seed=1)[0]]
    assert len({images.tobytes() for images in firsts}) == 4


def test_cache_is_read_repaired_and_left_clean(cache):
    images, labels = glyph_arrays("select", 6)
    (file,) = cache.iterdir()
    np.savez(file, images=images + 1)
    assert np.array_equal(glyph_arrays("select", 6)[0], images + 1), "the file is what is read"
    for damage in (b"", file.read_bytes()[:300], b"no archive"):
        file.write_bytes(damage)
        again, _ = glyph_arrays("select", 6)
        assert np.array_equal(again, images)
    assert list(cache.iterdir()) == [file]
    assert labels.tolist() == list(range(6))


def test_failed_write_leaves_nothing(cache, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(images_of_demo.np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        glyph_arrays("select", 3)
    assert list(cache.iterdir()) == []


def test_cache_dir_is_made_and_its_failure_explained(cache, tmp_path, monkeypatch):
    assert cache_dir() == cache
    assert cache.is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "file" / "inside"))
    with pytest.raises(InputError, match="PXCOMPRESS_CACHE"):
        cache_dir()
    monkeypatch.delenv("PXCOMPRESS_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_dir() == tmp_path / ".cache" / "pxcompress"


def test_masks_show_where_the_character_is():
    """The colour under the mask differs from that around it by the contrast that characters have."""
    images, _ = glyph_arrays("select", 40)
    for index, image in enumerate(images):
        mask = glyph_mask("select", index)
        assert mask.shape == (SIZE, SIZE)
        assert 10 < mask.sum() < 400
        grown = sum(np.roll(mask, (down, right), (0, 1)) for down in (-2, 0, 2) for right in (-2, 0, 2)) > 0
        grey = image.mean(2)
        assert abs(grey[mask].mean() - grey[grown & ~mask].mean()) > 10
