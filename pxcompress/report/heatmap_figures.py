"""Draws heatmaps: small PNGs for a page, and figures of cases as PNG and SVG."""

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
"""Colour map: red is evidence for the class, blue against it; colour-blind people can tell them apart."""

_FULL = 99.5
"""Percentile of absolute relevance that gets the full colour, so that one pixel does not take the whole scale."""

_PER_LINE, _CELL, _GAP = 40, (20, 28), 8
"""For sequences: positions in a line; width and height of a cell, and space between lines, in pixels."""

MARKS = ("red", "lime", "yellow", "cyan", "magenta", "orange", "white", "deepskyblue")
"""Colours for boxes and regions, assigned to class numbers in turn."""

_MARKED, _LETTER = 320, 20
"""Least length of the longer side of an image that is drawn on, and height of letters, in pixels."""

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture (height, width, 3) uint8 of a case, its title, and a description for readers who do not see it."""

    title: str
    description: str
    picture: NDArray[np.uint8]


def list_panels(case: Case) -> Sequence[Panel]:
    """The pictures of a case: the input, with both models' answers drawn on it if they can be, and heatmaps."""
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
    """An image enlarged enough to read, with boxes and their names, or the outlines of regions."""
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
    """An image with the outlines of regions, two pixels wide, in the colour of each region."""
    edges = np.zeros(regions.shape, dtype=bool)
    for step in (1, 2):
        edges[step:] |= regions[step:] != regions[:-step]
        edges[:, step:] |= regions[:, step:] != regions[:, :-step]
    inks = np.array([ImageColor.getrgb(name) for name in MARKS], dtype=np.uint8)
    return np.where(edges[..., None], inks[regions % len(MARKS)], image)


def draw_line(colours: NDArray[np.uint8], text: Sequence[str]) -> NDArray[np.uint8]:
    """A picture (height, width, 3) of a sequence: a coloured cell for each position, with its letter if any.

    There are `_PER_LINE` cells in a line; if the text has words, cells are as wide as these.
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
    """A picture of words as cells one after the other, in lines of the usual width."""
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
    """A map (...) of relevance as colours (..., 3), scaled by its own largest values; white is 0."""
    limit = float(np.percentile(np.abs(relevance), _FULL)) or float(np.abs(relevance).max()) or 1.0
    positions = (relevance / limit).clip(-1, 1) / 2 + 0.5
    return matplotlib.colormaps[COLOURS](positions, bytes=True)[..., :3]


def encode_png(picture: NDArray[np.uint8]) -> bytes:
    """The content of a PNG file with the picture."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def draw_case(case: Case) -> dict[str, bytes]:
    """A figure of a case as contents of files, "png" and "svg"; panels are side by side, sequences below each other."""
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
