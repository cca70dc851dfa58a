"""Wraps torchvision's detectors so that they map a batch of images to raw boxes.

A detector of torchvision takes a list of images, resizes them, and returns the boxes that are left after non-maximum
suppression (NMS), another number for each image. What is pruned and exported is the part between: from a normalised
batch (n, 3, H, W) to {"boxes": (n, L, 4) corners in pixels, "logits": (n, L, classes)}, whose sigmoid is the score that
the detector gives a class. Threshold and NMS are applied to these afterwards, as for any other detector. Parameters
keep their names.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.models.detection.ssd import SSD
from torchvision.ops import roi_align

BACKGROUND = 1
"""Number of background classes in torchvision's detectors: the first output is the score of "no object"."""

ROUNDS = 8
"""Rounds of non-maximum suppression in parallel.

Enough to equal the sequential one, except for long chains of overlaps.
"""


RULED_OUT = -1e9
"""Logit of a proposal that is ruled out."""


def raw_detector(model: nn.Module) -> nn.Module:
    """A torchvision detector as a module that returns raw boxes, sharing its layers.

    Other modules are returned unchanged.
    """
    for kind, make in _MAKERS.items():
        if type(model) is kind:
            return make(model)
    return model


class _RawDetector(nn.Module):
    """Base class of the wrappers that map a batch of images to raw boxes, before non-maximum suppression.

    It has the detector's backbone, and describes in `default_cfg` how the detector's own transform prepares images.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        transform = detector.transform
        self.backbone = detector.backbone
        fixed = transform.fixed_size
        height, width = (transform.min_size[-1],) * 2 if fixed is None else fixed[::-1]
        self.default_cfg = {
            "input_size": (3, height, width),
            "mean": tuple(transform.image_mean),
            "std": tuple(transform.image_std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "border" if fixed is None else "squash",
        }

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the backbone, the finest first."""
        features = self.backbone(images)
        return [features] if isinstance(features, Tensor) else list(features.values())


class _OneStage(_RawDetector):
    """SSD, RetinaNet and FCOS: a head predicts a box and classes for every anchor."""

    def __init__(self, detector: Any) -> None:
        super().__init__(detector)
        self.head = detector.head
        self.anchor_generator, self.box_coder = detector.anchor_generator, detector.box_coder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(images)
        outputs = self.head(features)
        boxes = self.boxes(outputs["bbox_regression"], _anchors(self.anchor_generator, images, features))
        return {"boxes": boxes, "logits": self.logits(outputs)}

    def boxes(self, codes: Tensor, anchors: Tensor) -> Tensor:
        """Box corners (n, L, 4) from predicted codes (n, L, 4) and anchors (L, 4)."""
        return _decode(self.box_coder, codes, anchors)

    def logits(self, outputs: dict[str, Tensor]) -> Tensor:
        """Logits of all classes except the background, (n, locations, classes)."""
        return outputs["cls_logits"][..., BACKGROUND:]


class _SSD(_OneStage):
    def logits(self, outputs: dict[str, Tensor]) -> Tensor:
        return _margins(outputs["cls_logits"])


class _FCOS(_OneStage):
    def boxes(self, codes: Tensor, anchors: Tensor) -> Tensor:
        return self.box_coder.decode(codes, anchors)

    def logits(self, outputs: dict[str, Tensor]) -> Tensor:
        """Logits of the scores, which are the root of class probability times centre-ness, (n, locations, classes)."""
        half_log = (logsigmoid(super().logits(outputs)) + logsigmoid(outputs["bbox_ctrness"])) / 2
        return half_log - torch.log(-torch.expm1(half_log.clamp_max(-1e-6)))


