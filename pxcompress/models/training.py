"""Parts that the training of a baseline and the fine-tuning of a slim model share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIP = 1.0  # norm of the gradient
SHIFT, TURN, ZOOM = 0.06, 0.12, 0.08  # at most: share of the side, radians, share
LEAST_AREA, STRETCH = 0.35, 4 / 3
"""Bounds for random crops: the smallest share of the image's area, and the largest change of the ratio of its sides."""


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """A context in which numbers below 1.2e-38 count as zero on the CPU; they slow arithmetic down ten-fold."""
    was_flushing = bool(torch.tensor([1e-40]).mul(1.0).eq(0.0))
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_flushing)


@contextmanager
def deterministic() -> Iterator[None]:
    """A context in which cuDNN sums in a fixed order, so that results repeat."""
    was_deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = was_deterministic


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW for all parameters with gradients; biases and normalisation have no weight decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Clip the gradients, take one step of the optimizer, and clear them; returns their norm before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def move_images(images: Tensor) -> Tensor:
    """Shift, rotate and zoom each image (n, c, h, w) a little at random; edges are continued outwards."""
    count = len(images)
    turn, zoom = _uniform(TURN, count), 1.0 + _uniform(ZOOM, count)
    across, down = _uniform(2.0 * SHIFT, count), _uniform(2.0 * SHIFT, count)  # the side is 2 long in grid coordinates
    rows = [zoom * turn.cos(), -zoom * turn.sin(), across, zoom * turn.sin(), zoom * turn.cos(), down]
    return _sample_images(images, rows)


def crop_images(images: Tensor) -> Tensor:
    """A random crop of every image (n, c, h, w), resized to the image's size (Szegedy et al., arXiv:1409.4842)."""
    count = len(images)
    side = (1.0 - (1.0 - LEAST_AREA) * torch.rand(count)).sqrt()
    stretch = (_uniform(math.log(STRETCH), count) / 2.0).exp()
    width, height = (side * stretch).clamp(max=1.0), (side / stretch).clamp(max=1.0)
    across, down = _uniform(1.0, count) * (1.0 - width), _uniform(1.0, count) * (1.0 - height)
    none = torch.zeros(count)
    return _sample_images(images, [width, none, across, none, height, down])


def _sample_images(images: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Images (n, c, h, w) sampled through one affine map each; edges are continued outwards.

    `rows` are the map's six numbers, row by row as `F.affine_grid` takes them, each a tensor (n,).
    """
    maps = torch.stack(list(rows), dim=1).view(len(images), 2, 3).to(images.device)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _uniform(bound: float, count: int) -> Tensor:
    return (2.0 * torch.rand(count) - 1.0) * bound


@torch.no_grad()
def zero_denormals(model: nn.Module) -> None:
    """Set weights below the smallest normal number to zero, in place, since they make the CPU slow."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.masked_fill_(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0.0)
