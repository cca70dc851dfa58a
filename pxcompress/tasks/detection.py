"""The task "detection": boxes with classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from pxcompress.errors import InputError
from pxcompress.proof import Metric
from pxcompress.registry import option
from pxcompress.tasks import TASKS
from pxcompress.tasks.answer import Answer, list_parts, name_class
from pxcompress.tasks.box_layouts import AUTO, Candidates, read_boxes
from pxcompress.tasks.boxes import THRESHOLDS, Boxes, average_precision, f1, match, survivors
from pxcompress.tasks.task import Layout, Outputs, Task

MOST_BOXES = 100
"""Most boxes in an image that count, as in COCO's evaluation."""

KEYPOINTS = "keypoints"
"""Name of the output (n, locations, joints, 3) of models with joints; the task "detection" judges boxes alone."""

FAINT_SCORE = 0.01
"""Boxes with a lower score are left out of the average precision."""

SIGNS = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
"""Alternating signs for the four numbers of boxes at different locations, so that they do not cancel in a sum.

Squares of sums then are sums of squares, on average over locations.
"""


@TASKS.register("detection")
@dataclass(frozen=True)
class Detection(Task):
    """Boxes with classes, in the raw form of the model's outputs; judged by COCO's mAP50-95.

    `tasks/box_layouts.py` lists the layouts of raw outputs. Every location has one box, with its most likely class.
    """

    layout: str = option(AUTO, "how outputs hold boxes: auto, yolo, corners, detr, rt-detr, or one of your own")
    score: float = option(0.25, "least score of a box that counts as predicted, not only as ranked", low=0.0, high=1.0)
    overlap: float = option(0.6, "IoU from which on the less sure of two boxes of a class goes", low=0.0, high=1.0)
    box_weight: float = option(2.0, "what a box's corners weigh beside its class where relevance starts", low=0.0)

    metric = Metric("mAP50-95")
    layouts: ClassVar[tuple[Layout, ...]] = ("boxes", "keypoints")
    reads_dense = False
    whole_images = True
    trains_by_divergence = True
    subject = "the boxes"
    most: ClassVar[int] = MOST_BOXES
    """Most boxes in an image that count."""

    def logits(self, outputs: Outputs) -> Tensor:
        """One number for each image, (n,): the sum over predicted boxes of logit, relative corners, and joints' scores.

        Corners have alternating signs over the locations, so that no move and no change of size cancels out.
        """
        candidates = self._candidates(outputs)
        counts = self._find_predicted(candidates)
        corners = candidates.corners / _sizes(candidates.corners.detach())
        signs = SIGNS[torch.arange(corners.shape[1]) % len(SIGNS)].to(corners)
        decisions = candidates.logits.amax(2) + self.box_weight * (corners * signs).sum(2)
        if KEYPOINTS in outputs:  # their places do not follow the maps by gradients, their scores do
            decisions = decisions + outputs[KEYPOINTS][..., 2].mean(2)
        return torch.where(counts, decisions, 0).sum(1)

    def statistics(self, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
        """F1, number of classes, number of true boxes of each class, and class, score and ten results of every box.

        The shape is (n, 2 + classes + 12 * `most`); results are those of `boxes.match` at ten thresholds of IoU.
        """
        candidates = self._candidates(outputs)
        boxes, truth = self._predicted_boxes(outputs), self._true_boxes(targets, relative=candidates.relative)
        classes = candidates.logits.shape[2]
        truth_counts = torch.stack([(truth.counted & (truth.classes == k)).sum(1) for k in range(classes)], 1)
        scores = f1(boxes.surer_than(self.score), truth)
        ranked = torch.cat([boxes.classes[..., None], boxes.scores[..., None], match(boxes, truth)], 2)
        counts = torch.full_like(scores, classes)
        return torch.cat([scores[:, None], counts[:, None], truth_counts.double(), ranked.flatten(1)], 1)

    def complete(self, statistics: Tensor) -> Tensor:
        """Statistics without the columns that are unused in all samples."""
        truth_counts, ranked = _parts(statistics)
        most = int((ranked[..., 0] >= 0).sum(1).max())
        return statistics[:, : 2 + truth_counts.shape[1] + most * ranked.shape[2]]

    def quality(self, statistics: Tensor) -> float:
        """mAP50-95: average precision as a mean over the classes that occur and over ten thresholds of IoU."""
        precisions = self.precisions(statistics)
        return float(precisions.mean()) if len(precisions) else 0.0

    def precisions(self, statistics: Tensor) -> Tensor:
        """Average precision of every class that occurs, at every threshold, (classes, 10)."""
        truth_counts, ranked = _parts(statistics)
        ranked = ranked[ranked[..., 0] >= 0]
        return average_precision(ranked[:, 0], ranked[:, 1], ranked[:, 2:], truth_counts.sum(0))

    def agreement(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """F1 of each image's boxes above the score threshold with the dense model's boxes as truth, at an IoU of 0.5,
        (n,).
        """
        one, other = (self._predicted_boxes(each).surer_than(self.score) for each in (outputs, dense))
        return f1(one, other)

    def divergence(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """How far the outputs of each image are from the dense model's, (n,), for each box that the latter predicts.

        That is the sum of the KL divergences of all candidates' classes and of 1 - IoU for boxes that the dense model
        predicts, divided by their number.
        """
        one, reference = self._candidates(outputs), self._candidates(dense)
        predicted = self._find_predicted(reference)
        classes = _bernoulli_divergence(one.logits.double(), reference.logits.double()).sum((1, 2))
        boxes = torch.where(predicted, 1 - _aligned_iou(one.corners, reference.corners), 0).sum(1)
        return (classes + boxes) / predicted.sum(1)

    def loss(self, statistics: Tensor) -> Tensor:
        """1 minus the F1 of each image's boxes at an IoU of 0.5, (n,)."""
        return 1 - statistics[:, 0]

    def check(self, outputs: Outputs, targets: Tensor) -> None:
        """Raise `InputError` for data with more classes than the model has."""
        classes_in_data, returned = int(targets[:, -1, 5].max()), self._candidates(outputs).logits.shape[2]
        if classes_in_data > returned:
            raise InputError(
                f"the data have {classes_in_data} classes of boxes, the model has {returned}; give data of its "
                "classes, or a model that has them all"
            )

    def answer(self, outputs: Outputs, classes: Sequence[str], size: tuple[int, int] | None = None) -> Answer:
        """The predicted boxes with their scores, best first."""
        candidates = self._candidates(outputs)
        boxes = self._predicted_boxes(outputs).surer_than(self.score)
        is_box, (height, width) = boxes.is_box[0], size or (1, 1)
        scale = torch.tensor([width, height, width, height]) if candidates.relative else 1
        numbers = tuple(boxes.classes[0, is_box].int().tolist())
        pairs = zip(numbers, boxes.scores[0, is_box].tolist(), strict=True)
        names = tuple(f"{name_class(classes, k)} {score:.2f}" for k, score in pairs)
        words = list_parts(names, "no box")
        return Answer(words, boxes=boxes.corners[0, is_box] * scale, classes=numbers, names=names)

    def describe_target(self, target: Tensor, classes: Sequence[str]) -> str:
        """The classes of the true boxes in words; "" if the target is no table of boxes."""
        if target.dim() != 2:
            return ""
        return list_parts((name_class(classes, int(k)) for k in target[:-1, 0].tolist() if k >= 0), "no box")

    def _candidates(self, outputs: Outputs) -> Candidates:
        return read_boxes(outputs, self.layout)

    def _predicted_boxes(self, outputs: Outputs) -> Boxes:
        """The boxes of every image after non-maximum suppression, best first, at most `most`, without faint ones."""
        candidates = self._candidates(outputs)
        scores, classes = candidates.logits.detach().sigmoid().max(2)
        rows = [
            self._list_survivors(*each, candidates.overlap)
            for each in zip(candidates.corners.detach(), scores, classes, strict=True)
        ]
        padding = torch.tensor([0.0, 0, 0, 0, -1, 0, 0]).to(candidates.corners.detach())
        rows.append(padding.expand(self.most, -1))
        table = pad_sequence(rows, batch_first=True, padding_value=-1.0)[:-1].double().cpu()
        is_box = table[..., 4] >= 0
        scores = torch.where(is_box, table[..., 5], 0)
        return Boxes(table[..., :4], table[..., 4], scores, torch.zeros_like(is_box), places=table[..., 6].long())

    def _true_boxes(self, targets: Tensor, *, relative: bool) -> Boxes:
        """The boxes of `targets` (n, rows, 6), in pixels of the input or as shares of its sides."""
        return _truth(targets, relative=relative)

    def _list_survivors(self, corners: Tensor, scores: Tensor, classes: Tensor, overlap: bool) -> Tensor:
        """Corners, class, score and location of one image's boxes after non-maximum suppression, (k, 7)."""
        places = self._survivors(corners, scores, classes, overlap, FAINT_SCORE)
        facts = (classes[places], scores[places], places)
        return torch.cat([corners[places], *(each[:, None].to(corners) for each in facts)], 1)

    def _survivors(self, corners: Tensor, scores: Tensor, classes: Tensor, overlap: bool, least: float) -> Tensor:
        """Locations of one image's boxes with a score of at least `least`, after non-maximum suppression."""
        sure = (scores >= least).nonzero()[:, 0]
        best = survivors(corners[sure], scores[sure], classes[sure], self.overlap if overlap else 1.0, self.most)
        return sure[best]

    def _find_predicted(self, candidates: Candidates) -> Tensor:
        """Mask (n, locations) of the predicted boxes; in an image without any, of the best one."""
        scores, classes = candidates.logits.detach().sigmoid().max(2)
        counts = torch.zeros_like(scores, dtype=torch.bool)
        for image, (corners, ranked, chosen) in enumerate(
            zip(candidates.corners.detach(), scores, classes, strict=True)
        ):
            places = self._survivors(corners, ranked, chosen, candidates.overlap, self.score)
            counts[image, places if len(places) else ranked.argmax()] = True
        return counts


@TASKS.register("box-agreement")
@dataclass(frozen=True)
class BoxAgreement(Detection):
    """Boxes without labels: judged by the F1 of a model's boxes with the dense model's as truth."""

    metric = Metric("box F1")
    layouts = ("unlabelled",)
    reads_dense = True

    statistics, complete, quality = Task.statistics, Task.complete, Task.quality


def _parts(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Number of true boxes of every class (n, classes); and class, score and ten results of each box, (n, k, 12)."""
    classes = int(statistics[0, 1])
    return statistics[:, 2 : 2 + classes], statistics[:, 2 + classes :].unflatten(1, (-1, 2 + len(THRESHOLDS)))


def _truth(targets: Tensor, *, relative: bool) -> Boxes:
    """The boxes of `targets` (n, rows, 6), in pixels of the input or as shares of its sides.

    A row is class, x1, y1, x2, y2 in pixels of the input, 1 for a crowd. Rows with class -1 are no boxes; the last one
    of every image is -1, 0, 0, width and height of the input, number of classes.
    """
    table, frame = targets[:, :-1].double(), targets[:, -1].double()
    corners = table[..., 1:5]
    if relative:
        corners = corners / frame[:, None, [3, 4, 3, 4]]
    return Boxes(corners, table[..., 0], torch.ones_like(table[..., 0]), table[..., 5] > 0)


def _sizes(corners: Tensor) -> Tensor:
    """Width, height, width and height of boxes, (..., 4), to divide corners by."""
    low, high = corners.chunk(2, -1)
    return (high - low).clamp_min(1e-6).repeat(*[1] * (corners.dim() - 1), 2)


def _bernoulli_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL divergence of yes-or-no distributions with these logits from those of the reference, elementwise."""
    yes = reference.sigmoid() * (logsigmoid(reference) - logsigmoid(logits))
    return yes + (-reference).sigmoid() * (logsigmoid(-reference) - logsigmoid(-logits))


def _aligned_iou(one: Tensor, other: Tensor) -> Tensor:
    """IoU of the boxes at each location, (n, locations)."""
    one, other = one.double(), other.double()
    low, high = torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    areas = sum((each[..., 2:] - each[..., :2]).clamp_min(0).prod(-1) for each in (one, other))
    return shared / (areas - shared).clamp_min(1e-12)