class _FasterRCNN(_RawDetector):
    """Faster R-CNN: region proposals, filtered, then a box and classes for each; their number is fixed."""

    def __init__(self, detector: Any) -> None:
        super().__init__(detector)
        self.rpn, self.roi_heads = detector.rpn, detector.roi_heads

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.raw_boxes(images, self.features(images))

    def raw_boxes(self, images: Tensor, features: list[Tensor]) -> dict[str, Tensor]:
        """Box corners and logits of every proposal."""
        proposals = self._proposals(images, features)
        count = proposals.shape[1]
        logits, codes = self.roi_heads.box_predictor(
            self.roi_heads.box_head(_pool(self.roi_heads.box_roi_pool, features, proposals, images.shape[-1]))
        )
        margins = _margins(logits)
        best = margins.argmax(1) + BACKGROUND
        codes = codes.unflatten(1, (-1, 4)).gather(1, best[:, None, None].expand(-1, 1, 4))[:, 0]
        boxes = self.roi_heads.box_coder.decode_single(codes, proposals.flatten(0, 1))
        return {"boxes": boxes.unflatten(0, (-1, count)), "logits": margins.unflatten(0, (-1, count))}

    def _proposals(self, images: Tensor, features: list[Tensor]) -> Tensor:
        """Corners (n, k, 4) of the regions that most likely contain an object."""
        objectness, codes = self.rpn.head(features)
        sizes = [value[0].numel() for value in objectness]
        flat, deltas = concat_box_prediction_layers(objectness, codes)
        samples = images.shape[0]
        anchors = _anchors(self.rpn.anchor_generator, images, features)
        corners = _decode(self.rpn.box_coder, deltas.unflatten(0, (samples, -1)), anchors).detach()
        corners = _clip(corners, images)
        chances = flat.unflatten(0, (samples, -1))[..., 0].detach()
        is_empty = ((corners[..., 2:] - corners[..., :2]) < self.rpn.min_size).any(-1)
        chances = torch.where(is_empty, RULED_OUT, chances)
        levels = zip(chances.split(sizes, 1), corners.split(sizes, 1), strict=True)
        parts = [_suppress_overlaps(*level, self.rpn.pre_nms_top_n(), self.rpn.nms_thresh)[:2] for level in levels]
        chances, corners = (torch.cat(values, 1) for values in zip(*parts, strict=True))
        order = chances.topk(min(self.rpn.post_nms_top_n(), chances.shape[1]), 1).indices
        return corners.gather(1, order[..., None].expand(-1, -1, 4))


class _KeypointRCNN(_FasterRCNN):
    """Keypoint R-CNN: the best boxes, filtered, with "keypoints" (n, k, joints, 3): x, y and score of each joint.

    A joint lies where its map has its largest value, in the middle of one of 56 x 56 cells of its box.
    """

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(images)
        raw = self.raw_boxes(images, features)
        chances = raw["logits"].amax(2).detach()
        remaining_chances, _, order = _suppress_overlaps(
            chances, raw["boxes"].detach(), chances.shape[1], self.roi_heads.nms_thresh
        )
        best = order.gather(
            1, remaining_chances.topk(min(self.roi_heads.detections_per_img, remaining_chances.shape[1]), 1).indices
        )
        boxes, logits = (
            value.gather(1, best[..., None].expand(-1, -1, value.shape[2])) for value in (raw["boxes"], raw["logits"])
        )
        regions = _clip(boxes.detach(), images)
        pooled = _pool(self.roi_heads.keypoint_roi_pool, features, regions, images.shape[-1])
        maps = self.roi_heads.keypoint_predictor(self.roi_heads.keypoint_head(pooled))
        joints = _find_joints(maps.unflatten(0, (-1, boxes.shape[1])), regions)
        return {"boxes": boxes, "logits": logits, "keypoints": joints}


def _clip(corners: Tensor, images: Tensor) -> Tensor:
    """Corners (..., 4), clipped to the image."""
    height, width = images.shape[-2:]
    limits = torch.tensor([width, height, width, height], dtype=corners.dtype, device=corners.device)
    return torch.minimum(corners.clamp_min(0), limits)


def _find_joints(maps: Tensor, boxes: Tensor) -> Tensor:
    """Position and score of each joint, (n, k, joints, 3), at the peak of its map (side, side) over its box (n, k,
    4).
    """
    side = maps.shape[-1]
    scores, places = maps.flatten(3).max(3)
    sizes = (boxes[..., 2:] - boxes[..., :2]) / side
    x = boxes[..., :1] + (places % side + 0.5) * sizes[..., :1]
    y = boxes[..., 1:2] + (torch.div(places, side, rounding_mode="floor") + 0.5) * sizes[..., 1:]
    return torch.stack([x, y, scores], -1)


