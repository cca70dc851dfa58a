"""Finds duplicates: images and texts with the same content under different names, which are no independent samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pxcompress.data.batches import Reading, Store


@dataclass(frozen=True)
class _Place:
    """One occurrence of an image: the role (part of the data) that it is in, and its label."""

    role: str
    name: str
    label: int


@dataclass(frozen=True)
class Copies:
    """Duplicate images or texts: each group lists all places where one occurs, in the order of the roles."""

    groups: tuple[tuple[_Place, ...], ...] = ()
    noun: str = "images"

    @classmethod
    def of(cls, readings: Mapping[str, Reading]) -> Copies:
        """Find the duplicates among the images that were read for each role."""
        places: dict[bytes, dict[str, _Place]] = {}
        for role, reading in readings.items():
            samples = reading.store.samples
            for digest, name, label in zip(reading.digests, samples.ids, samples.labels.tolist(), strict=False):
                places.setdefault(digest, {}).setdefault(name, _Place(role, name, label))  # score's may serve repair
        nouns = [reading.store.samples.noun for reading in readings.values()]
        return cls(
            tuple(tuple(each.values()) for each in places.values() if len(each) > 1), next(iter(nouns), "images")
        )

    def leave_out(self, stores: Mapping[str, Store], role: str) -> Store:
        """The samples of `role` without duplicates of samples of an earlier role, or of earlier samples of this one."""
        extra = {place.name for group in self.groups for place in group[1:] if place.role == role}
        store = stores[role]
        if not extra:
            return store
        return store.take(
            np.array([i for i, name in enumerate(store.samples.ids) if name not in extra], dtype=np.int64)
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """One line on how many duplicates there are and what is wrong with them; empty if there are none."""
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
        """Groups with their first place and only those places whose `attribute` differs from it."""
        return tuple(
            (group[0], *(place for place in group[1:] if getattr(place, attribute) != getattr(group[0], attribute)))
            for group in self.groups
        )

    @staticmethod
    def _count(groups: Sequence[tuple[_Place, ...]]) -> int:
        """Number of superfluous places: all but the first of every group."""
        return sum(len(group) - 1 for group in groups)
