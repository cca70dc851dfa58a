"""Joints of objects, such as elbows and knees, and COCO's measure of their similarity, OKS (object keypoint
similarity).

https://cocodataset.org/#keypoints-eval: an object's joint that is off by d pixels counts exp(-d^2 / (2 s^2 k^2)), where
s^2 is the object's area and k = 2 sigma says how far off people are who mark that joint; OKS is the mean over the
joints that are marked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COCO_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035),  # nose, eyes, ears
    *(0.079, 0.079, 0.072, 0.072, 0.062, 0.062),  # shoulders, elbows, wrists
    *(0.107, 0.107, 0.087, 0.087, 0.089, 0.089),  # hips, knees, ankles
)
"""How much people's marks vary for each of COCO's 17 joints, as a share of the root of the person's area."""

_TINY = 2.0**-52


@dataclass(frozen=True, eq=False)
class Joints:
    """Joints of k objects in each of n images: `places` (n, k, joints, 2), `marked` (n, k, joints), `areas` (n, k)."""

    places: Tensor
    marked: Tensor
    areas: Tensor


def sigmas_of(count: int) -> Tensor:
    """COCO's sigmas for 17 joints of a person; for other objects 1 / joints for each, as in Ultralytics."""
    return torch.tensor(COCO_SIGMAS if count == len(COCO_SIGMAS) else [1 / count] * count, dtype=torch.float64)


def oks(joints: Joints, truth: Joints, corners: Tensor) -> Tensor:
    """OKS (n, k, m), from 0 to 1, of k predicted and m true objects, whose boxes have `corners` (n, m, 4).

    For a true object without marked joints, predicted joints count as right within three times its box.
    """
    places, true_places = joints.places.double()[:, :, None], truth.places.double()[:, None]
    low, high = corners.double().chunk(2, -1)
    low, high = low - (high - low), high + (high - low)
    outside = (low[:, None, :, None] - places).clamp_min(0) + (places - high[:, None, :, None]).clamp_min(0)
    is_marked = truth.marked[:, None, :, :, None]
    any_marked = is_marked.any(-2, keepdim=True)
    squares = torch.where(any_marked, places - true_places, outside).square().sum(-1)
    variances = (2 * sigmas_of(places.shape[-2])).square()
    nearness = torch.exp(-squares / variances / (truth.areas.double()[:, None, :, None] + _TINY) / 2)
    counts = (is_marked | ~any_marked)[..., 0].double()
    return (nearness * counts).sum(-1) / counts.sum(-1)
