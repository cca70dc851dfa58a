"""Draws the images of `glyphs`: random clutter, and on it distorted characters in 22 fonts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pxcompress.demo.images import SIDE

# Named, not searched for: a new font in matplotlib must not change the data set.
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)

CANVAS = 2 * SIDE
"""Side in pixels of the canvas for a single character, twice that of the final image."""

_FONT_SIZE = 44  # a capital is about half of the canvas high

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Place:
    """Where a character goes on a canvas: its centre, how far it may be shifted at random, and its scale."""

    x: float = CANVAS / 2
    y: float = CANVAS / 2
    spread: float = 5.0
    scale: float = 1.0


def font_path(name: str) -> Path:
    """Path of a font file that matplotlib ships."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


@cache
def _load_font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_path(name)), _FONT_SIZE)


@cache
def character_mask(character: str, font: str) -> Image.Image:
    """A grey picture (mode "L") of a character in the middle of a canvas."""
    left, top, right, bottom = _load_font(font).getbbox(character)
    mask = Image.new("L", (CANVAS, CANVAS))
    position = ((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2)
    ImageDraw.Draw(mask).text(position, character, fill=255, font=_load_font(font))
    return mask


def make_similar_colour(background: NDArray[np.float64], rng: np.random.Generator, low: float, high: float) -> Colour:
    """A colour whose mean is `low` to `high` grey levels brighter than `background`, or darker if that is bright."""
    step = rng.uniform(low, high) * (1 if background.mean() < 128 else -1)
    tint = rng.uniform(-40, 40, 3)
    red, green, blue = (background + step + tint - tint.mean()).clip(0, 255).astype(int).tolist()
    return red, green, blue


def gradient(background: NDArray[np.float64], rng: np.random.Generator, side: int = CANVAS) -> Image.Image:
    """A square canvas filled with a linear colour gradient, with the colour `background` in the middle."""
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(-1, 1, side)
    along = math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None]
    colours = background + along[..., None] * rng.uniform(-18, 18, 3)
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8))


def draw_clutter(canvas: Image.Image, background: NDArray[np.float64], rng: np.random.Generator) -> None:
    """Draw a few ellipses and lines onto the canvas, in place, in colours near to `background` (red, green, blue)."""
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 4)):
        x, y = rng.uniform(0, canvas.width, 2)
        width, height = rng.uniform(4, 14, 2)
        draw.ellipse((x - width, y - height, x + width, y + height), fill=make_similar_colour(background, rng, 4, 30))
    for _ in range(rng.integers(0, 5)):
        start_x, start_y, end_x, end_y = rng.uniform(0, canvas.width, 4)
        colour = make_similar_colour(background, rng, 8, 50)
        draw.line((start_x, start_y, end_x, end_y), fill=colour, width=int(rng.integers(1, 5)))


def paste(canvas: Image.Image, character: str, colour: Colour, rng: np.random.Generator, place: Place) -> Image.Image:
    """Draw a distorted character in a random font onto the canvas, in place; returns its mask (mode "L")."""
    mask = character_mask(character, FONTS[rng.integers(len(FONTS))])
    warped_mask = mask.transform(
        canvas.size, Image.Transform.PERSPECTIVE, _make_distortion(rng, place), Image.Resampling.BICUBIC
    )
    canvas.paste(colour, mask=warped_mask)
    return warped_mask


def _make_distortion(rng: np.random.Generator, place: Place) -> tuple[float, ...]:
    """The 8 numbers of a random perspective map from canvas to character: shift, rotation, shear, scale,
    perspective.
    """
    shift_x, shift_y = rng.uniform(-place.spread, place.spread, 2) + np.array([place.x, place.y])
    turn = math.radians(rng.uniform(-22, 22))
    stretch_x, stretch_y = rng.uniform(0.85, 1.15, 2) * rng.uniform(0.8, 1.4) * place.scale
    to_origin = np.array([[1, 0, -shift_x], [0, 1, -shift_y], [0, 0, 1]])
    rotation = np.array([[math.cos(turn), math.sin(turn), 0], [-math.sin(turn), math.cos(turn), 0], [0, 0, 1]])
    shear = np.array([[1, rng.uniform(-0.2, 0.2), 0], [0, 1, 0], [0, 0, 1]])
    scale = np.diag([1 / stretch_x, 1 / stretch_y, 1])
    tilt = np.array([[1, 0, 0], [0, 1, 0], [*rng.uniform(-0.004, 0.004, 2), 1]])
    to_middle = np.array([[1, 0, CANVAS / 2], [0, 1, CANVAS / 2], [0, 0, 1]])
    matrix = to_middle @ tilt @ scale @ shear @ rotation @ to_origin
    return tuple((matrix / matrix[2, 2]).flatten()[:8].tolist())


def reduce_canvas(canvas: Image.Image, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The canvas reduced to half its size, with noise added: (height, width, 3) uint8."""
    small = np.asarray(canvas.reduce(2), dtype=np.float32)
    noise = rng.standard_normal(small.shape, dtype=np.float32) * np.float32(rng.uniform(2, 10))
    return (small + noise).clip(0, 255).astype(np.uint8)
