"""Storage for the images and masks of embedded data sets, and their cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, from_numpy

from pxcompress.cache import cache_dir
from pxcompress.data.resizing import Resize

SIDE = 32
"""Side in pixels of the square images of `glyphs`."""

Arrays = Mapping[str, NDArray[np.generic]]
"""Arrays (n, ...) by name."""


@dataclass(frozen=True, eq=False)
class StoredImages:
    """Opens images by position from an array in memory, (n, height, width, 3) uint8."""

    images: NDArray[np.uint8]

    def __call__(self, position: int) -> Image.Image:
        return Image.fromarray(self.images[position])


@dataclass(frozen=True, eq=False)
class StoredMasks:
    """Targets that are masks from an array in memory, (n, height, width) uint8, resized as their images are."""

    masks: NDArray[np.uint8]

    def __call__(self, position: int, image_size: tuple[int, int] | None, resize: Resize | None) -> Tensor:
        mask = self.masks[position]
        return (from_numpy(mask) if resize is None else resize.mask(Image.fromarray(mask))[0]).long()


def cached_arrays(
    name: str, key: str, shapes: Mapping[str, tuple[int, ...]], make: Callable[[], Arrays]
) -> dict[str, NDArray[np.generic]]:
    """Arrays of the given shapes from the cache folder; if the file is missing or damaged, `make` makes them anew.

    `key` must name everything that the arrays depend on, except the drawing libraries.
    """
    digest = hashlib.sha256(f"{key}/{PIL.__version__}/{matplotlib.__version__}".encode()).hexdigest()[:12]
    path = cache_dir() / f"{name}-{digest}.npz"
    arrays = _read(path, shapes)
    if arrays is None:
        arrays = dict(make())
        _write(path, arrays)
    return arrays


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.generic]] | None:
    """Arrays of a cache file; None if there is no such file or it is damaged."""
    try:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in shapes}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return arrays if all(arrays[name].shape == shape for name, shape in shapes.items()) else None


def _write(path: Path, arrays: Arrays) -> None:
    """Write arrays to a temporary file and rename it, so that another process never reads half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, allow_pickle=False, **arrays)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
