"""The embedded data set `digits`: scikit-learn's handwritten digits, 8 x 8 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pxcompress.data.embedded import EMBEDDED
from pxcompress.data.samples import Samples, Source, cut
from pxcompress.demo.baseline import DataWithBaseline
from pxcompress.demo.images import SIDE, StoredImages

SIZES = (1000, 150, 647)
"""Number of digits to train on, to select with, and held out; 1797 together."""

LIMITS = {"score": 256, "repair": 512, "select": 150, "certify": 150}


@EMBEDDED.register("digits")
@dataclass(frozen=True)
class Digits(DataWithBaseline):
    """Scikit-learn's handwritten digits."""

    def source(self, spec: str) -> Source:
        """All digits, as colour images of 8 x 8 pixels."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        grey = (bunch.images * (255 / 16)).round().astype(np.uint8)
        ids = [f"digits/{index}" for index in range(len(grey))]
        images = StoredImages(np.repeat(grey[..., None], 3, axis=3))
        samples = Samples.of(ids, bunch.target.astype(np.int64), images)
        train, select, held_out = cut(samples, SIZES, np.random.default_rng(0))
        classes = tuple(str(name) for name in bunch.target_names)
        return Source(spec, classes, True, SIDE, train, select, held_out, limits=LIMITS)
