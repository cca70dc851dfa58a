"""Checks that the numbers in a user's batches are valid data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator

from torch import Tensor

from pxcompress.errors import DataError
from pxcompress.types import Batch

_HUGE = 1e20
"""Larger than any measurement; files fill gaps with 1e20, 9.97e36 or the largest float32."""

_NO_DATA = -9999.0
"""Number with which raster files mark pixels without a measurement."""


def check_batches(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches. Raises `DataError` for NaN, infinity and missing data, and warns if all samples are equal."""
    first_batch: Tensor | None = None
    samples, all_alike = 0, True
    for number, (inputs, labels) in enumerate(batches):
        if len(inputs):
            check_values(inputs, number)
            first_batch = inputs[:1] if first_batch is None else first_batch
            all_alike = all_alike and bool((inputs == first_batch).all())
            samples += len(inputs)
        yield inputs, labels
    if samples > 1 and all_alike:
        warnings.warn(f"all {samples} samples of the batches are alike: statistics of them say nothing", stacklevel=2)


def check_values(inputs: Tensor, number: int) -> None:
    """Raise `DataError` if the inputs (n, ...) of batch `number` contain NaN, infinity, or marks for missing data."""
    if not inputs.is_floating_point() or _is_sound(inputs):
        return
    sample = next(index for index, value in enumerate(inputs) if not _is_sound(value))
    low, high = (float(value) for value in inputs[sample].aminmax())
    values = "holds NaN" if math.isnan(low) else f"goes from {low:g} to {high:g}"
    raise DataError(
        f"sample {sample} of batch {number} {values}; expected finite numbers without nodata "
        f"values ({_NO_DATA:g}, or {_HUGE:g} and more): mask, mend or leave out such samples"
    )


def _is_sound(values: Tensor) -> bool:
    low, high = values.aminmax()  # NaN where there is one
    return bool((low > -_HUGE) & (high < _HUGE) & (low != _NO_DATA))
