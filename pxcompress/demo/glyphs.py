"""The embedded data set `glyphs`: characters in 22 fonts on clutter, 32 x 32 RGB, generated from the sample's number.

A sample depends only on its part, its index and the seed, so that any part of the set can be made alone. Images are
drawn at twice the size and reduced. The characters leave out pairs that look alike once turned and distorted: 0 and O,
1 and I, and lower-case letters that are small upper-case ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pxcompress.data.embedded import EMBEDDED
from pxcompress.data.samples import Samples, Source
from pxcompress.demo.baseline import GeneratedData
from pxcompress.demo.drawing import FONTS, Place, draw_clutter, gradient, make_similar_colour, paste, reduce_canvas
from pxcompress.demo.images import SIDE, StoredImages, cached_arrays
from pxcompress.registry import option

CLASSES = tuple("23456789ABCDEFGHIJKLMNOPQRSTUVWXYZadehnr")
SIZE = SIDE
PARTS = ("train", "select", "held-out")
LIMITS = {"score": 512, "repair": 1024, "select": 1000, "certify": 2000}

_VERSION = 1  # part of the cache key: raise it whenever an image changes

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@EMBEDDED.register("glyphs")
@dataclass(frozen=True)
class Glyphs(GeneratedData):
    """Characters in 22 fonts on clutter, drawn on the spot."""

    train: int = option(16000, "images to train, score and repair on", low=1)

    def source(self, spec: str) -> Source:
        """The data: the first images of each part."""

        def pool(part: str, count: int) -> Samples:
            images, labels = glyph_arrays(part, count)
            return Samples.of([f"glyphs/{part}/{index}" for index in range(count)], labels, StoredImages(images))

        return Source(spec, CLASSES, True, SIDE, *self.pools(pool), limits=LIMITS, mask=find_covered)


def glyph_image(label: int, rng: np.random.Generator) -> Image.Image:
    """An RGB image, 32 x 32, of `CLASSES[label]` on clutter; all randomness comes from `rng`."""
    return _draw(label, rng)[0]


def glyph_mask(part: str, index: int, seed: int = 0) -> NDArray[np.bool_]:
    """Mask (32, 32) of sample `index` of a part: pixels of which the character covers half or more."""
    mask = _draw(index % len(CLASSES), _make_rng(part, index, seed))[1]
    return np.asarray(mask.reduce(2)) >= 128


def find_covered(sample: str) -> NDArray[np.bool_]:
    """Mask of the character in the sample with this id, such as "glyphs/train/17": (32, 32)."""
    _, part, index = sample.split("/")
    return glyph_mask(part, int(index))


def _draw(label: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """An image, and the mask of its character on the larger canvas, mode "L"."""
    background = rng.uniform(30, 225, 3)
    canvas = gradient(background, rng)
    draw_clutter(canvas, background, rng)
    for _ in range(rng.integers(1, 4)):
        clutter_character = CLASSES[rng.integers(len(CLASSES))]
        paste(canvas, clutter_character, make_similar_colour(background, rng, 6, 26), rng, Place(spread=26))
    mask = paste(canvas, CLASSES[label], make_similar_colour(background, rng, 45, 115), rng, Place())
    return Image.fromarray(reduce_canvas(canvas, rng)), mask


def glyph_arrays(part: str, count: int, seed: int = 0) -> tuple[Images, Labels]:
    """The first `count` samples of a part ("train", "select" or "held-out"): (n, 32, 32, 3) uint8 and (n,) int64.

    Labels go round, so that classes are even. Images are kept in the cache folder and made again where the file there
    is missing or damaged.
    """
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)

    def draw() -> dict[str, NDArray[np.generic]]:
        images = [glyph_image(int(label), _make_rng(part, index, seed)) for index, label in enumerate(labels)]
        return {"images": np.stack([np.asarray(image) for image in images])}

    key = f"{_VERSION}/{part}/{count}/{seed}/{CLASSES}/{FONTS}"
    images = cached_arrays(f"glyphs-{part}-{count}", key, {"images": (count, SIZE, SIZE, 3)}, draw)["images"]
    return images.astype(np.uint8, copy=False), labels


def _make_rng(part: str, index: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, PARTS.index(part), index])
