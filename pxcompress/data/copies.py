"""Images and texts that equal another one, pixel by pixel, under whatever name: they are no samples of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pxcompress.data.batches import Reading, Store


@dataclass(frozen=True)
class _Place:
    """The role that an image serves in, and its label."""

    role: str
    name: str
    label: int


@dataclass(frozen=True)
class Copies:
    """Duplicate images or texts: each entry lists all places of one, in the order of the roles."""

    groups: tuple[tuple[_Place, ...], ...] = ()
    noun: str = "images"

    @classmethod
    def of(cls, readings: Mapping[str, Reading]) -> Copies:
        """The duplicates among the images that were read, by role."""
        places: dict[bytes, dict[str, _Place]] = {}
        for role, reading in readings.items():
            samples = reading.store.samples
            for digest, name, label in zip(reading.digests, samples.ids, samples.labels.tolist(), strict=False):
                places.setdefault(digest, {}).setdefault(name, _Place(role, name, label))  # score's may serve repair
        nouns = [reading.store.samples.noun for reading in readings.values()]
        return cls(
            tuple(tuple(each.values()) for each in places.values() if len(each) > 1), next(iter(nouns), "images")
        )

    def find_left_out(self, stores: Mapping[str, Store], role: str) -> Store:
        """The samples of `role` without images that an earlier role, or an earlier sample, has already."""
        extra = {place.name for group in self.groups for place in group[1:] if place.role == role}
        store = stores[role]
        if not extra:
            return store
        return store.take(
            np.array([i for i, name in enumerate(store.samples.ids) if name not in extra], dtype=np.int64)
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """How many duplicates there are, and what is wrong with them, in one line; empty without any."""
        return tuple(self._describe())

    def _describe(self) -> Iterator[str]:
        if not self.groups:
            return
        original, copy = self.groups[0][:2]
        yield (
            f"{self._count(self.groups)} {self.noun} are copies of others, such as {copy.name!r} of "
            f"{original.name!r}; {self._count(self._find_differing('role'))} serve another role than the first of "
            f"them, {self._count(self._find_differing('label'))} have another class: remove them, or accuracy looks "
            "too good"
        )

    def _find_differing(self, attribute: str) -> tuple[tuple[_Place, ...], ...]:
        """Groups cut to their first place and those that differ from it."""
        return tuple(
            (group[0], *(place for place in group[1:] if getattr(place, attribute) != getattr(group[0], attribute)))
            for group in self.groups
        )

    @staticmethod
    def _count(groups: Sequence[tuple[_Place, ...]]) -> int:
        """Places beyond the first of every group."""
        return sum(len(group) - 1 for group in groups)
