"""What baselines are trained with: one loss for every layout of targets."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, generalized_box_iou, generalized_box_iou_loss

from pxcompress.data.samples import Source
from pxcompress.tasks.box_layouts import read_boxes
from pxcompress.tasks.embedding import Embedding
from pxcompress.tasks.regression import Regression
from pxcompress.tasks.task import Outputs, Task, pick_output

LABEL_SMOOTHING = 0.05


class Loss(nn.Module):
    """Base class of training losses: the mean loss of a batch, from a model's outputs by name and the targets.

    `moves` says that targets stay valid if an image is shifted a little. `duration` is the length of training as a
    multiple of a classifier's.
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
    """Smooth L1 loss of a regression's numbers."""

    moves = False
    duration = 2.0

    def forward(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return F.smooth_l1_loss(Regression().logits(outputs), targets.flatten(1), beta=0.2)


class OwnLoss(Loss):
    """The `training_loss` of a task that has one of its own."""

    moves = False
    duration = 2.0

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return self.task.training_loss(outputs, targets)


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


class BoxLoss(Loss):
    """Loss of a detector: cross-entropy of classes with the overlap of boxes as soft target, and 1 - GIoU of boxes.

    Every object takes the `positives` candidates that fit it best, by class and overlap (Feng et al., TOOD,
    https://arxiv.org/abs/2108.07755; Rezatofighi et al., GIoU, https://arxiv.org/abs/1902.09630).
    """

    moves = False
    duration = 3.0
    positives, box_share = 6, 2.0

    def forward(self, outputs: Outputs, targets: Tensor) -> Tensor:
        candidates = read_boxes(outputs)
        corners, logits = candidates.corners, candidates.logits
        ideal, weights, total = torch.zeros_like(logits), 0.0, corners.sum() * 0
        for image, rows in enumerate(targets[:, :-1]):
            rows = rows[rows[:, 0] >= 0]
            if not len(rows):
                continue
            place, truth, fit = self._assign(corners[image].detach(), logits[image].detach(), rows)
            ideal[image, place, rows[truth, 0].long()] = fit
            losses = generalized_box_iou_loss(corners[image, place], rows[truth, 1:5])
            total = total + (losses * fit).sum()
            weights += float(fit.sum())
        scale = max(weights, 1.0)
        classes = F.binary_cross_entropy_with_logits(logits, ideal, reduction="none")
        focus = (logits.detach().sigmoid() - ideal).abs().square().clamp_min(0.05)
        return (classes * focus).sum() * 4 / scale + self.box_share * total / scale

    def _assign(self, corners: Tensor, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Assign predicted boxes to true objects: which predictions have one, which object, and how well each fits (0
        to 1).
        """
        overlap = box_iou(corners, rows[:, 1:5]).clamp_min(1e-6)
        near = generalized_box_iou(corners, rows[:, 1:5]) + 1
        fit = logits.sigmoid()[:, rows[:, 0].long()].clamp_min(1e-4).sqrt() * (overlap**3 + 1e-3 * near)
        threshold = fit.topk(min(self.positives, len(fit)), 0).values[-1]
        fit = torch.where(fit >= threshold, fit, 0)
        owned = (fit == fit.amax(1, keepdim=True)) & (fit > 0)
        fit, reach = torch.where(owned, fit, 0), torch.where(owned, overlap, 0).amax(0)
        place, truth = owned.nonzero().unbind(1)
        return place, truth, fit[place, truth] / fit.amax(0)[truth] * reach[truth].clamp_min(0.1)


LOSSES: dict[str, type[Loss]] = {
    "classes": ClassLoss,
    "masks": PixelLoss,
    "boxes": BoxLoss,
    "labels": LabelLoss,
    "numbers": NumberLoss,
}
"""Training loss by the layout of the data; embeddings are trained with `IdentityLoss` instead."""


def loss_for(task: Task, source: Source, outputs: Outputs) -> Loss:
    """The training loss for a task: its own if it has one, that of identities for an embedding, else by the layout."""
    if type(task).training_loss is not Task.training_loss:
        return OwnLoss(task)
    if isinstance(task, Embedding) or source.layout == "identities":
        task = task if isinstance(task, Embedding) else Embedding()
        return IdentityLoss(task, len(source.classes), task.vectors(outputs).shape[1])
    return LOSSES[source.layout]()
