"""The embedded data set `spiral`: two angular spirals in the plane, for which the smallest networks are known.

From "Sparsest Models Elude Pruning" (Zhang and Papyan, ICML 2024): a polyline of 16 pieces, twice, moved apart along
the radius; each is one class. A ReLU network of widths (3, 3, 3) is known to reach 95 %, one of (7, 3, 3) 99.5 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pxcompress.data.embedded import EMBEDDED
from pxcompress.data.samples import Numbers, Samples, Source, cut
from pxcompress.demo.baseline import DataWithBaseline

CLASSES = ("inner", "outer")
POINTS = 25_000
"""Number of points of each class, evenly spaced along its spiral; nothing is random."""

SHIFT = 15.0
"""Distance of each class from the middle line, inwards for one and outwards for the other."""

SIZES = (40000, 2000, 8000)
"""Number of points to train on, to select with, and held out."""

LIMITS = {"score": 512, "repair": 1024, "select": 1000, "certify": 2000}


@EMBEDDED.register("spiral")
@dataclass(frozen=True)
class Spiral(DataWithBaseline):
    """Points of two angular ("cubist") spirals in the plane, one for each class."""

    def source(self, spec: str) -> Source:
        """The data: all points."""
        points, labels = spiral_arrays()
        samples = Samples.of([f"spiral/{index}" for index in range(len(points))], labels, Numbers(points))
        train, select, held_out = cut(samples, SIZES, np.random.default_rng(0))
        return Source(spec, CLASSES, True, points.shape[1:], train, select, held_out, limits=LIMITS)


def spiral_arrays() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Standardised points (50 000, 2) and labels (50 000,); the inner class first, each from the centre outwards."""
    points = np.concatenate([_place_along(_list_vertices(shift)) for shift in (-SHIFT, SHIFT)])
    standardised_points = (points - points.mean(0)) / points.std(0)
    return standardised_points.astype(np.float32), np.repeat(np.arange(2), POINTS)


def _list_vertices(shift: float) -> NDArray[np.float64]:
    """Corners (17, 2) of the polyline of one class, which is `shift` away from the middle line."""
    angle = np.linspace(np.pi, 5 * np.pi, 17) + 0.4 * np.pi
    radius = 10 * angle + np.pi + shift
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _place_along(vertices: NDArray[np.float64]) -> NDArray[np.float64]:
    """`POINTS` points (POINTS, 2) at equal distances along a polyline, from its first corner to its last."""
    ends = np.concatenate([[0.0], np.hypot(*np.diff(vertices, axis=0).T).cumsum()])
    places = np.linspace(0.0, ends[-1], POINTS)
    return np.stack([np.interp(places, ends, coordinate) for coordinate in vertices.T], axis=1)
