"""Predictions of files and models on samples, and their quality by the task's metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pxcompress.deploy.intervals import Interval, bootstrap_interval, newcombe_interval, wilson_interval
from pxcompress.errors import DataError, InputError, ModelError
from pxcompress.models.adapter import named_outputs
from pxcompress.models.outputs import max_difference
from pxcompress.processes import gather_rows
from pxcompress.proof import ClassChange, Estimate
from pxcompress.state import device_of, evaluating
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.task import Outputs, Task
from pxcompress.types import Batches


@dataclass(frozen=True, eq=False)
class Predictions:
    """A model's results on n samples: the task's completed `statistics` (n, t), in the order of the samples.

    `agreement` (n,) is with the outputs of a reference, `max_abs` the largest difference from them; `broken` counts
    samples with outputs that are not finite. `class_outputs` (n, classes) are logits or probabilities, None for tasks
    without.
    """

    task: Task
    statistics: Tensor
    agreement: Tensor
    broken: int = 0
    max_abs: float = 0.0
    class_outputs: Tensor | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.statistics)

    @property
    def quality(self) -> Estimate:
        """The metric with its 95 % interval: Wilson's for a share of right samples, else by bootstrap."""
        value = self.task.quality(self.statistics) if self.broken else judge(self.task, self.statistics)
        if self.task.metric.binary:
            interval = wilson_interval(value, self.samples)
        else:
            interval = bootstrap_interval(lambda rows: self.task.quality(self.statistics[rows]), self.samples)
        return Estimate(value, min(interval.low, value), max(interval.high, value))

    def change(self, dense: Predictions) -> Estimate:
        """Quality minus that of `dense` on the same samples, with its paired 95 % interval."""
        task = self.task
        value = task.quality(self.statistics) - task.quality(dense.statistics)
        if task.metric.binary:
            is_right, was_right = (each.statistics[:, 0] > 0.5 for each in (self, dense))
            counts = int(was_right.sum()), int(is_right.sum()), int((is_right & was_right).sum())
            loss_interval = newcombe_interval(*counts, self.samples)
            interval = Interval(-loss_interval.high, -loss_interval.low)
        else:
            interval = bootstrap_interval(
                lambda rows: task.quality(self.statistics[rows]) - task.quality(dense.statistics[rows]), self.samples
            )
        return Estimate(value, min(interval.low, value), max(interval.high, value))


class Predictor(Protocol):
    """An object that computes outputs for a batch: a session of a file, or a wrapped PyTorch model."""

    def outputs_of(self, inputs: Tensor) -> Outputs:
        """Outputs (n, ...) by name, on the CPU."""
        ...


def predictions(
    sessions: Mapping[str, Predictor], dense: str, reference: str, batches: Batches, task: Task
) -> dict[str, Predictions]:
    """Predictions of every session on `batches`, compared with those of the sessions `dense` and `reference`.

    Raises `DataError` if there are no samples.
    """
    parts: dict[str, list[Predictions]] = {name: [] for name in sessions}
    for inputs, targets in batches:
        outputs = {name: session.outputs_of(inputs) for name, session in sessions.items()}
        for name, values in outputs.items():
            finite = torch.stack([_finite(value) for value in values.values()]).all(0)
            parts[name].append(
                Predictions(
                    task,
                    make_statistics(task, values, targets.cpu(), outputs[dense]),
                    task.agreement(values, outputs[reference]),
                    int((~finite).sum()),
                    max_difference(values, outputs[reference]),
                    task.class_outputs(values),
                )
            )
    if not any(part.samples for part in parts[reference]):
        raise DataError("no samples to measure quality on; expected at least one")
    return {name: _join(of) for name, of in parts.items()}


def _finite(value: Tensor) -> Tensor:
    """Mask (n,) of the samples whose output (n, ...) has no NaN or infinity."""
    return value.reshape(len(value), -1).isfinite().all(1)


def _join(batches: Sequence[Predictions]) -> Predictions:
    task = batches[0].task
    rows = [batch.class_outputs for batch in batches if batch.class_outputs is not None]
    return Predictions(
        task,
        task.complete(torch.cat([batch.statistics for batch in batches])),
        torch.cat([batch.agreement for batch in batches]),
        sum(batch.broken for batch in batches),
        float(np.max([batch.max_abs for batch in batches])),  # max() would lose a NaN
        torch.cat(rows) if len(rows) == len(batches) else None,
    )


def class_changes(dense: Predictions, pruned: Predictions, names: Sequence[str]) -> tuple[ClassChange, ...]:
    """How many samples of each class both models get right, in the order of `names`, without classes that do not occur.

    Empty for tasks other than classification.
    """
    if not isinstance(dense.task, Classification):
        return ()
    labels = dense.statistics[:, 2]
    is_right, was_right = (of.statistics[:, 0] > 0.5 for of in (pruned, dense))
    changes = []
    for number, name in enumerate(names):
        in_class = labels == number
        if count := int(in_class.sum()):
            sums = (int((of & in_class).sum()) for of in (was_right, is_right, was_right & is_right))
            changes.append(ClassChange(name, count, *sums))
    return tuple(changes)


def torch_quality(model: nn.Module, batches: Batches, task: Task, dense: nn.Module | None = None) -> float:
    """Metric of a PyTorch model in eval mode on its device, over the samples of all processes.

    `dense` is the model that it is compared with, by default itself. `model` is left as it was. Raises `ModelError` for
    outputs that are NaN or infinite.
    """
    rows = []
    for inputs, targets in batches:
        outputs = _outputs(model, inputs, task)
        beside = dense if task.reads_dense and dense is not model else None
        reference = outputs if beside is None else _outputs(beside, inputs, task)
        rows.append(make_statistics(task, outputs, targets.cpu(), reference))
    statistics = gather_rows(rows)
    if not len(statistics):
        raise DataError("no samples to measure quality on; expected at least one")
    return judge(task, task.complete(statistics))


def make_statistics(task: Task, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
    """The task's statistics of a batch, (n, s). Raises `InputError` if the task returns another shape."""
    statistics: object = task.statistics(outputs, targets, dense)
    if not isinstance(statistics, Tensor) or statistics.dim() != 2 or len(statistics) != len(targets):
        shape = tuple(statistics.shape) if isinstance(statistics, Tensor) else f"a {type(statistics).__name__}"
        raise InputError(
            f"{type(task).__name__}.statistics returns {shape} for {len(targets)} samples; expected (n, s)"
        )
    return statistics


def judge(task: Task, statistics: Tensor) -> float:
    """The task's metric. Raises `InputError` if it is no finite number."""
    value = float(task.quality(statistics))
    if not math.isfinite(value):
        raise InputError(
            f"{type(task).__name__}.quality is {value} for {len(statistics)} samples whose outputs are finite; "
            "expected a number: mend the task's quality, or its statistics"
        )
    return value


def _outputs(model: nn.Module, inputs: Tensor, task: Task) -> Outputs:
    """Outputs by name, on the CPU. Raises `ModelError` if one is not finite."""
    with evaluating(model), torch.no_grad():
        outputs = named_outputs(model, inputs.to(device_of(model)), task.output_name)
    for value in outputs.values():
        if non_finite := int((~_finite(value)).sum()):
            raise ModelError(
                f"the model returns NaN or infinity for {non_finite} of {len(inputs)} samples; check its weights "
                "and its inputs"
            )
    return {name: value.cpu() for name, value in outputs.items()}
