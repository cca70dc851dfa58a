"""Chooses the task of a run: the one that the user names, or the one that suits the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pxcompress.errors import InputError
from pxcompress.models.adapter import make_view
from pxcompress.models.outputs import by_name
from pxcompress.tasks import TASKS
from pxcompress.tasks.task import Layout, Task

AUTO = "auto"

BY_LAYOUT: dict[Layout, str] = {
    "classes": "classification",
    "identities": "embedding",
    "masks": "segmentation",
    "boxes": "detection",
    "keypoints": "keypoints",
    "labels": "multi-label",
    "numbers": "regression",
    "unlabelled": "agreement",
}
"""Layout of the data -> the task that is taken by default."""


def as_judged(model: nn.Module, example: Tensor, task: Task) -> nn.Module:
    """A view of `model` whose forward returns the logits of `task`, (n, k); a classifier is returned unchanged."""
    if task.is_classifier:
        return model
    return make_view(model, example, start_logits(task), task.divergence if task.trains_by_divergence else None)


def start_logits(task: Task) -> Callable[[Any], Tensor]:
    """A function from a module's outputs to the task's logits, at which relevance starts."""
    return lambda outputs: task.logits(by_name(outputs, task.output_name))


def check_layout(task: Task, layout: Layout, data: str) -> None:
    """Raise `InputError` if data with this layout have no targets that the task can use."""
    if task.needs_targets and layout not in task.layouts:
        others = " or ".join(f"--task {name}" for name in dict.fromkeys((BY_LAYOUT[layout], "agreement")))
        raise InputError(
            f"task {TASKS.text(task)!r} reads {' or '.join(task.layouts)}, data {data!r} have {layout}; give other "
            f"data, or {others}, which needs no targets"
        )
