"""The embedded data set `glyph-boxes`: none to five characters on clutter, 64 x 64 RGB, and the box of each.

A sample depends only on its part and index. Characters may overlap a little, some are small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pxcompress.data.embedded import EMBEDDED
from pxcompress.data.samples import Samples, Source
from pxcompress.data.targets import BoxRows
from pxcompress.demo.baseline import GeneratedData
from pxcompress.demo.drawing import FONTS, Place, draw_clutter, gradient, make_similar_colour, paste, reduce_canvas
from pxcompress.demo.glyphs import PARTS
from pxcompress.demo.images import StoredImages, cached_arrays
from pxcompress.registry import option

LETTERS = tuple("24AEKRSX")
"""The characters to detect."""

SIDE = 64
"""Side of an image, pixels."""

LIMITS = {"score": 512, "repair": 1024, "select": 400, "certify": 500}

_VERSION = 1  # part of the cache key: raise it whenever an image changes
_MOST = 5
_OVERLAP = 0.2  # of a character's box, at most, that those drawn before it may cover


@EMBEDDED.register("glyph-boxes")
@dataclass(frozen=True)
class GlyphBoxes(GeneratedData):
    """Boxes around characters of eight kinds."""

    train: int = option(4000, "images to train, score and repair on", low=1)
    select: int = option(400, "images to select with", low=1)
    held_out: int = option(2000, "images to certify and test on", low=1)

    def source(self, spec: str) -> Source:
        """The first images of each part, with boxes."""
        return Source(spec, LETTERS, True, SIDE, *self.pools(_pool), limits=LIMITS, layout="boxes")


def _pool(part: str, count: int) -> Samples:
    images, boxes = arrays(part, count)
    ids = tuple(f"glyph-boxes/{part}/{index}" for index in range(count))
    rows = tuple(each[each[:, 0] >= 0] for each in boxes)
    targets = BoxRows(rows, ((SIDE, SIDE),) * count, ids, len(LETTERS), most=_MOST)
    return Samples.of(ids, np.zeros(count, np.int64), StoredImages(images), targets)


def arrays(part: str, count: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The first `count` images of a part, and their boxes (n, 5, 6) as in `BoxRows`; unused rows have class -1."""

    def draw() -> dict[str, NDArray[np.generic]]:
        drawn = [_draw(np.random.default_rng([1, PARTS.index(part), index])) for index in range(count)]
        return {"images": np.stack([image for image, _ in drawn]), "boxes": np.stack([boxes for _, boxes in drawn])}

    shapes = {"images": (count, SIDE, SIDE, 3), "boxes": (count, _MOST, 6)}
    key = f"{_VERSION}/{part}/{count}/{LETTERS}/{FONTS}"
    stored = cached_arrays(f"glyph-boxes-{part}-{count}", key, shapes, draw)
    return stored["images"].astype(np.uint8, copy=False), stored["boxes"].astype(np.float64, copy=False)


def _draw(rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """An image (64, 64, 3), drawn at twice its size and reduced, and its boxes (5, 6)."""
    background = rng.uniform(30, 225, 3)
    canvas = gradient(background, rng, 2 * SIDE)
    draw_clutter(canvas, background, rng)
    boxes = np.tile([-1.0, 0, 0, 0, 0, 0], (_MOST, 1))
    covered = np.zeros((2 * SIDE, 2 * SIDE), bool)
    for number in range(rng.integers(0, _MOST + 1)):
        kind = int(rng.integers(len(LETTERS)))
        x, y = rng.uniform(20, 2 * SIDE - 20, 2)
        trial = canvas.copy()
        mask = paste(
            trial,
            LETTERS[kind],
            make_similar_colour(background, rng, 50, 120),
            rng,
            Place(x, y, 0, rng.uniform(0.5, 1.0)),
        )
        shown = np.asarray(mask) >= 128
        if not shown.any():
            continue
        (top, bottom), (left, right) = ((each.min(), each.max() + 1) for each in np.nonzero(shown))
        if covered[top:bottom, left:right].mean() > _OVERLAP:
            continue
        covered[top:bottom, left:right] = True
        canvas = trial
        boxes[number] = [kind, left / 2, top / 2, right / 2, bottom / 2, 0]
    return reduce_canvas(canvas, rng), boxes
