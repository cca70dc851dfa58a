"""Detectors: torchvision's as raw modules, layouts of raw boxes, and nets of the demonstration."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import random_plan, randomised
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.keypoint_rcnn import KeypointRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from pxcompress.demo.detectors import glyph_ssd, glyph_yolo
from pxcompress.demo.losses import BoxLoss
from pxcompress.deploy import predict
from pxcompress.errors import InputError
from pxcompress.graph import find_groups, prune, removal_error
from pxcompress.models.adapter import named_outputs
from pxcompress.models.detectors import raw_detector
from pxcompress.models.loading import classifier_names
from pxcompress.models.rewrite import rewrite_plain
from pxcompress.tasks.box_layouts import LAYOUTS, BoxLayout, Candidates, read_boxes, register_layout
from pxcompress.tasks.choice import as_judged
from pxcompress.tasks.detection import BoxAgreement, Detection

SIDE, CLASSES = 64, 3


class Pyramid(nn.Module):
    """Two feature maps, of strides 8 and 16."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 8, 8), FrozenBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 32, 3, 1, 1))
        self.coarse = nn.Conv2d(32, 32, 3, 2, 1)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        fine = self.stem(x)
        return OrderedDict([("0", fine), ("1", self.coarse(fine))])


SIZES = {"min_size": SIDE, "max_size": SIDE}
ONE_EACH = AnchorGenerator(((12,), (24,)), ((1.0,), (1.0,)))
DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "SSD": lambda: SSD(
        Pyramid(),
        DefaultBoxGenerator([[2], [2]]),
        (SIDE, SIDE),
        CLASSES + 1,
        head=SSDHead([32, 32], [4, 4], CLASSES + 1),
    ),
    "RetinaNet": lambda: RetinaNet(Pyramid(), CLASSES + 1, anchor_generator=ONE_EACH, **SIZES),
    "FCOS": lambda: FCOS(Pyramid(), CLASSES + 1, anchor_generator=ONE_EACH, **SIZES),
    "Faster R-CNN": lambda: FasterRCNN(
        Pyramid(),
        CLASSES + 1,
        rpn_anchor_generator=ONE_EACH,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 5, 2),
        rpn_post_nms_top_n_test=24,
        rpn_score_thresh=0.0,
        **SIZES,
    ),
}


