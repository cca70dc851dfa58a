"""The task "keypoints": objects with classes, boxes and joints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pxcompress.errors import InputError
from pxcompress.proof import Metric
from pxcompress.tasks import TASKS
from pxcompress.tasks.boxes import Boxes
from pxcompress.tasks.detection import KEYPOINTS, Detection
from pxcompress.tasks.joints import Joints
from pxcompress.tasks.task import Layout, Outputs

MOST_OBJECTS = 20
"""Most objects in an image that count, as in COCO's evaluation of keypoints."""

FIRST_JOINT = 7
"""Number of columns of a target before its joints: those of a box, and the object's area."""


@TASKS.register("keypoints")
@dataclass(frozen=True)
class Keypoints(Detection):
    """Objects with joints, besides boxes as in `detection`; judged by COCO's mAP50-95 with OKS instead of IoU.

    The model has the output `keypoints` (n, locations, joints, 3): x and y in pixels of the input, and a score.
    """

    metric = Metric("OKS mAP50-95")
    layouts: ClassVar[tuple[Layout, ...]] = ("keypoints",)
    subject = "the joints"
    most: ClassVar[int] = MOST_OBJECTS

    def check(self, outputs: Outputs, targets: Tensor) -> None:
        """Raise `InputError` for data with more classes than the model has, or with other joints."""
        if KEYPOINTS not in outputs:
            names = ", ".join(outputs)
            raise InputError(
                f"the model returns {names} and no {KEYPOINTS!r}; give a model with joints, or --task detection"
            )
        data_joints, model_joints = (targets.shape[2] - FIRST_JOINT) // 3, outputs[KEYPOINTS].shape[2]
        if data_joints != model_joints:
            raise InputError(
                f"the data have {data_joints} joints, the model has {model_joints}; give data of its joints"
            )
        super().check(outputs, targets)

    def divergence(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """Divergence of the boxes, plus how far joints in the dense model's boxes moved, in sides of the box, at most
        1.
        """
        reference = self._candidates(dense)
        predicted, corners = self._find_predicted(reference), reference.corners.detach()
        sizes = (corners[..., 2:] - corners[..., :2]).clamp_min(1e-6)[:, :, None]
        moves = (outputs[KEYPOINTS][..., :2] - dense[KEYPOINTS][..., :2]).abs() / sizes
        joint_moves = torch.where(predicted, moves.clamp_max(1).double().mean((2, 3)), 0).sum(1)
        return super().divergence(outputs, dense) + joint_moves / predicted.sum(1)

    def _predicted_boxes(self, outputs: Outputs) -> Boxes:
        boxes = super()._predicted_boxes(outputs)
        places = boxes.places.clamp_min(0)[..., None, None]
        joints = outputs[KEYPOINTS].detach().cpu().double()[..., :2]
        chosen = joints.gather(1, places.expand(-1, -1, *joints.shape[2:]))
        sides = boxes.corners[..., 2:] - boxes.corners[..., :2]
        marked = torch.ones(chosen.shape[:-1], dtype=torch.bool)
        return replace(boxes, joints=Joints(chosen, marked, sides.prod(-1)))

    def _true_boxes(self, targets: Tensor, *, relative: bool) -> Boxes:
        table = targets[:, :-1].double()
        joints = table[..., FIRST_JOINT:].unflatten(2, (-1, 3))
        return replace(
            super()._true_boxes(targets, relative=relative),
            joints=Joints(joints[..., :2], joints[..., 2] > 0, table[..., FIRST_JOINT - 1]),
        )
