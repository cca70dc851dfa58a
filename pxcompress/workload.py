"""What a run is about: a model with weights, and data cut into its disjoint roles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from pxcompress.data import (
    EMBEDDED,
    Source,
    check_classes,
    in_order_of,
    load_splits,
    open_source,
    restricted,
)
from pxcompress.errors import InputError
from pxcompress.model_and_data import ModelAndData
from pxcompress.models.loading import Loaded, load_model
from pxcompress.models.task import sliced
from pxcompress.notes import Note
from pxcompress.state import seeded
from pxcompress.types import Splits


@dataclass(frozen=True, eq=False)
class Whole:
    """What a task was cut from: a model and data with all classes, and the `outputs` that were kept."""

    loaded: Loaded
    source: Source
    outputs: tuple[int, ...]

    def sliced(self, example: Tensor) -> Loaded:
        """The model with the kept outputs only; `example` is an input (1, ...). Raises `ModelError`."""
        model = sliced(self.loaded.model, example, self.outputs)
        names = tuple(self.loaded.class_names[output] for output in self.outputs if self.loaded.class_names)
        return replace(self.loaded, model=model, classes=len(self.outputs), class_names=names)


@dataclass(frozen=True, eq=False)
class Workload:
    """A loaded model, the data it is for, and where both come from; `whole` is there where they are those of a task."""

    loaded: Loaded
    source: Source
    splits: Splits
    whole: Whole | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the weights and the data."""
        return (*self.loaded.notes, *self.source.notes, *self.splits.notes)


def load_workload(given: ModelAndData) -> Workload:
    """Load model and data of what is `given`, both with its classes only.

    Pretrained weights are asked for only when the data is the user's own.
    """
    source = open_source(given.data, skip_corrupt=given.skip_corrupt, seed=given.seed)
    check_classes(source, given.classes)
    if given.input_size is not None and isinstance(source.native_size, tuple):
        raise InputError(f"input-size is given, but the inputs of data {source.name!r} are no images; leave it out")
    with seeded(given.seed):
        loaded = load_model(
            given.model,
            classes=len(source.classes),
            checkpoint=None if given.checkpoint is None else Path(given.checkpoint),
            pretrained=not source.embedded,
            input_size=given.input_size or source.native_size,
        )
    source = in_order_of(source, loaded)
    task = restricted(source, given.classes or source.classes, given.seed)
    splits = load_splits(task, loaded.preprocessing, seed=given.seed)
    if task is source:
        return Workload(loaded, source, splits)
    whole = Whole(loaded, source, tuple(source.classes.index(name) for name in task.classes))
    return Workload(whole.sliced(splits.example), task, splits, whole)


def with_baseline(workload: Workload, seed: int, note: Note) -> Workload:
    """`workload` with weights: a model that has none is trained on the embedded data, or read from the cache.

    It learns all classes, also where a task needs only some of them, so that its weights do not depend on the task.
    What there is to know of weights and data is told.
    """
    for message in workload.notes:
        note(message)
    if workload.loaded.weights != "untrained":
        return workload
    data = EMBEDDED.build(workload.source.name)
    if workload.whole is None:
        return replace(workload, loaded=data.trained(workload.loaded, workload.source, workload.splits, seed, note))
    loaded, source = workload.whole.loaded, workload.whole.source
    splits = load_splits(source, loaded.preprocessing, seed=seed)
    whole = replace(workload.whole, loaded=data.trained(loaded, source, splits, seed, note))
    return replace(workload, loaded=whole.sliced(workload.splits.example), whole=whole)
