"""Which positions of the running texts are real: padding counts in no statistic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_COUNTED: ContextVar[Tensor | None] = ContextVar("counted", default=None)


@contextmanager
def counting(counted: Tensor | None) -> Iterator[None]:
    """A context in which the positions `counted` (n, length) of a batch are text, others padding.

    None for no padding.
    """
    token = _COUNTED.set(counted)
    try:
        yield
    finally:
        _COUNTED.reset(token)


def find_counted_positions(value: Tensor) -> Tensor | None:
    """Mask (n, length) of the positions of a tensor (n, length, features) that are text and not padding.

    It is that of the batch which the model computes at the moment, see `counting`. None if all positions count: the
    batch has no texts, or texts of one length, or the tensor has another shape.
    """
    counted = _COUNTED.get()
    if counted is None or value.dim() != 3 or value.shape[:2] != counted.shape or bool(counted.all()):
        return None
    return counted


def select_counted_columns(units: Tensor, counted: Tensor | None) -> Tensor:
    """Reorder (n, units, positions) to (units, columns), with a column for every real position of every sample.

    If a unit has several rows, their positions follow each other, as `rows.unit_view` gives them.
    """
    columns = units.transpose(0, 1).flatten(1)
    if counted is None:
        return columns
    rows = units.shape[2] // counted.shape[1]
    return columns[:, counted.repeat(1, rows).flatten().to(columns.device)]
