"""mAP as COCO's own code computes it (pycocotools, behind torchmetrics)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pxcompress.tasks.boxes import Boxes
from pxcompress.tasks.detection import Detection

pytest.importorskip("pycocotools")

IMAGES, LOCATIONS, CLASSES, TRUTHS = 24, 60, 4, 8


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
    boxes = task._boxes(task._candidates(outputs))
    targets = _targets(draw, boxes)
    statistics = task.statistics(outputs, targets, outputs)
    recalls, thresholds = np.linspace(0, 1, 101).tolist(), np.linspace(0.5, 0.95, 10).tolist()  # its own are float32
    metric = MeanAveragePrecision(backend="pycocotools", rec_thresholds=recalls, iou_thresholds=thresholds)
    for image, rows in enumerate(targets[:, :-1]):
        rows, there = rows[rows[:, 0] >= 0], boxes.there[image]
        found = {"boxes": boxes.corners[image][there], "scores": boxes.scores[image][there]}
        wanted = {"boxes": rows[:, 1:5], "labels": rows[:, 0].long(), "iscrowd": rows[:, 5].long()}
        metric.update([{**found, "labels": boxes.classes[image][there].long()}], [wanted])
    expected = metric.compute()
    assert 0.05 < expected["map"] < 0.95
    assert task.quality(statistics) == pytest.approx(float(expected["map"]), abs=1e-6)
    assert float(task.precisions(statistics)[:, 0].mean()) == pytest.approx(float(expected["map_50"]), abs=1e-6)
