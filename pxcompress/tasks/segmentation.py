"""The task "segmentation": one class for each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

from pxcompress.errors import InputError
from pxcompress.proof import Metric
from pxcompress.registry import option
from pxcompress.tasks import TASKS
from pxcompress.tasks.answer import Answer, list_parts, name_class
from pxcompress.tasks.task import Outputs, Task, pick_output


@TASKS.register("segmentation")
@dataclass(frozen=True)
class Segmentation(Task):
    """One class for each pixel, the largest of logits (n, classes, height, width); judged by mIoU over all pixels.

    Logits smaller than the masks are resized to them, as is usual. In a map of one channel, values above 0 mean
    foreground.
    """

    ignore_index: int = option(255, "value of pixels in a mask that do not count", low=-1)
    output: str = option("out", "name of the output with the map; else the first (n, classes, height, width)")

    metric = Metric("mIoU")
    layouts = ("masks",)
    reads_dense = False
    subject = "the map"

    def logits(self, outputs: Outputs) -> Tensor:
        """Mean over all pixels of the predicted class's logit, (n,); other outputs, such as "aux", do not count."""
        return super().logits({self.output: _two_classes(self._map(outputs))})

    def statistics(self, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
        """Pixels in the intersection and in the union of prediction and mask, for every class, (n, 2 * classes)."""
        return _overlaps(self._classes(outputs, targets.shape[-2:]), targets, self._count(outputs), self.ignore_index)

    def quality(self, statistics: Tensor) -> float:
        """mIoU: mean over the classes that occur of intersection / union, both summed over all samples."""
        both, either = statistics.double().sum(0).chunk(2)
        return float((both / either)[either > 0].mean()) if (either > 0).any() else 0.0

    def agreement(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """Mean IoU of both models' predictions for each sample, over the classes in either of them, (n,)."""
        size = self._map(dense).shape[-2:]
        counts = _overlaps(self._classes(outputs, size), self._classes(dense, size), self._count(dense), None)
        return _mean_iou(counts)

    def divergence(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """KL divergence from the dense model's distribution over classes, a mean over regions of its prediction,
        (n,).
        """
        pruned, reference = (_two_classes(self._map(each)).double().log_softmax(1) for each in (outputs, dense))
        regions = _regions(reference)
        divergences = (reference.exp() * (reference - pruned)).sum(1, keepdim=True)
        return _region_means(divergences * regions, regions).sum(1) / regions.flatten(2).any(2).sum(1)

    def loss(self, statistics: Tensor) -> Tensor:
        """1 minus the mean IoU of each sample's prediction and mask, (n,)."""
        return 1 - _mean_iou(statistics)

    def check(self, outputs: Outputs, targets: Tensor) -> None:
        """Raise `InputError` for masks with classes that the model does not have."""
        values = targets[targets != self.ignore_index]
        if values.numel() and int(values.max()) >= (classes := self._count(outputs)):
            raise InputError(
                f"a mask has class {int(values.max())}, the model has {classes} (0 to {classes - 1}); give masks of "
                "its classes, or --task segmentation:ignore_index=VALUE for pixels that do not count"
            )

    def answer(self, outputs: Outputs, classes: Sequence[str], size: tuple[int, int] | None = None) -> Answer:
        """The predicted map, and in words the share of pixels of each class, the largest first."""
        regions = self._classes(outputs, torch.Size(size or self._map(outputs).shape[-2:]))[0]
        shares = regions.flatten().bincount() / regions.numel()
        order = [k for k in shares.argsort(descending=True).tolist() if shares[k] > 0]
        words = list_parts((f"{name_class(classes, k)} {shares[k]:.0%}" for k in order), "nothing")
        return Answer(words, regions=regions)

    def _map(self, outputs: Outputs) -> Tensor:
        return pick_output(outputs, self.output, 4, "a map (n, classes, height, width)")

    def _count(self, outputs: Outputs) -> int:
        return max(2, self._map(outputs).shape[1])

    def _classes(self, outputs: Outputs, size: torch.Size) -> Tensor:
        """The predicted class of every pixel, (n, *size)."""
        logits = self._map(outputs).float()
        if logits.shape[-2:] != size:
            logits = interpolate(logits, size, mode="bilinear", align_corners=False)
        return _two_classes(logits).argmax(1)


def _two_classes(logits: Tensor) -> Tensor:
    """A map of one channel as logits of two classes, with 0 for the background; other logits unchanged."""
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def _regions(values: Tensor) -> Tensor:
    """One-hot masks of the predicted classes, (n, classes, height, width), of zeros and ones."""
    return one_hot(values.detach().argmax(1), values.shape[1]).movedim(-1, 1).to(values)


def _region_means(values: Tensor, regions: Tensor) -> Tensor:
    """Mean of `values` in each region, (n, classes); values must be zero outside of it. Empty regions give 0."""
    return values.sum((2, 3)) / regions.sum((2, 3)).clamp_min(1)


def _overlaps(predicted: Tensor, targets: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Intersections and unions of two maps, in pixels for every class, (n, 2 * classes)."""
    from torchmetrics.functional.classification import multiclass_stat_scores

    counts = multiclass_stat_scores(
        predicted.flatten(1),
        targets.flatten(1).long(),
        classes,
        average=None,
        multidim_average="samplewise",
        ignore_index=ignore_index,
        validate_args=False,
    )
    true_positive, false_positive, _, false_negative, _ = counts.double().unbind(-1)
    return torch.cat([true_positive, true_positive + false_positive + false_negative], 1)


def _mean_iou(counts: Tensor) -> Tensor:
    """Mean IoU of every sample over the classes that occur in it, (n,); 1 if none does."""
    both, either = counts.double().chunk(2, 1)
    present = either > 0
    share = torch.where(present, both / either.clamp_min(1), 0).sum(1) / present.sum(1).clamp_min(1)
    return torch.where(present.any(1), share, 1.0)
