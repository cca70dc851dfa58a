"""Which positions of the texts that run are text: the others fill up shorter ones, and count in no statistic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_COUNTED: ContextVar[Tensor | None] = ContextVar("counted", default=None)


@contextmanager
def counting(counted: Tensor | None) -> Iterator[None]:
    """Inside the block the positions `counted` (n, length) of a batch are text; None: there is no padding."""
    token = _COUNTED.set(counted)
    try:
        yield
    finally:
        _COUNTED.reset(token)


def find_counted_positions(value: Tensor) -> Tensor | None:
    """Which positions of a tensor (n, length, features) of the batch that runs are text, (n, length) bool.

    None where all of them count: no texts run, none is shorter than another, or the tensor has no such positions.
    """
    counted = _COUNTED.get()
    if counted is None or value.dim() != 3 or value.shape[:2] != counted.shape or bool(counted.all()):
        return None
    return counted


def select_counted_columns(units: Tensor, counted: Tensor | None) -> Tensor:
    """(units, columns) of (n, units, positions): every position that counts, of every sample, is a column.

    A unit of several rows has the positions of one behind those of another, as `rows.unit_view` gives them.
    """
    columns = units.transpose(0, 1).flatten(1)
    if counted is None:
        return columns
    rows = units.shape[2] // counted.shape[1]
    return columns[:, counted.repeat(1, rows).flatten().to(columns.device)]
