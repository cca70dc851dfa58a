"""Heatmaps as pictures: small PNGs for a page, and figures of a case as PNG and SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from pxcompress.report.explanation import Case, Map

COLOURS = "RdBu_r"
"""Red speaks for the class, blue against it; told apart by people who are colour-blind, too."""

_FULL = 99.5
"""Percentile of the sizes of relevances that has the full colour: one pixel must not take all of it."""


def panels(case: Case) -> Sequence[tuple[str, NDArray[np.uint8]]]:
    """What is shown of a case, from left to right: title and picture, (height, width, 3) uint8."""
    shown = [
        ("input", case.pictures.image),
        (f"dense: why {case.dense.name}", coloured(case.pictures.dense)),
        (f"pruned: why {case.dense.name}", coloured(case.pictures.pruned)),
    ]
    if case.pictures.own is not None:
        shown.append((f"pruned: why {case.pruned.name}", coloured(case.pictures.own)))
    return shown


def coloured(relevance: Map) -> NDArray[np.uint8]:
    """A map (height, width) in colours, scaled by its own largest sizes; white is 0."""
    limit = float(np.percentile(np.abs(relevance), _FULL)) or float(np.abs(relevance).max()) or 1.0
    scaled = (relevance / limit).clip(-1, 1) / 2 + 0.5
    return matplotlib.colormaps[COLOURS](scaled, bytes=True)[..., :3]


def png(picture: NDArray[np.uint8]) -> bytes:
    """A picture as a PNG file, pixel for pixel."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def figure(case: Case) -> dict[str, bytes]:
    """A case side by side, as the files "png" and "svg"."""
    shown = panels(case)
    drawn = Figure(figsize=(2.4 * len(shown), 2.9), layout="constrained")
    FigureCanvasAgg(drawn)
    for axes, (title, picture) in zip(drawn.subplots(1, len(shown)), shown, strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title, fontsize=8, wrap=True, parse_math=False)
    drawn.suptitle(f"{case.kind}: {case.sample}", fontsize=9, parse_math=False)
    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "pxcompress", "svg.fonttype": "none"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            file = io.BytesIO()
            drawn.savefig(file, format=kind, dpi=150, metadata=metadata)
            files[kind] = file.getvalue()
    return files
