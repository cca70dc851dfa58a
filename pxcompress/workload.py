"""The model with its weights, and the data cut into disjoint roles, that a run works on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pxcompress.data import (
    EMBEDDED,
    Source,
    check_classes,
    load_splits,
    match_class_order,
    open_source,
    restrict_classes,
)
from pxcompress.deploy.onnx_modules import check_agrees
from pxcompress.errors import InputError, NoClassifierError
from pxcompress.models.adapter import named_outputs
from pxcompress.models.hugging_face import gives_embeddings
from pxcompress.models.input_scale import with_values
from pxcompress.models.inputs import with_whole_images
from pxcompress.models.loading import LoadedModel, load_model
from pxcompress.models.onnx_file import ports_for
from pxcompress.models.task import slice_classes
from pxcompress.notes import Note
from pxcompress.recipe import ModelAndData
from pxcompress.recipe.model_and_data import IN_PYTHON
from pxcompress.state import device_of, evaluating, seeded
from pxcompress.tasks import TASKS
from pxcompress.tasks.choice import AUTO, BY_LAYOUT, as_judged
from pxcompress.tasks.embedding import Embedding
from pxcompress.tasks.task import Task
from pxcompress.types import ImageSize, Splits


@dataclass(frozen=True, eq=False)
class Whole:
    """The model and data with all classes, from which some were selected; `outputs` are the selected ones."""

    loaded: LoadedModel
    source: Source
    outputs: tuple[int, ...]

    def slice_outputs(self, example: Tensor) -> LoadedModel:
        """The model with the selected outputs only; `example` is an input (1, ...). Raises `ModelError`."""
        model = slice_classes(self.loaded.model, example, self.outputs)
        names = tuple(self.loaded.class_names[output] for output in self.outputs if self.loaded.class_names)
        return replace(self.loaded, model=model, classes=len(self.outputs), class_names=names)


@dataclass(frozen=True, eq=False)
class Workload:
    """Everything that a run works on: a loaded model, the data, the task, and where model and data come from.

    `whole` is set if only some classes of both are used.
    """

    loaded: LoadedModel
    source: Source
    splits: Splits
    task: Task
    whole: Whole | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the reader about weights and data."""
        return (*self.loaded.notes, *self.source.notes, *self.splits.notes)


def load_workload(request: ModelAndData) -> Workload:
    """Load the model and data of `request`, restricted to its classes, and choose the task.

    Pretrained weights are loaded only if the data are the user's own. Raises `InputError` for options that do not fit
    the data or the task.
    """
    if request.data == IN_PYTHON:
        raise InputError(
            f"the run is of a {request.model} and batches given in Python, which no file holds; work on it there"
        )
    task = None if request.task == AUTO else TASKS.build(request.task)
    ports = ports_for(request.model, request.layout)
    source = open_source(request.data, task, skip_corrupt=request.skip_corrupt, seed=request.seed, ports=ports)
    if request.classes:
        check_classes(source, request.classes)
    if request.input_size is not None and isinstance(source.native_size, tuple):
        raise InputError(f"input-size is given, but the inputs of data {source.name!r} are no images; leave it out")
    task = task or TASKS.build(BY_LAYOUT[source.layout])
    try:
        loaded = _load_model(request, source, task)
    except NoClassifierError:
        if request.task != AUTO:
            raise
        task = TASKS.build("embedding")
        loaded = _load_model(request, source, task)
    if request.task == AUTO and source.layout == "unlabelled" and gives_embeddings(loaded.model):
        task = TASKS.build("neighbours")
    if not task.is_classifier:
        if request.classes:
            raise InputError(f"classes are given, but task {request.task!r} is no classification; leave them out")
        splits = load_splits(source, loaded.preprocessing, seed=request.seed)
        return Workload(_make_judged(task, loaded, splits), source, splits, task)
    source = match_class_order(source, loaded)
    part = restrict_classes(source, request.classes or source.classes, request.seed)
    splits = load_splits(part, loaded.preprocessing, seed=request.seed)
    if part is source:
        return Workload(loaded, source, splits, task)
    uncut = Whole(loaded, source, tuple(source.classes.index(name) for name in part.classes))
    return Workload(uncut.slice_outputs(splits.example), part, splits, task, uncut)


def _load_model(request: ModelAndData, source: Source, task: Task) -> LoadedModel:
    """The model, with as many outputs as the data need if they say so."""
    with seeded(request.seed):
        loaded = load_model(
            request.model,
            classes=0 if isinstance(task, Embedding) else source.outputs,
            checkpoint=None if request.checkpoint is None else Path(request.checkpoint),
            pretrained=not source.embedded,
            input_size=_choose_input_size(request, source),
            classifier=task.is_classifier,
            inputs=source.inputs,
            data_classes=source.classes if source.layout == "classes" and not source.embedded else (),
            layout=request.layout,
            noun=source.train.noun,
        )
    check_agrees(loaded.model)
    if task.whole_images or source.layout in ("boxes", "keypoints"):
        loaded = replace(loaded, preprocessing=with_whole_images(loaded.preprocessing, loaded.model))
    return with_values(loaded, request.input_mean, request.input_std, request.input_scale)


def _choose_input_size(request: ModelAndData, source: Source) -> int | ImageSize | tuple[int, ...] | None:
    """The input size: pixels, or the shape of inputs that are no images; None for the model's own."""
    if isinstance(request.input_size, tuple):
        return ImageSize(*request.input_size)
    return request.input_size or source.native_size


def _make_judged(task: Task, loaded: LoadedModel, splits: Splits) -> LoadedModel:
    """The model with the logits of `task`, whatever it returns. Raises `InputError` if its outputs do not fit."""
    inputs, targets = next(iter(splits.score))
    with evaluating(loaded.model), torch.no_grad():
        outputs = named_outputs(loaded.model, inputs[:2].to(device_of(loaded.model)), task.output_name)
    if task.needs_targets:
        task.check({name: value.cpu() for name, value in outputs.items()}, targets)
    return replace(loaded, model=as_judged(loaded.model, splits.example, task))


def with_baseline(workload: Workload, seed: int, note: Note) -> Workload:
    """`workload` with weights: a model without any is trained on the embedded data, or read from the cache.

    It learns all classes, also if a task needs only some of them, so that its weights do not depend on the task. `note`
    is told about weights and data.
    """
    for message in workload.notes:
        note(message)
    if workload.loaded.weights != "untrained":
        return workload
    data = EMBEDDED.build(workload.source.name)
    if workload.whole is None:
        source, splits = workload.source, workload.splits
        return replace(workload, loaded=data.train_baseline(workload.loaded, source, splits, workload.task, seed, note))
    loaded, source = workload.whole.loaded, workload.whole.source
    splits = load_splits(source, loaded.preprocessing, seed=seed)
    uncut = replace(workload.whole, loaded=data.train_baseline(loaded, source, splits, workload.task, seed, note))
    return replace(workload, loaded=uncut.slice_outputs(workload.splits.example), whole=uncut)
