"""The embedded data set `glyphs`: characters in 22 fonts on clutter, 32 x 32 RGB, drawn by the sample's number.

A sample depends only on its part, its index and the seed, so that any part of the set can be made alone. Images are
drawn at twice the size and reduced. The characters leave out pairs that look alike once turned and distorted: 0 and O,
1 and I, and lower-case letters that are small upper-case ones.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pxcompress.cache import cache_dir
from pxcompress.data.embedded import EMBEDDED
from pxcompress.data.samples import Samples, Source
from pxcompress.demo.baseline import LearnedHere
from pxcompress.demo.images import SIDE, StoredImages
from pxcompress.registry import option

CLASSES = tuple("23456789ABCDEFGHIJKLMNOPQRSTUVWXYZadehnr")
SIZE = SIDE
PARTS = ("train", "select", "held-out")
LIMITS = {"score": 512, "repair": 1024, "select": 1000, "certify": 2000}
# Named, not searched for: a new font in matplotlib must not change the data set.
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)

_VERSION = 1  # part of the cache key: raise it whenever an image changes
_CANVAS = 2 * SIZE
_FONT_SIZE = 44  # a capital is about half of the canvas high

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@EMBEDDED.register("glyphs")
@dataclass(frozen=True)
class Glyphs(LearnedHere):
    """Characters in 22 fonts on clutter, drawn on the spot."""

    train: int = option(16000, "images to train, score and repair on", low=1)
    select: int = option(1000, "images to select with", low=1)
    held_out: int = option(4000, "images to certify and test on", low=1)

    def source(self, spec: str) -> Source:
        """The first images of each part."""
        pools = []
        for part, count in zip(PARTS, (self.train, self.select, self.held_out), strict=True):
            images, labels = glyph_arrays(part, count)
            ids = [f"glyphs/{part}/{index}" for index in range(count)]
            pools.append(Samples.of(ids, labels, StoredImages(images)))
        train, select, held_out = pools
        return Source(spec, CLASSES, True, SIDE, train, select, held_out, limits=LIMITS, mask=covered)


def glyph_image(label: int, rng: np.random.Generator) -> Image.Image:
    """An RGB image, 32 x 32, of `CLASSES[label]` on clutter; all randomness comes from `rng`."""
    return _drawn(label, rng)[0]


def glyph_mask(part: str, index: int, seed: int = 0) -> NDArray[np.bool_]:
    """Where the character of sample `index` of a part is, (32, 32): the pixels that it covers by half or more."""
    mask = _drawn(index % len(CLASSES), _rng(part, index, seed))[1]
    return np.asarray(mask.reduce(2)) >= 128


def covered(sample: str) -> NDArray[np.bool_]:
    """Where the character is in the sample with this id, such as "glyphs/train/17": (32, 32)."""
    _, part, index = sample.split("/")
    return glyph_mask(part, int(index))


def _drawn(label: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """The image, and its character as a mask of the canvas, "L"."""
    ground = rng.uniform(30, 225, 3)
    canvas = _gradient(ground, rng)
    _draw_clutter(canvas, ground, rng)
    for _ in range(rng.integers(1, 4)):
        _paste(canvas, int(rng.integers(len(CLASSES))), _near(ground, rng, 6, 26), rng, spread=26)
    mask = _paste(canvas, label, _near(ground, rng, 45, 115), rng, spread=5)
    small = np.asarray(canvas.reduce(2), dtype=np.float32)
    noise = rng.standard_normal(small.shape, dtype=np.float32) * np.float32(rng.uniform(2, 10))
    return Image.fromarray((small + noise).clip(0, 255).astype(np.uint8)), mask


def glyph_arrays(part: str, count: int, seed: int = 0) -> tuple[Images, Labels]:
    """The first `count` samples of a part ("train", "select" or "held-out"): (n, 32, 32, 3) uint8 and (n,) int64.

    Labels go round, so that classes are even. Images are kept in the cache folder and made again where the file there
    is missing or damaged.
    """
    key = f"{_VERSION}/{part}/{count}/{seed}/{CLASSES}/{FONTS}/{PIL.__version__}/{matplotlib.__version__}"
    path = cache_dir() / f"glyphs-{part}-{count}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    images = _read(path, count)
    if images is None:
        images = np.empty((count, SIZE, SIZE, 3), np.uint8)
        for index, label in enumerate(labels):
            images[index] = np.asarray(glyph_image(int(label), _rng(part, index, seed)))
        _write(path, images)
    return images, labels


def font_path(name: str) -> Path:
    """File of a font that matplotlib ships."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


