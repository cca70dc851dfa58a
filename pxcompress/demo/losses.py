"""What baselines are trained with: one loss for every layout of targets."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pxcompress.data.samples import Source
from pxcompress.tasks.embedding import Embedding
from pxcompress.tasks.task import Outputs, Task, pick_output

LABEL_SMOOTHING = 0.05


class Loss(nn.Module):
    """The mean loss of a batch, from a model's outputs by name and the targets of its data.

    `moves`: the targets stay the same where an image is moved a little. `duration`: how many times as long as a
    classifier's its training takes.
    """

    moves: ClassVar[bool] = True
    duration: ClassVar[float] = 1.0

    def forward(self, outputs: Outputs, targets: Tensor) -> Tensor:
        raise NotImplementedError


class ClassLoss(Loss):
    """Cross-entropy with label smoothing."""

    def forward(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            pick_output(outputs, "logits", 2, "logits (n, classes)"), targets, label_smoothing=LABEL_SMOOTHING
        )


class PixelLoss(Loss):
    """Cross-entropy of every pixel."""

    moves = False
    duration = 3.0

    def forward(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return F.cross_entropy(pick_output(outputs, "out", 4, "a map (n, classes, height, width)"), targets)


class LabelLoss(Loss):
    """Binary cross-entropy of every label."""

    duration = 2.0

    def forward(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(pick_output(outputs, "logits", 2, "logits (n, labels)"), targets)


class NumberLoss(Loss):
    """Smooth L1 distance from every number."""

    moves = False
    duration = 2.0

    def forward(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return F.smooth_l1_loss(pick_output(outputs, "output", 2, "numbers (n, k)"), targets, beta=0.2)


class IdentityLoss(Loss):
    """Cross-entropy over the cosines to one learned direction for each identity, with a margin (CosFace).

    Wang et al., https://arxiv.org/abs/1801.09414. The directions are dropped after training.
    """

    duration = 1.5
    scale, margin = 16.0, 0.2

    def __init__(self, task: Embedding, identities: int, features: int) -> None:
        super().__init__()
        self.task = task
        self.directions = nn.Parameter(torch.randn(identities, features))

    def forward(self, outputs: Outputs, targets: Tensor) -> Tensor:
        vectors, directions = F.normalize(self.task.vectors(outputs)), F.normalize(self.directions)
        cosines = vectors @ directions.T - self.margin * F.one_hot(targets, len(directions))
        return F.cross_entropy(self.scale * cosines, targets)


LOSSES: dict[str, type[Loss]] = {
    "classes": ClassLoss,
    "masks": PixelLoss,
    "labels": LabelLoss,
    "numbers": NumberLoss,
}
"""Training losses by the layout of the data; embeddings have `IdentityLoss`."""


def loss_for(task: Task, source: Source, outputs: Outputs) -> Loss:
    """What a model with such `outputs` is trained with: for a task that needs no targets, those of the data count."""
    if isinstance(task, Embedding) or source.layout == "identities":
        task = task if isinstance(task, Embedding) else Embedding()
        return IdentityLoss(task, len(source.classes), task.vectors(outputs).shape[1])
    return LOSSES[source.layout]()
