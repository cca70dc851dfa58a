"""Boxes that a user's own data set gives with its inputs, as one table (n, boxes, 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pxcompress.data.targets import BOX_COLUMNS
from pxcompress.errors import DataError

Array = NDArray[Any]

_EXPECTED = "rows of class, x1, y1, x2, y2 in pixels of the input, and perhaps 1 for a crowd"


def are_boxes(targets: Sequence[Array]) -> bool:
    """Whether targets are tables of boxes, (k, 5) or (k, 6) of floats, of any length, not all of them empty."""
    tables = [target for target in targets if target.size]
    return bool(tables) and all(
        target.ndim == 2 and target.shape[1] in (BOX_COLUMNS - 1, BOX_COLUMNS) and target.dtype.kind == "f"
        for target in tables
    )


def make_box_table(spec: str, targets: Sequence[Array], sides: tuple[int, int]) -> NDArray[np.float32]:
    """Boxes of every sample in one array (n, boxes + 1, 6), as in `data.targets.BoxRows`; `sides` are width and height.

    Raises `DataError` for boxes that are turned around or outside, and for classes that are no whole numbers.
    """
    most = max(len(target) for target in targets)
    table = np.zeros((len(targets), most + 1, BOX_COLUMNS), dtype=np.float32)
    table[..., 0] = -1
    for number, target in enumerate(targets):
        if target.size:
            _check(spec, number, target, sides)
            table[number, : len(target), : target.shape[1]] = target
    table[:, -1, 3:] = *sides, int(table[..., 0].max()) + 1
    return table


def _check(spec: str, number: int, rows: Array, sides: tuple[int, int]) -> None:
    kinds, corners = rows[:, 0], rows[:, 1:5]
    wrong = (kinds < 0) | (kinds != np.rint(kinds)) | ((corners[:, 2:] - corners[:, :2]) <= 0).any(1)
    wrong |= (corners < 0).any(1) | (corners > np.tile(sides, 2)).any(1)
    if wrong.any():
        row = ", ".join(f"{value:g}" for value in rows[int(wrong.argmax())])
        raise DataError(
            f"data {spec!r}, item {number}: its target has the box ({row}) in an input of {sides[0]}x{sides[1]}; "
            f"expected {_EXPECTED}"
        )
