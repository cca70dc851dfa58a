"""Samples in a new order every epoch, read while training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import numpy as np
import torch

from pxcompress.types import Batch, Batches

SHUFFLE_POOL = 1024
"""Samples that are shuffled together. Batches stream through the pool: memory does not grow with their number."""


class ShuffledBatches:
    """Samples in batches of `size` without end, every epoch in a new order that the seed decides on."""

    def __init__(self, batches: Batches, samples: int, size: int, seed: int) -> None:
        self._batches = batches
        self._samples = samples
        self._size = min(size, samples)
        self._seed = seed

    def iterate_from(self, batches_drawn: int) -> Iterator[Batch]:
        """The batches that follow the first `batches_drawn`."""
        first_epoch, place = divmod(batches_drawn, self._samples // self._size)
        for epoch in count(first_epoch):
            yield from islice(self._iterate_epoch(epoch), place if epoch == first_epoch else 0, None)

    def _iterate_epoch(self, epoch: int) -> Iterator[Batch]:
        """All samples but the last few that fill no batch, shuffled within the pool."""
        draw = torch.Generator().manual_seed(mix_seed(self._seed, 0, epoch))
        pool: list[Batch] = []
        for inputs, labels in self._batches:
            pool += zip(inputs, labels, strict=True)
            if len(pool) >= max(SHUFFLE_POOL, self._size):
                yield from self._draw_batches(pool, draw)
        yield from self._draw_batches(pool, draw)

    def _draw_batches(self, pool: list[Batch], draw: torch.Generator) -> Iterator[Batch]:
        """Batches out of `pool` until fewer samples than one are left in it."""
        pool[:] = [pool[place] for place in torch.randperm(len(pool), generator=draw).tolist()]
        while len(pool) >= self._size:
            inputs, labels = zip(*(pool.pop() for _ in range(self._size)), strict=True)
            yield torch.stack(inputs), torch.stack(labels)


def mix_seed(*numbers: int) -> int:
    """A seed that depends on all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
