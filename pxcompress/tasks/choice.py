"""Chooses the task of a run: the one that the user names, or the one that suits the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pxcompress.errors import InputError
from pxcompress.models.adapter import make_view
from pxcompress.models.outputs import by_name
from pxcompress.tasks.classification import Classification
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
    if isinstance(task, Classification):
        return model
    return make_view(model, example, start_logits(task), task.divergence if task.trains_by_divergence else None)


def start_logits(task: Task) -> Callable[[Any], Tensor]:
    """A function from a module's outputs to the task's logits, at which relevance starts."""
    return lambda outputs: task.logits(by_name(outputs, task.output_name))


def layout_of(task: Task | None, data: str) -> Layout | None:
    """How to read `data`: "unlabelled" if it is a folder and the task needs no targets, else None for "as it looks"."""
    return "unlabelled" if task is not None and "unlabelled" in task.layouts and Path(data).is_dir() else None


def check_layout(task: Task, text: str, layout: Layout, data: str) -> None:
    """Raise `InputError` if data with this layout have no targets that the task can use."""
    if task.layouts and layout not in task.layouts and "unlabelled" not in task.layouts:
        raise InputError(
            f"task {text!r} reads {' or '.join(task.layouts)}, data {data!r} have {layout}; give other data, or --task "
            f"{BY_LAYOUT[layout]}, or --task agreement, which needs no targets"
        )
