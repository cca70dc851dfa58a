"""mAP, of boxes and of joints, as COCO's own code computes it (pycocotools)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pxcompress.tasks.boxes import Boxes
from pxcompress.tasks.detection import Detection
from pxcompress.tasks.keypoints import Keypoints

pytest.importorskip("pycocotools")

IMAGES, LOCATIONS, CLASSES, TRUTHS = 24, 60, 4, 8
FEW = 20


def _outputs(draw: torch.Generator) -> dict[str, Tensor]:
    middle, size = (
        60 * torch.rand(IMAGES, LOCATIONS, 2, generator=draw),
        torch.rand(IMAGES, LOCATIONS, 2, generator=draw),
    )
    chances = torch.rand(IMAGES, LOCATIONS, CLASSES, generator=draw) ** 6
    return {"output": torch.cat([middle, 6 + 20 * size, chances], 2).transpose(1, 2)}


def _targets(draw: torch.Generator, boxes: Boxes) -> Tensor:
    """Boxes near those that are found, of the right class or not; some images have none, some boxes are crowds."""
    noise = 1.5 * torch.randn(IMAGES, TRUTHS, 4, generator=draw)
    corners = boxes.corners[:, :TRUTHS] + noise
    corners[..., 2:] = torch.maximum(corners[..., 2:], corners[..., :2] + 2)
    classes = boxes.classes[:, :TRUTHS].clone()
    wrong = torch.rand(IMAGES, TRUTHS, generator=draw) < 0.2
    classes[wrong] = (classes[wrong] + 1) % CLASSES
    classes[torch.arange(IMAGES) % 5 == 0] = -1
    crowd = torch.rand(IMAGES, TRUTHS, generator=draw) < 0.15
    rows = torch.cat([classes[..., None], corners, crowd[..., None]], 2)
    return torch.cat([rows, torch.tensor([-1.0, 0, 0, 64, 64, CLASSES]).expand(IMAGES, 1, 6)], 1)


@pytest.mark.parametrize("seed", range(4))
def test_map_is_that_of_cocos_own_code(seed: int) -> None:
    from torchmetrics.detection import MeanAveragePrecision

    draw, task = torch.Generator().manual_seed(seed), Detection()
    outputs = _outputs(draw)
    boxes = task._predicted_boxes(outputs)
    targets = _targets(draw, boxes)
    statistics = task.statistics(outputs, targets, outputs)
    recalls, thresholds = np.linspace(0, 1, 101).tolist(), np.linspace(0.5, 0.95, 10).tolist()  # its own are float32
    metric = MeanAveragePrecision(backend="pycocotools", rec_thresholds=recalls, iou_thresholds=thresholds)
    for image, rows in enumerate(targets[:, :-1]):
        rows, is_box = rows[rows[:, 0] >= 0], boxes.is_box[image]
        predicted_boxes = {"boxes": boxes.corners[image][is_box], "scores": boxes.scores[image][is_box]}
        true_boxes = {"boxes": rows[:, 1:5], "labels": rows[:, 0].long(), "iscrowd": rows[:, 5].long()}
        metric.update([{**predicted_boxes, "labels": boxes.classes[image][is_box].long()}], [true_boxes])
    expected = metric.compute()
    assert 0.05 < expected["map"] < 0.95
    assert task.quality(statistics) == pytest.approx(float(expected["map"]), abs=1e-6)
    assert float(task.precisions(statistics)[:, 0].mean()) == pytest.approx(float(expected["map_50"]), abs=1e-6)


def _joint_rows(draw: torch.Generator, boxes: Boxes, joints: int) -> Tensor:
    """Targets near what is found; some joints, and all of some objects, are not marked."""
    rows = _targets(draw, boxes)
    assert boxes.joints is not None
    places = boxes.joints.places[:, :TRUTHS] + 1.5 * torch.randn(IMAGES, TRUTHS, joints, 2, generator=draw)
    marked = torch.rand(IMAGES, TRUTHS, joints, 1, generator=draw) < 0.7
    marked[:, ::4] = False
    table = torch.cat([places, marked], 3).flatten(2)
    areas = 100 + 300 * torch.rand(IMAGES, TRUTHS, 1, generator=draw)
    beside = torch.cat([areas, table], 2)
    return torch.cat([rows, torch.cat([beside, torch.zeros(IMAGES, 1, beside.shape[2])], 1)], 2)


def _coco_map_of_joints(boxes: Boxes, targets: Tensor, joints: int) -> float:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results = COCO(), []
    annotations = []
    for image, rows in enumerate(targets[:, :-1].double().tolist()):
        for kind, x, y, right, low, crowd, area, *table in rows:
            if kind < 0:
                continue
            marked = sum(table[2::3])
            annotations.append(
                {
                    **{"id": len(annotations) + 1, "image_id": image, "category_id": int(kind), "iscrowd": int(crowd)},
                    **{"bbox": [x, y, right - x, low - y], "area": area, "keypoints": table, "num_keypoints": marked},
                }
            )
        assert boxes.joints is not None
        for place in boxes.is_box[image].nonzero()[:, 0].tolist():
            places = boxes.joints.places[image, place]
            table = torch.cat([places, torch.ones(joints, 1)], 1).flatten().tolist()
            kind, score = int(boxes.classes[image, place]), float(boxes.scores[image, place])
            results.append({"image_id": image, "category_id": kind, "score": score, "keypoints": table})
    truth.dataset = {
        "images": [{"id": image} for image in range(IMAGES)],
        "annotations": annotations,
        "categories": [{"id": kind, "name": str(kind)} for kind in range(CLASSES)],
    }
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), "keypoints")
    if joints != 17:
        evaluation.params.kpt_oks_sigmas = np.full(joints, 1 / joints)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


@pytest.mark.parametrize("joints", [17, 4])
@pytest.mark.parametrize("seed", range(2))
def test_map_of_joints_is_that_of_cocos_own_code(seed: int, joints: int, capsys: pytest.CaptureFixture[str]) -> None:
    draw, task = torch.Generator().manual_seed(seed), Keypoints()
    outputs = {"output": _outputs(draw)["output"][:, :, :FEW]}  # as many as count
    places = outputs["output"][:, :2].transpose(1, 2)[:, :, None] + 8 * torch.randn(
        IMAGES, FEW, joints, 2, generator=draw
    )
    outputs["keypoints"] = torch.cat([places, torch.ones(IMAGES, FEW, joints, 1)], 3)
    boxes = task._predicted_boxes(outputs)
    targets = _joint_rows(draw, boxes, joints)
    expected = _coco_map_of_joints(boxes, targets, joints)
    assert 0.05 < expected < 0.95
    assert task.quality(task.statistics(outputs, targets, outputs)) == pytest.approx(expected, abs=1e-6)
