"""Reacts to a lack of memory: repeats the work in smaller batches, and in the end raises one clear error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from pxcompress.errors import OutOfMemoryError, short
from pxcompress.passes.parts import SplitBatches
from pxcompress.types import Batches

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory was not enough; PyTorch has no class of its own for that on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def out_of_memory(stage_name: str, error: BaseException) -> OutOfMemoryError:
    """The error for the user that `stage_name` ran out of memory."""
    return OutOfMemoryError(
        f"{stage_name} ran out of memory ({short(error, 120) or type(error).__name__}); "
        "use a machine with more of it, a smaller --input-size or another method"
    )


def in_smaller_batches(
    work: Callable[..., T], batches: Batches, note: Callable[[str], None], *other_batches: Batches, least_size: int = 1
) -> T:
    """Call `work(batches, *other_batches)`, and if memory is too small again with half the batch size, down to
    `least_size`.

    `work` must leave everything as it was when it raises. `note` gets a message about every new attempt.
    """
    size = 0
    while True:
        try:
            return work(*(SplitBatches(each, size) if size else each for each in (batches, *other_batches)))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            previous_size = size or len(next(iter(batches))[1])
            if previous_size // 2 < least_size:
                raise
        size = previous_size // 2  # outside of the block above: its exception holds on to what was allocated
        note(f"out of memory with batches of {previous_size}; trying again with batches of {size}")