def _rng(part: str, index: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, PARTS.index(part), index])


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path(name)), _FONT_SIZE)


@cache
def _mask(character: str, font: str) -> Image.Image:
    """The character in the middle of a canvas, "L"."""
    left, top, right, bottom = _font(font).getbbox(character)
    mask = Image.new("L", (_CANVAS, _CANVAS))
    where = ((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2)
    ImageDraw.Draw(mask).text(where, character, fill=255, font=_font(font))
    return mask


def _near(ground: NDArray[np.float64], rng: np.random.Generator, low: float, high: float) -> tuple[int, int, int]:
    """A colour whose mean lies `low` to `high` grey levels from that of `ground`, towards the side with more room."""
    step = rng.uniform(low, high) * (1 if ground.mean() < 128 else -1)
    tint = rng.uniform(-40, 40, 3)
    red, green, blue = (ground + step + tint - tint.mean()).clip(0, 255).astype(int).tolist()
    return red, green, blue


def _gradient(ground: NDArray[np.float64], rng: np.random.Generator) -> Image.Image:
    """A canvas that goes linearly from one colour to another one, `ground` in the middle."""
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(-1, 1, _CANVAS)
    along = math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None]
    colours = ground + along[..., None] * rng.uniform(-18, 18, 3)
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8))


def _draw_clutter(canvas: Image.Image, ground: NDArray[np.float64], rng: np.random.Generator) -> None:
    """Draws blobs and lines onto the canvas, in place."""
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(0, _CANVAS, 2)
        width, height = rng.uniform(4, 14, 2)
        draw.ellipse((x - width, y - height, x + width, y + height), fill=_near(ground, rng, 4, 30))
    for _ in range(rng.integers(0, 5)):
        start_x, start_y, end_x, end_y = rng.uniform(0, _CANVAS, 4)
        colour = _near(ground, rng, 8, 50)
        draw.line((start_x, start_y, end_x, end_y), fill=colour, width=int(rng.integers(1, 5)))


def _paste(
    canvas: Image.Image, label: int, colour: tuple[int, int, int], rng: np.random.Generator, spread: float
) -> Image.Image:
    """Draws a distorted character onto the canvas, in place, up to `spread` pixels off its middle; its mask, "L"."""
    mask = _mask(CLASSES[label], FONTS[rng.integers(len(FONTS))])
    warped = mask.transform(mask.size, Image.Transform.PERSPECTIVE, _distortion(rng, spread), Image.Resampling.BICUBIC)
    canvas.paste(colour, mask=warped)
    return warped


def _distortion(rng: np.random.Generator, spread: float) -> tuple[float, ...]:
    """The 8 numbers of a random map from canvas to character: shift, turn, shear, scale, perspective."""
    shift_x, shift_y = rng.uniform(-spread, spread, 2) + _CANVAS / 2
    turn = math.radians(rng.uniform(-22, 22))
    stretch_x, stretch_y = rng.uniform(0.85, 1.15, 2) * rng.uniform(0.8, 1.4)
    to_origin = np.array([[1, 0, -shift_x], [0, 1, -shift_y], [0, 0, 1]])
    rotation = np.array([[math.cos(turn), math.sin(turn), 0], [-math.sin(turn), math.cos(turn), 0], [0, 0, 1]])
    shear = np.array([[1, rng.uniform(-0.2, 0.2), 0], [0, 1, 0], [0, 0, 1]])
    scale = np.diag([1 / stretch_x, 1 / stretch_y, 1])
    tilt = np.array([[1, 0, 0], [0, 1, 0], [*rng.uniform(-0.004, 0.004, 2), 1]])
    to_middle = np.array([[1, 0, _CANVAS / 2], [0, 1, _CANVAS / 2], [0, 0, 1]])
    matrix = to_middle @ tilt @ scale @ shear @ rotation @ to_origin
    return tuple((matrix / matrix[2, 2]).flatten()[:8].tolist())


def _read(path: Path, count: int) -> Images | None:
    """Images of a cache file, or None where there is no such file or it is damaged."""
    try:
        with np.load(path) as archive:
            images: Images = archive["images"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return images if images.shape == (count, SIZE, SIZE, 3) else None


def _write(path: Path, images: Images) -> None:
    """Writes beside the final place, then renames: another process never reads half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, images=images)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
