"""Embedded data for tasks other than classification, made of the characters of `glyphs`.

`glyph-masks`, `glyph-counts` and `glyph-labels` show one to four characters in the quarters of an image of 40 x 40
pixels: which pixels belong to what kind of character, how many there are, and which ones. `glyph-identities` are single
characters, and those of select and held-out are none of those trained on. A sample depends only on its part and index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pxcompress.data.embedded import EMBEDDED
from pxcompress.data.samples import Samples, Source
from pxcompress.data.targets import Targets, Values
from pxcompress.demo.baseline import GeneratedData
from pxcompress.demo.drawing import FONTS, Place, draw_clutter, gradient, make_similar_colour, paste, reduce_canvas
from pxcompress.demo.glyphs import CLASSES, PARTS, glyph_image
from pxcompress.demo.images import SIDE, StoredImages, StoredMasks, cached_arrays
from pxcompress.registry import option

SCENE_SIDE = 40
"""Side of an image with several characters, in pixels."""

KINDS = {"digit": "23456789", "vowel": "AEIOUY", "consonant": "BCDFGHJKLMNPQRSTVWXZ", "lower case": "adehnr"}
"""Class name -> its characters, for the masks of `glyph-masks`; everything else is background."""

LABELS = tuple("2478AEKRSX")
"""The characters that `glyph-labels` asks for."""

COUNT_NAMES = ("characters", "digits")
"""The two counts that are the targets of `glyph-counts`, for each image."""

LIMITS = {"score": 512, "repair": 1024, "select": 600, "certify": 500}

_VERSION = 1  # part of the cache key: raise it whenever an image changes
_QUARTER = (
    SCENE_SIDE / 2
)  # of the canvas, which is twice the image, in its pixels: where the first character's middle is
_MOST = 4

Scene = tuple[NDArray[np.uint8], NDArray[np.uint8], tuple[str, ...]]
"""An image (40, 40, 3), an array (40, 40) that numbers the character at each pixel (0: none), and the characters."""


@dataclass(frozen=True)
class _Scenes(GeneratedData):
    """A base class of data sets of scenes; its fields say how many images each part has."""

    train: int = option(6000, "images to train, score and repair on", low=1)
    select: int = option(600, "images to select with", low=1)
    held_out: int = option(2500, "images to certify and test on", low=1)


@EMBEDDED.register("glyph-masks")
@dataclass(frozen=True)
class GlyphMasks(_Scenes):
    """Images to segment: pixels of digits, vowels, consonants, lower-case letters, and background."""

    def source(self, spec: str) -> Source:
        """The first images of each part, with masks."""
        kinds = tuple(KINDS.values())
        number = {character: 1 + kind for kind, characters in enumerate(kinds) for character in characters}

        def pool(part: str, count: int) -> Samples:
            images, owners, characters = draw_scenes(part, count, kinds)
            kinds_shown = np.array([[0, *(number.get(each, 0) for each in row)] for row in characters], np.uint8)
            masks = kinds_shown[np.arange(count)[:, None, None], owners]
            return _make_samples(f"glyph-masks/{part}", images, StoredMasks(masks))

        return Source(spec, ("background", *KINDS), True, SCENE_SIDE, *self.pools(pool), limits=LIMITS, layout="masks")


@EMBEDDED.register("glyph-counts")
@dataclass(frozen=True)
class GlyphCounts(_Scenes):
    """Images with two numbers to predict: how many characters there are, and how many of them are digits."""

    def source(self, spec: str) -> Source:
        """The first images of each part, with two numbers each."""
        digits = KINDS["digit"]

        def pool(part: str, count: int) -> Samples:
            images, _, characters = draw_scenes(part, count, (digits, "".join(CLASSES[len(digits) :])))
            counts = np.stack([characters != "", np.isin(characters, list(digits))]).sum(2).T.astype(np.float32)
            return _make_samples(f"glyph-counts/{part}", images, Values(counts))

        return Source(spec, COUNT_NAMES, True, SCENE_SIDE, *self.pools(pool), limits=LIMITS, layout="numbers")


@EMBEDDED.register("glyph-labels")
@dataclass(frozen=True)
class GlyphLabels(_Scenes):
    """Images with several labels: which of ten characters occur."""

    def source(self, spec: str) -> Source:
        """The first images of each part, with a yes or no for every character."""

        def pool(part: str, count: int) -> Samples:
            images, _, characters = draw_scenes(part, count, LABELS)
            occurs = (characters[:, :, None] == np.array(LABELS)).any(1).astype(np.float32)
            return _make_samples(f"glyph-labels/{part}", images, Values(occurs))

        return Source(spec, LABELS, True, SCENE_SIDE, *self.pools(pool), limits=LIMITS, layout="labels")


@EMBEDDED.register("glyph-identities")
@dataclass(frozen=True)
class GlyphIdentities(_Scenes):
    """Single characters to be retrieved; characters of select and held-out do not occur in training."""

    def source(self, spec: str) -> Source:
        """The first images of each part; half of the 40 characters are used for training."""
        identities = np.arange(len(CLASSES))
        classes_of_part = {"train": identities[1::2], "select": identities[2::4], "held-out": identities[0::4]}

        def pool(part: str, count: int) -> Samples:
            part_classes = classes_of_part[part]
            labels = part_classes[np.arange(count) % len(part_classes)]

            def draw() -> dict[str, NDArray[np.generic]]:
                pictures = [glyph_image(int(label), _make_rng(part, index)) for index, label in enumerate(labels)]
                return {"images": np.stack([np.asarray(image) for image in pictures])}

            key = f"{_VERSION}/{part}/{count}/{CLASSES}/{FONTS}/{part_classes.tolist()}"
            shape = {"images": (count, SIDE, SIDE, 3)}
            images = cached_arrays(f"glyph-identities-{part}-{count}", key, shape, draw)["images"]
            ids = [f"glyph-identities/{part}/{index}" for index in range(count)]
            return Samples.of(ids, labels, StoredImages(images.astype(np.uint8, copy=False)))

        return Source(spec, CLASSES, True, SIDE, *self.pools(pool), limits=LIMITS, layout="identities")


def draw_scene(characters: tuple[str, ...], rng: np.random.Generator) -> Scene:
    """One to four characters on clutter, each in its own quarter.

    `characters` are kinds, of which one is drawn first for each.
    """
    background = rng.uniform(30, 225, 3)
    canvas = gradient(background, rng, 2 * SCENE_SIDE)
    draw_clutter(canvas, background, rng)
    owners = np.zeros((SCENE_SIDE, SCENE_SIDE), np.uint8)
    quarters = rng.permutation(4)[: rng.integers(1, _MOST + 1)]
    drawn_characters = []
    for number, quarter in enumerate(quarters, 1):
        kind = characters[rng.integers(len(characters))]
        drawn_characters.append(kind[rng.integers(len(kind))])
        place = Place(_QUARTER * (1 + 2 * (quarter % 2)), _QUARTER * (1 + 2 * (quarter // 2)), 5, 0.75)
        mask = paste(canvas, drawn_characters[-1], make_similar_colour(background, rng, 55, 125), rng, place)
        owners[np.asarray(mask.reduce(2)) >= 128] = number
    return reduce_canvas(canvas, rng), owners, tuple(drawn_characters)


def draw_scenes(
    part: str, count: int, characters: tuple[str, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.str_]]:
    """The first `count` scenes of a part, as three arrays: images, character number of each pixel, and characters (n,
    4).

    Where a scene has fewer than four, the character is "". `characters` are kinds of characters, all kinds equally
    likely. Results are stored in the cache folder.
    """

    def draw() -> dict[str, NDArray[np.generic]]:
        scenes_of_part = [draw_scene(characters, _make_rng(part, index)) for index in range(count)]
        names = [
            (*scene_characters, *[""] * (_MOST - len(scene_characters))) for _, _, scene_characters in scenes_of_part
        ]
        images, owners = (np.stack([each[place] for each in scenes_of_part]) for place in (0, 1))
        return {"images": images, "owners": owners, "characters": np.array(names)}

    sizes = (count, SCENE_SIDE, SCENE_SIDE)
    shapes = {"images": (*sizes, 3), "owners": sizes, "characters": (count, _MOST)}
    arrays = cached_arrays(
        f"glyph-scenes-{part}-{count}", f"{_VERSION}/{part}/{count}/{characters}/{FONTS}", shapes, draw
    )
    images, owners = (arrays[name].astype(np.uint8, copy=False) for name in ("images", "owners"))
    return images, owners, arrays["characters"].astype(np.str_, copy=False)


def _make_samples(name: str, images: NDArray[np.uint8], targets: Targets) -> Samples:
    ids = [f"{name}/{index}" for index in range(len(images))]
    return Samples.of(ids, np.zeros(len(images), np.int64), StoredImages(images), targets)


def _make_rng(part: str, index: int) -> np.random.Generator:
    return np.random.default_rng([0, PARTS.index(part), index])
