"""Heatmaps as pictures: small PNGs for a page, and figures of a case as PNG and SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from pxcompress.report.explanation import Case, Map, Marks

COLOURS = "RdBu_r"
"""Red speaks for the class, blue against it; told apart by people who are colour-blind, too."""

_FULL = 99.5
"""Percentile of the sizes of relevances that has the full colour: one pixel must not take all of it."""

_PER_LINE, _CELL, _GAP = 40, (20, 28), 8
"""Positions in a line of what is no image, width and height of each, and the space between two lines, in pixels."""

MARKS = ("red", "lime", "yellow", "cyan", "magenta", "orange", "white", "deepskyblue")
"""Colours of boxes and regions, by the numbers of their classes in turns."""

_MARKED, _LETTER = 320, 20
"""Length of the longer side that images get at least before something is drawn on them, and of letters, in pixels."""

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture (height, width, 3) uint8 of a case, its title, and what it is for those who do not see it."""

    title: str
    description: str
    picture: NDArray[np.uint8]


def list_panels(case: Case) -> Sequence[Panel]:
    """What is shown of a case: the input, with what both models draw on it if they do, and the heatmaps."""
    pictures, subject = case.pictures, case.subjects[0]
    panels = [
        Panel(
            f"{name}: {answer.name}",
            f"the input with the answer of the {name} model",
            draw_marks(pictures.image, marks),
        )
        for name, answer, marks in zip(("dense", "pruned"), (case.dense, case.pruned), pictures.marks, strict=False)
    ] or [Panel("input", "the input", pictures.image)]
    panels += [
        Panel(f"dense: why {subject}", "heatmap of the dense model", colour(pictures.dense)),
        Panel(f"pruned: why {subject}", "heatmap of the pruned model, same subject", colour(pictures.pruned)),
    ]
    if pictures.own is not None:
        panels.append(
            Panel(
                f"pruned: why {case.subjects[1]}", "heatmap of the pruned model, its own subject", colour(pictures.own)
            )
        )
    return [
        replace(panel, picture=draw_line(panel.picture, pictures.text)) if pictures.is_line else panel
        for panel in panels
    ]


def draw_marks(image: NDArray[np.uint8], marks: Marks) -> NDArray[np.uint8]:
    """An image with boxes and their names, or with the outlines of regions, large enough for them to be read."""
    scale = max(1, -(-_MARKED // max(image.shape[:2])))
    picture = Image.fromarray(image.repeat(scale, 0).repeat(scale, 1))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_LETTER)
    if marks.regions is not None:
        return _draw_outlines(np.asarray(picture), marks.regions.repeat(scale, 0).repeat(scale, 1))
    for box, number, name in zip(marks.boxes, marks.classes, marks.names, strict=True):
        ink = MARKS[number % len(MARKS)]
        left, top, right, bottom = (scale * value for value in box)
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=ink, width=3)
        text_top = top - _LETTER if top >= _LETTER else bottom + 1
        draw.rectangle(draw.textbbox((left, text_top), name, font), fill="black")
        draw.text((left, text_top), name, ink, font)
    return np.asarray(picture)


def _draw_outlines(image: NDArray[np.uint8], regions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """An image with a line in the colour of each region at its edges, two pixels wide."""
    edges = np.zeros(regions.shape, dtype=bool)
    for step in (1, 2):
        edges[step:] |= regions[step:] != regions[:-step]
        edges[:, step:] |= regions[:, step:] != regions[:, :-step]
    inks = np.array([ImageColor.getrgb(name) for name in MARKS], dtype=np.uint8)
    return np.where(edges[..., None], inks[regions % len(MARKS)], image)


def draw_line(colours: NDArray[np.uint8], text: Sequence[str]) -> NDArray[np.uint8]:
    """Positions (n, 3) as cells with their letters, if there are any, `_PER_LINE` to a line: (height, width, 3).

    Cells of words are as wide as these.
    """
    if any(len(word) > 1 for word in text):
        return _draw_words(colours, text)
    width, height = _CELL
    lines = -(-len(colours) // _PER_LINE)
    picture = Image.new("RGB", (_PER_LINE * width, lines * (height + _GAP) - _GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(0.7 * height)
    for place, colour in enumerate(colours.tolist()):
        left, top = place % _PER_LINE * width, place // _PER_LINE * (height + _GAP)
        draw.rectangle((left, top, left + width - 1, top + height - 1), tuple(colour))
        ink = "black" if np.dot(colour, _LUMA) > 110 else "white"
        draw.text((left + width / 2, top + height / 2), "".join(text[place : place + 1]), ink, font, "mm")
    return np.asarray(picture)


def _draw_words(colours: NDArray[np.uint8], words: Sequence[str]) -> NDArray[np.uint8]:
    """Words as cells one behind the other, in lines of the usual width."""
    width, height = _CELL
    font, across = ImageFont.load_default(0.6 * height), _PER_LINE * width
    cells, left, top = [], 0, 0
    for word in words:
        room = min(int(font.getlength(word)) + _GAP, across)
        if left + room > across:
            left, top = 0, top + height + _GAP
        cells.append((left, top, left + room - 1, top + height - 1))
        left += room + 1
    picture = Image.new("RGB", (across, top + height), "white")
    draw = ImageDraw.Draw(picture)
    for cell, word, colour in zip(cells, words, colours.tolist(), strict=True):
        draw.rectangle(cell, tuple(colour))
        ink = "black" if np.dot(colour, _LUMA) > 110 else "white"
        draw.text(((cell[0] + cell[2]) / 2, cell[1] + height / 2), word, ink, font, "mm")
    return np.asarray(picture)


def colour(relevance: Map) -> NDArray[np.uint8]:
    """A map (...) in colours (..., 3), scaled by its own largest sizes; white is 0."""
    limit = float(np.percentile(np.abs(relevance), _FULL)) or float(np.abs(relevance).max()) or 1.0
    positions = (relevance / limit).clip(-1, 1) / 2 + 0.5
    return matplotlib.colormaps[COLOURS](positions, bytes=True)[..., :3]


def encode_png(picture: NDArray[np.uint8]) -> bytes:
    """A picture as a PNG file, pixel for pixel."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def draw_case(case: Case) -> dict[str, bytes]:
    """A case side by side, lines under each other, as the files "png" and "svg"."""
    pictures = list_panels(case)
    across, down = (1, len(pictures)) if case.pictures.is_line else (len(pictures), 1)
    size = (8, 1.9 * down) if case.pictures.is_line else (2.4 * across, 2.9)
    canvas = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(canvas)
    for axes, panel in zip(canvas.subplots(down, across), pictures, strict=True):
        axes.imshow(panel.picture, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(panel.title, fontsize=8, wrap=True, parse_math=False)
    canvas.suptitle(f"{case.kind}: {case.sample}", fontsize=9, parse_math=False)
    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "pxcompress", "svg.fonttype": "none"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            file = io.BytesIO()
            canvas.savefig(file, format=kind, dpi=150, metadata=metadata)
            files[kind] = file.getvalue()
    return files