def _pool(pool: Any, features: list[Tensor], regions: Tensor, width: int) -> Tensor:
    """Features (n * k, channels, s, s) of every region (n, k, 4), pooled from the map that suits its size."""
    count = regions.shape[1]
    maps = features[: len(pool.featmap_names)]
    steps = [round(math.log2(width / each.shape[-1])) for each in maps]
    size = (regions[..., 2:] - regions[..., :2]).prod(-1).clamp_min(1e-12).sqrt().flatten()
    level = torch.floor(pool.canonical_level + torch.log2(size / pool.canonical_scale) + 1e-6)
    level = level.clamp(steps[0], steps[-1])
    image = torch.arange(regions.shape[0], device=size.device).repeat_interleave(count).to(size)
    rows = torch.cat([image[:, None], regions.flatten(0, 1)], 1)
    pooled = [
        roi_align(each, rows, pool.output_size, 2.0**-step, pool.sampling_ratio)
        * (level == step).to(each)[:, None, None, None]
        for each, step in zip(maps, steps, strict=True)
    ]
    return torch.stack(pooled).sum(0)


_MAKERS: dict[type[nn.Module], type[_RawDetector]] = {
    SSD: _SSD,
    RetinaNet: _OneStage,
    FCOS: _FCOS,
    FasterRCNN: _FasterRCNN,
    KeypointRCNN: _KeypointRCNN,
}


def _anchors(generator: nn.Module, images: Tensor, features: list[Tensor]) -> Tensor:
    """Anchor boxes (L, 4) in pixels, which are the same for every image."""
    height, width = images.shape[-2:]
    anchors: list[Tensor] = generator(ImageList(images[:1], [(height, width)]), [each[:1] for each in features])
    return anchors[0]


def _decode(coder: Any, codes: Tensor, anchors: Tensor) -> Tensor:
    """Box corners (n, L, 4) from predicted codes (n, L, 4) and anchors (L, 4)."""
    repeated = anchors.expand(codes.shape[0], -1, -1).reshape(-1, 4)
    return coder.decode_single(codes.reshape(-1, 4), repeated).reshape(codes.shape)


def _margins(logits: Tensor) -> Tensor:
    """Logits (..., classes) whose sigmoid equals the softmax over logits (..., 1 + classes), without the background."""
    classes = logits.shape[-1]
    hidden = torch.eye(classes, dtype=torch.bool, device=logits.device)[BACKGROUND:]
    others = logits[..., None, :].masked_fill(hidden, -torch.inf).logsumexp(-1)
    return logits[..., BACKGROUND:] - others


def _suppress_overlaps(chances: Tensor, corners: Tensor, most: int, overlap: float) -> tuple[Tensor, Tensor, Tensor]:
    """The most likely boxes by non-maximum suppression: logits (n, k), corners (n, k, 4), indices (n, k).

    Boxes that overlap a likelier one get the logit `RULED_OUT`. By Cluster-NMS (Zheng et al.,
    https://arxiv.org/abs/2005.03572), which needs no loop over boxes and equals NMS once it has converged.
    """
    chances, order = chances.topk(min(most, chances.shape[1]), 1)
    corners = corners.gather(1, order[..., None].expand(-1, -1, 4))
    overlapping = (_pairwise_iou(corners) > overlap).to(corners).triu(1)
    stays = torch.ones_like(chances)
    for _ in range(ROUNDS):
        stays = ((stays[:, None] @ overlapping)[:, 0] < 0.5).to(corners)
    return torch.where(stays > 0, chances, RULED_OUT), corners, order


def _pairwise_iou(corners: Tensor) -> Tensor:
    """IoU of all pairs, (n, k, k), for boxes (n, k, 4)."""
    low = torch.maximum(corners[:, :, None, :2], corners[:, None, :, :2])
    high = torch.minimum(corners[:, :, None, 2:], corners[:, None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    area = (corners[..., 2:] - corners[..., :2]).prod(-1)
    return shared / (area[:, :, None] + area[:, None] - shared).clamp_min(1e-12)
