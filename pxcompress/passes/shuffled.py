"""Shuffles samples anew for every epoch, while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import numpy as np
import torch

from pxcompress.types import Batch, Batches

SHUFFLE_POOL = 1024
"""Number of samples that are shuffled together, so that memory does not grow with the data."""


class ShuffledBatches:
    """An endless series of batches of `size` samples, in a new order every epoch, which the seed determines."""

    def __init__(self, batches: Batches, samples: int, size: int, seed: int) -> None:
        self._batches = batches
        self._samples = samples
        self._size = min(size, samples)
        self._seed = seed

    def iterate_from(self, batches_drawn: int) -> Iterator[Batch]:
        """The batches after the first `batches_drawn`, as when training is resumed."""
        first_epoch, place = divmod(batches_drawn, self._samples // self._size)
        for epoch in count(first_epoch):
            yield from islice(self._iterate_epoch(epoch), place if epoch == first_epoch else 0, None)

    def _iterate_epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, shuffled within the pool; the last few samples that fill no batch are left out."""
        draw = torch.Generator().manual_seed(mix_seed(self._seed, 0, epoch))
        pool: list[Batch] = []
        for inputs, labels in self._batches:
            pool += zip(inputs, labels, strict=True)
            if len(pool) >= max(SHUFFLE_POOL, self._size):
                yield from self._draw_batches(pool, draw)
        yield from self._draw_batches(pool, draw)

    def _draw_batches(self, pool: list[Batch], draw: torch.Generator) -> Iterator[Batch]:
        """Random batches from `pool`, in which fewer samples than one batch remain."""
        pool[:] = [pool[place] for place in torch.randperm(len(pool), generator=draw).tolist()]
        while len(pool) >= self._size:
            inputs, labels = zip(*(pool.pop() for _ in range(self._size)), strict=True)
            yield torch.stack(inputs), torch.stack(labels)


def mix_seed(*numbers: int) -> int:
    """One seed made from several numbers, such as a seed, a purpose and an epoch."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
