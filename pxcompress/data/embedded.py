"""The door to `pxcompress.demo`: data sets that come with the package, by name."""

from __future__ import annotations

from typing import Protocol

from pxcompress.data.samples import Source
from pxcompress.models.loading import LoadedModel
from pxcompress.notes import Note
from pxcompress.registry import Registry
from pxcompress.tasks.task import Task
from pxcompress.types import Splits


class EmbeddedData(Protocol):
    """A data set that comes with the package; the fields of the dataclass are its options, as in "glyphs:train=640".

    Its pools are always the same, so that a baseline trained once is never tested on its training images.
    """

    def source(self, spec: str) -> Source:
        """The data, under the name `spec`."""
        ...

    def train_baseline(
        self, loaded: LoadedModel, source: Source, splits: Splits, task: Task, seed: int, note: Note
    ) -> LoadedModel:
        """A model trained on `source`, or with the weights that an earlier training left in the cache.

        `task` says what its outputs mean, and how good it is.
        """
        ...


EMBEDDED: Registry[EmbeddedData] = Registry("data", "pxcompress.demo", EmbeddedData)
