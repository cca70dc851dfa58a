"""Batches in smaller parts: what a pass holds at a time does not depend on how the data come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pxcompress.types import Batch, Batches

AT_ONCE = 1_500_000
"""Numbers of input that are worked on at a time, 9 images of 224 x 224: a backward pass keeps all activations."""


@dataclass(frozen=True, eq=False)
class InParts:
    """`batches` in parts of at most `size` samples; without a size, of about `AT_ONCE` numbers."""

    batches: Batches
    size: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        for inputs, labels in self.batches:
            size = self.size or max(1, AT_ONCE // max(1, inputs[0].numel()))
            yield from zip(inputs.split(size), labels.split(size), strict=True)
