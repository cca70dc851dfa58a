"""Boxes of n images at once: non-maximum suppression, matching with true boxes, and COCO's average precision.

COCO's evaluation (https://cocodataset.org/#detection-eval) in two halves: `match` looks at every image by itself, and
`average_precision` puts matches of any images together, hundreds of times for an interval. All boxes are padded to as
many an image, with the class -1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_area

from pxcompress.tasks.joints import Joints, oks

THRESHOLDS = tuple(0.5 + 0.05 * step for step in range(10))
"""IoU from which on a box counts as right; mAP50-95 is the mean over all of these."""

NOWHERE = torch.empty(0, 0, dtype=torch.int64)
"""Value of `places` for boxes that do not come from a model."""

_RECALLS = torch.from_numpy(np.linspace(0, 1, 101))


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of n images: `corners` (n, k, 4) x1, y1, x2, y2, `classes` (n, k), -1 for unused rows, `scores` (n, k).

    `crowd` (n, k) marks boxes around many objects, in which any number of boxes is neither right nor wrong. Objects may
    have `joints`, which are then compared instead of boxes. `places` (n, k) is the location of a model that each box
    comes from.
    """

    corners: Tensor
    classes: Tensor
    scores: Tensor
    crowd: Tensor
    joints: Joints | None = None
    places: Tensor = NOWHERE

    @property
    def is_box(self) -> Tensor:
        """Mask (n, k) of the rows that hold a box."""
        return self.classes >= 0

    @property
    def counted(self) -> Tensor:
        """Mask (n, k) of the boxes that a model must find: no crowds, and with joints only objects with marked
        joints.
        """
        single = self.is_box & ~self.crowd
        return single if self.joints is None else single & self.joints.marked.any(2)

    def surer_than(self, score: float) -> Boxes:
        """The boxes with at least this score; the others become unused rows."""
        return replace(self, classes=torch.where(self.scores >= score, self.classes, -1))


def survivors(corners: Tensor, scores: Tensor, classes: Tensor, overlap: float, most: int) -> Tensor:
    """Indices (k,) of one image's boxes after non-maximum suppression, best first, at most `most`.

    A box is dropped that overlaps a better one of its class by more than `overlap`.
    """
    order = (
        batched_nms(corners.float(), scores.float(), classes, overlap)
        if overlap < 1
        else scores.argsort(descending=True)
    )
    return order[:most]


def match(boxes: Boxes, truth: Boxes, thresholds: tuple[float, ...] = THRESHOLDS) -> Tensor:
    """Whether each box is right at each threshold, (n, k, t): 1 yes, 0 no, -1 where it does not count.

    A box is matched with the true box of its class that it overlaps most, of those not matched yet; in a crowd, or
    where the true object has no marks, it does not count. `boxes` must be sorted by score, highest first.
    """
    overlaps = _overlaps(boxes, truth)
    least = torch.tensor([min(value, 1 - 1e-10) for value in thresholds], dtype=torch.float64)
    counted, crowd = truth.counted[:, None], truth.crowd[:, None]
    free = truth.is_box[:, None].expand(-1, len(thresholds), -1).clone()
    results = torch.zeros(*boxes.classes.shape, len(thresholds), dtype=torch.float64)
    if not overlaps.numel():
        return results
    for place in range(boxes.classes.shape[1]):
        own = overlaps[:, place, None]  # (n, 1, m)
        best, index = torch.where(free & counted, own, -1.0).max(2)
        beside, other = torch.where((free | crowd) & ~counted, own, -1.0).max(2)
        right, ignored = best >= least, (best < least) & (beside >= least)
        index = torch.where(right, index, other)[..., None]
        free.scatter_(2, index, free.gather(2, index) & ~(right | ignored)[..., None])
        results[:, place] = torch.where(right, 1.0, torch.where(ignored, -1.0, 0.0))
    return results


def _overlaps(boxes: Boxes, truth: Boxes) -> Tensor:
    """IoU (n, k, m) of boxes with true ones of the same class; -1 for other classes.

    For a crowd it is the share of the box that the crowd covers, for objects with joints OKS.
    """
    same = (boxes.classes[:, :, None] == truth.classes[:, None]) & truth.is_box[:, None]
    if boxes.joints is not None and truth.joints is not None:
        return torch.where(same, oks(boxes.joints, truth.joints, truth.corners), -1.0)
    one, two = boxes.corners.double(), truth.corners.double()
    low = torch.maximum(one[:, :, None, :2], two[:, None, :, :2])
    high = torch.minimum(one[:, :, None, 2:], two[:, None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    area, other = (box_area(each.reshape(-1, 4)).reshape(each.shape[:2]) for each in (one, two))
    union = area[:, :, None] + torch.where(truth.crowd[:, None], 0, other[:, None] - shared)
    return torch.where(same, shared / union.clamp_min(1e-12), -1.0)


def f1(boxes: Boxes, truth: Boxes, threshold: float = THRESHOLDS[0]) -> Tensor:
    """F1 score of the boxes of each image, (n,); 1 if there are neither boxes nor true ones."""
    results = torch.where(boxes.is_box, match(boxes, truth, (threshold,))[..., 0], -1.0)
    right, counted = (results > 0).sum(1).double(), (results >= 0).sum(1)
    truth_counts = truth.counted.sum(1)
    return torch.where(counted + truth_counts > 0, 2 * right / (counted + truth_counts).clamp_min(1), 1.0)


def average_precision(classes: Tensor, scores: Tensor, results: Tensor, truth_counts: Tensor) -> Tensor:
    """AP (classes with true boxes, t), the mean precision at 101 recalls; `results` (b, t) are those of `match`.

    `classes` and `scores` are of the boxes (b,), `truth_counts` (classes,) the number of true boxes of every class.
    """
    order = scores.argsort(descending=True, stable=True)
    classes, results = classes[order], results[order]
    values = [
        _precision_curve(results[classes == k], truth_counts[k]).mean(0) for k in truth_counts.nonzero()[:, 0].tolist()
    ]
    return torch.stack(values) if values else torch.zeros(0, results.shape[1], dtype=torch.float64)


def _precision_curve(results: Tensor, truth_counts: Tensor) -> Tensor:
    """Precision at each of 101 recalls for t thresholds, (101, t): the best precision at any recall from there on."""
    right, wrong = (results > 0).double().cumsum(0).T.contiguous(), (results == 0).double().cumsum(0).T
    if not right.shape[1]:
        return torch.zeros(len(_RECALLS), len(right), dtype=torch.float64)
    precision = right / (right + wrong).clamp_min(1e-12)
    envelope = precision.flip(1).cummax(1).values.flip(1)
    place = torch.searchsorted(right / truth_counts, _RECALLS.expand(len(right), -1).contiguous())
    return torch.where(place < right.shape[1], envelope.gather(1, place.clamp_max(right.shape[1] - 1)), 0.0).T