@pytest.mark.parametrize("kind", DETECTORS)
def test_raw_boxes_are_those_that_torchvision_chooses_from(kind: str) -> None:
    torch.manual_seed(0)
    detector = randomised(DETECTORS[kind]()).eval()
    for name, parameter in detector.named_parameters():
        if "cls" in name and parameter.dim() > 1:
            parameter.data *= 8
    raw = raw_detector(detector).eval()
    assert set(raw.state_dict()) == set(detector.state_dict())
    images = torch.rand(2, 3, SIDE, SIDE)
    mean, std = (torch.tensor(raw.default_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        chosen, outputs = detector(list(images)), raw((images - mean) / std)
    assert sum(len(each["boxes"]) for each in chosen) > 4
    assert outputs["logits"].shape[2] == CLASSES
    compared = 0
    for image, each in enumerate(chosen):
        corners, scores = outputs["boxes"][image].clamp(0, SIDE), outputs["logits"][image].sigmoid()
        for box, score, label in zip(each["boxes"], each["scores"], each["labels"], strict=True):
            same = (scores[:, label - 1] - score).abs() < 1e-4
            if kind == "Faster R-CNN":  # it keeps a box of every class, the raw module that of the surest one
                same &= scores.argmax(1) == label - 1
            if label > 0 and same.any():
                compared += 1
                assert (corners[same] - box).abs().amax(1).min() < 1e-2
            else:
                assert label == 0 or kind == "Faster R-CNN"
    assert compared > 4


class Bumps(nn.Module):
    """A map with one bump for each of three joints, the same for every box."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(56.0), torch.arange(56.0), indexing="ij")
        places = ((10, 40), (30, 5), (50, 50))
        maps = [9 - ((rows - row) ** 2 + (columns - column) ** 2) / 50 for row, column in places]
        return torch.stack(maps).expand(len(x), -1, -1, -1) + 0 * x.mean((1, 2, 3))[:, None, None, None]


def test_joints_are_those_that_torchvision_finds() -> None:
    torch.manual_seed(0)
    detector = KeypointRCNN(
        Pyramid(),
        2,
        rpn_anchor_generator=ONE_EACH,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 5, 2),
        keypoint_roi_pool=MultiScaleRoIAlign(["0", "1"], 5, 2),
        keypoint_head=nn.Conv2d(32, 4, 1),
        keypoint_predictor=Bumps(),
        rpn_post_nms_top_n_test=24,
        **SIZES,
    )
    raw = raw_detector(randomised(detector).eval()).eval()
    images = torch.rand(1, 3, SIDE, SIDE)
    mean, std = (torch.tensor(raw.default_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        (chosen,), outputs = detector(list(images)), raw((images - mean) / std)
    assert outputs["keypoints"].shape == (*outputs["boxes"].shape[:2], 3, 3)
    assert len(chosen["boxes"]) > 2
    for box, joints in zip(chosen["boxes"], chosen["keypoints"], strict=True):
        distances = (outputs["boxes"][0].clamp(0, SIDE) - box).abs().amax(1)
        nearest = outputs["keypoints"][0, distances.argmin()]
        assert distances.min() < 1e-2
        assert (
            (nearest[:, :2] - joints[:, :2]).abs() <= (box[2:] - box[:2]) / 56 + 0.6
        ).all()  # half a cell, and a pixel
    view = as_judged(raw, images, Detection())
    (gradient,) = torch.autograd.grad(view(images)[0, 0], raw.roi_heads.keypoint_head.weight, allow_unused=True)
    assert gradient is not None  # joints count where relevance starts


def test_units_of_a_raw_detector_can_go() -> None:
    example = torch.randn(1, 3, SIDE, SIDE)
    raw = raw_detector(DETECTORS["RetinaNet"]()).eval()
    model = rewrite_plain(raw, lambda twin: twin(example))
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    _check_removal(model, example)


@pytest.mark.parametrize("make", [glyph_yolo, glyph_ssd])
def test_units_of_the_demonstrations_detectors_can_go(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    _check_removal(randomised(make()).eval(), torch.randn(1, 3, SIDE, SIDE))


def _check_removal(model: nn.Module, example: Tensor) -> None:
    view = as_judged(model, example, Detection())
    groups = find_groups(view, example, classifier_names(view, example)).groups
    assert len(groups) > 4
    pruned = prune(view, groups, random_plan(groups, 0))
    assert sum(map(Tensor.numel, pruned.model.parameters())) < 0.8 * sum(map(Tensor.numel, model.parameters()))
    assert removal_error(pruned, example) < 1e-4


def test_every_layout_says_the_same() -> None:
    """One box in the left upper quarter, surely of class 1, beside one that shows nothing."""
    logits = torch.tensor([[[-4.0, 3.0, -4.0], [-6.0, -6.0, -6.0]]])
    middle = torch.tensor([[[16.0, 16, 32, 24], [40, 40, 8, 8]]])
    corners = torch.tensor([[[0.0, 4, 32, 28], [36, 36, 44, 44]]])
    softmax = torch.cat([logits, torch.zeros(1, 2, 1)], 2)
    shares = middle / SIDE
    raw: dict[str, dict[str, Tensor]] = {
        "yolo": {"output": torch.cat([middle, logits.sigmoid()], 2).transpose(1, 2).repeat(1, 1, 4)},
        "corners": {"boxes": corners, "logits": logits},
        "detr": {"logits": softmax, "pred_boxes": shares},
        "rt-detr": {"logits": logits, "pred_boxes": shares, "enc_topk_logits": logits},
    }
    assert set(raw) == set(LAYOUTS)
    for name, outputs in raw.items():
        for layout in ("auto", name):
            result = read_boxes(outputs, layout)
            scale = SIDE if result.relative else 1
            torch.testing.assert_close(result.corners[:, :2] * scale, corners)
            assert result.logits[0, :2].argmax(1)[0] == 1
            assert (result.logits[0, 0] > 0).tolist() == [False, True, False]
    probabilities = read_boxes(raw["detr"]).logits.sigmoid()
    torch.testing.assert_close(probabilities, softmax.softmax(2)[..., :-1])


def test_other_outputs_are_refused_in_one_line() -> None:
    for outputs in ({"output": torch.zeros(2, 300, 6)}, {"logits": torch.zeros(2, 5)}):
        with pytest.raises(InputError, match="expected boxes laid out as"):
            read_boxes(outputs)
    with pytest.raises(InputError, match="unknown box layout 'yolov'"):
        read_boxes({"output": torch.zeros(2, 12, 80)}, "yolov")
    target = torch.tensor([[[-1.0, 0, 0, SIDE, SIDE, 5]]])
    with pytest.raises(InputError, match="have 5 classes of boxes, the model has 3"):
        Detection().check({"boxes": torch.zeros(1, 2, 4), "logits": torch.zeros(1, 2, 3)}, target)


def test_a_layout_of_ones_own_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    import pxcompress.tasks.box_layouts as module

    monkeypatch.setattr(module, "LAYOUTS", dict(LAYOUTS))
    mine = BoxLayout(
        "mine", lambda outputs: "mine" in outputs, lambda outputs: Candidates(*outputs["mine"].split(4, 2))
    )
    register_layout(mine)
    assert read_boxes({"mine": torch.ones(1, 7, 8)}).logits.shape == (1, 7, 4)
    with pytest.raises(ValueError, match="registered twice"):
        register_layout(mine)


def _yolo_outputs(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    boxes = torch.cat([60 * torch.rand(4, 40, 2, generator=draw), 6 + 20 * torch.rand(4, 40, 2, generator=draw)], 2)
    chances = torch.rand(4, 40, CLASSES, generator=draw) ** 4
    return {"output": torch.cat([boxes, chances], 2).transpose(1, 2)}


def test_predict_finds_the_boxes_that_the_task_says() -> None:
    outputs, task = _yolo_outputs(), Detection()
    boxes = task._predicted_boxes(outputs).surer_than(task.score)
    facts = {"task": "detection", "input_size": json.dumps([3, SIDE, SIDE])}
    for image in range(4):
        is_box = boxes.is_box[image]
        results = predict.find_boxes({"output": outputs["output"][image].double().numpy()}, facts)
        assert [kind for kind, *_ in results] == boxes.classes[image][is_box].long().tolist()
        np.testing.assert_allclose([corners for _, _, corners, _ in results], boxes.corners[image][is_box], atol=1e-4)


def test_boxes_without_labels_are_judged_beside_the_dense_models() -> None:
    task, one, other = BoxAgreement(), _yolo_outputs(), _yolo_outputs(1)
    for outputs, least, most in ((one, 1.0, 1.0), (other, 0.0, 0.7)):
        value = task.quality(task.complete(task.statistics(outputs, torch.zeros(4), one)))
        assert least <= value <= most


def test_training_pulls_boxes_to_their_objects() -> None:
    """A few steps on free boxes and logits: the surest box of each object ends up on it."""
    torch.manual_seed(0)
    targets = torch.tensor([[[0.0, 8, 8, 24, 24, 0], [2, 30, 34, 50, 60, 0], [-1, 0, 0, SIDE, SIDE, CLASSES]]])
    low = 12.0 * torch.cartesian_prod(torch.arange(5), torch.arange(5))[None].float()
    boxes = torch.cat([low, low + 14], 2).requires_grad_()
    logits = torch.full((1, 25, CLASSES), -3.0, requires_grad=True)
    optimizer, loss = torch.optim.Adam([{"params": boxes, "lr": 0.5}, {"params": logits, "lr": 0.2}]), BoxLoss()
    for _ in range(120):
        optimizer.zero_grad()
        loss({"boxes": boxes, "logits": logits}, targets).backward()
        optimizer.step()
    outputs = {"boxes": boxes.detach(), "logits": logits.detach()}
    statistics = Detection().statistics(outputs, targets, outputs)
    assert Detection().quality(statistics) > 0.7


def test_relevance_of_a_net_starts_at_what_it_says() -> None:
    model, inputs = randomised(glyph_yolo()).eval(), torch.randn(2, 3, SIDE, SIDE, requires_grad=True)
    logits = Detection().logits(named_outputs(model, inputs))
    assert logits.shape == (2,)
    assert torch.autograd.grad(logits.sum(), inputs)[0].abs().sum() > 0
