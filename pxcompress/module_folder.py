"""Treats a module and batches given in Python as a run's model and data, so that its folder is the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pxcompress.data.samples import Samples, Source
from pxcompress.errors import InputError
from pxcompress.models.adapter import UNKNOWN, named_outputs, split_batch
from pxcompress.models.loading import Architecture, LoadedModel
from pxcompress.models.signature import Signature
from pxcompress.onnx_in import OnnxModule
from pxcompress.passes.parts import HeldOut
from pxcompress.recipe.model_and_data import IN_PYTHON
from pxcompress.state import device_of, evaluating
from pxcompress.tasks.agreement import Agreement
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.task import Task
from pxcompress.types import Batch, Batches, Preprocessing, Splits
from pxcompress.workload import Workload

SEEN = (
    "no test batches were given: the models are measured on samples by which scores and repairs were chosen, so that "
    "they look too good; give save(folder, test)"
)


@dataclass(frozen=True, eq=False)
class TargetBatches:
    """A user's batches with inputs packed as the `signature` says, and targets of any kind; `UNKNOWN` without any."""

    batches: Iterable[Any]
    signature: Signature = field(default_factory=Signature)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            inputs, targets = split_batch(batch)
            packed = self.signature.pack(inputs)
            yield packed, targets if isinstance(targets, Tensor) else torch.full((len(packed),), UNKNOWN)


@dataclass(frozen=True, eq=False)
class AllBatches:
    """Several sequences of batches, one after the other, which can be iterated repeatedly."""

    parts: Sequence[Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self.parts)


@dataclass(frozen=True, eq=False)
class ModuleData:
    """The batches with which a user's module was pruned and is measured; `classes` are names of its outputs.

    The `example` (1, ...) is packed as the `signature` says.
    """

    example: Tensor
    batches: Iterable[Any]
    signature: Signature = field(default_factory=Signature)
    held_out: Iterable[Any] | None = None
    test: Iterable[Any] | None = None
    classes: Sequence[str] = ()
    preprocessing: Preprocessing | None = None

    @property
    def splits(self) -> Splits:
        """The samples by role: scoring and repair use the same ones, certify has none."""
        fit: Batches = TargetBatches(self.batches, self.signature)
        held_out: Batches = HeldOut(fit) if self.held_out is None else TargetBatches(self.held_out, self.signature)
        if next(iter(held_out), None) is None:
            held_out = fit
        elif self.held_out is None:
            fit = HeldOut(fit, others=True)
        test = held_out if self.test is None else TargetBatches(self.test, self.signature)
        parts = {"score": fit, "repair": fit, "select": held_out, "certify": (), "test": test}
        ids = {role: _number(role, batches) for role, batches in parts.items()}
        notes = (SEEN,) if self.test is None else ()
        return Splits(
            score=fit, repair=fit, select=held_out, certify=(), test=test, example=self.example, ids=ids, notes=notes
        )


def workload_of(model: nn.Module, task: Task | None, data: ModuleData) -> Workload:
    """The workload of a run: `model` as all stages take it (one tensor in, logits out), its user's data, and the task.

    Without a `task` it is a classification if the model returns logits (n, classes) and the test samples have labels;
    else models are judged by their agreement. Raises `InputError` for targets that do not fit.
    """
    splits = data.splits
    inputs, targets = next(iter(splits.test))
    labelled = bool((targets != UNKNOWN).any())
    with evaluating(model), torch.no_grad():
        outputs = named_outputs(model, inputs[:2].to(device_of(model)), Classification.output_name)
    task = task or _choose_task(outputs, labelled and targets.dim() == 1 and not targets.is_floating_point())
    if task.layouts and "unlabelled" not in task.layouts and not labelled:
        raise InputError(f"task {type(task).__name__} needs targets; give save(folder, test) with (inputs, targets)")
    if labelled:
        named = named_outputs(model, inputs[:2].to(device_of(model)), task.output_name)
        task.check({name: value.detach().cpu() for name, value in named.items()}, targets[:2])
    classes = _name_classes(data.classes, outputs) if isinstance(task, Classification) else tuple(data.classes)
    loaded = LoadedModel(
        model,
        _describe_architecture(model),
        data.preprocessing or Preprocessing(tuple(data.example.shape[1:]), inputs=data.signature.inputs),
        "module",
        len(classes),
    )
    nothing = Samples.of((), np.zeros(0, dtype=np.int64), _refuse_image)
    layout = task.layouts[0] if task.layouts else "unlabelled"
    source = Source(IN_PYTHON, classes, False, None, nothing, nothing, nothing, layout=layout)
    return Workload(loaded, source, splits, task)


def _name_classes(names: Sequence[str], outputs: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of a classifier's outputs, or numbers if none are given. Raises `InputError` for a wrong count."""
    count = next(iter(outputs.values())).shape[1]
    if names and len(names) != count:
        raise InputError(f"{len(names)} classes are named; the module returns logits of {count}, give as many names")
    return tuple(names) or tuple(map(str, range(count)))


def _describe_architecture(model: nn.Module) -> Architecture:
    """How to build the module again: from its ONNX file if it came from one, else only by its user."""
    if isinstance(model, OnnxModule):
        return Architecture(str(model.source.path))
    return Architecture(type(model).__name__, in_python=True)


def _choose_task(outputs: Mapping[str, Tensor], classes: bool) -> Task:
    values = list(outputs.values())
    return Classification() if classes and len(values) == 1 and values[0].dim() == 2 else Agreement()


def _number(role: str, batches: Batches) -> tuple[str, ...]:
    return tuple(f"{role} {number}" for number in range(sum(len(inputs) for inputs, _ in batches)))


def _refuse_image(index: int) -> Any:
    raise InputError(f"sample {index} is a tensor in Python, no file")
