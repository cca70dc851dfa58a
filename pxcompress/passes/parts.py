"""Cuts batches into smaller parts, so that memory does not depend on the batch size of the data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from pxcompress.notes import Message, Note
from pxcompress.types import Batch, Batches

NUMBERS_AT_ONCE = 1_500_000
"""Input values that are processed at a time (9 images of 224 x 224), since a backward pass stores all activations."""


@dataclass(frozen=True, eq=False)
class SplitBatches:
    """`batches` cut into parts of at most `size` samples; without a size, of about `NUMBERS_AT_ONCE` numbers."""

    batches: Batches
    size: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        for inputs, labels in self.batches:
            size = self.size or max(1, NUMBERS_AT_ONCE // max(1, inputs[0].numel()))
            yield from zip(inputs.split(size), labels.split(size), strict=True)


RUN_LENGTH = 4
"""Number of consecutive samples that stay together when data are divided, since they may be frames of a film."""

HELD_OUT_EVERY = 6
"""One in this many runs of `RUN_LENGTH` samples is held out."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The held-out samples of a stream of batches or, with `others`, the remaining ones."""

    batches: Batches
    others: bool = False

    def __iter__(self) -> Iterator[Batch]:
        samples_before = 0
        for inputs, labels in self.batches:
            numbers = torch.arange(samples_before, samples_before + len(labels))
            samples_before += len(labels)
            is_chosen = (numbers // RUN_LENGTH % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) != self.others
            if is_chosen.any():
                yield inputs[is_chosen], labels[is_chosen]


def spread_samples(batches: Batches, count: int) -> list[Batch]:
    """About `count` samples, taken evenly from all batches, since these may be sorted by class; all if fewer."""
    total = sum(len(labels) for _, labels in batches)
    step = max(1, total // max(count, 1))
    parts: list[Batch] = []
    samples_before = 0
    for inputs, labels in batches:
        places = torch.arange(len(labels))
        places = places[(samples_before + places) % step == 0]
        samples_before += len(labels)
        if len(places):
            parts.append((inputs[places], labels[places]))
    return parts


@dataclass(frozen=True, eq=False)
class WatchedBatches:
    """Batches that report progress while they are iterated, at most once a second."""

    batches: Sequence[Batch]
    say: Note

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        last_message = time.perf_counter()
        for batches_done, batch in enumerate(self.batches, 1):
            yield batch
            if batches_done < len(self) and (seconds := time.perf_counter()) - last_message >= 1:
                last_message = seconds
                self.say(Message(f"{batches_done} of {len(self)} batches", "count", batches_done, len(self)))


def watch_batches(parts: Mapping[str, Batches], say: Note) -> dict[str, Batches]:
    """Wrap batches, by role, in `WatchedBatches` if their number is known."""
    return {role: WatchedBatches(part, say) if isinstance(part, Sequence) else part for role, part in parts.items()}
