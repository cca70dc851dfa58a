"""Detectors for embedded data: `--model pxcompress.demo.detectors:glyph_yolo --data glyph-boxes`, `...:glyph_ssd`.

Both are shaped as detectors in use are, and small: an anchor-free one of the kind of YOLOv8 with split blocks, a
pyramid up and down, and box sides as distributions (DFL), and one of the kind of SSDLite with separable heads on
anchors. Written from the papers (Redmon et al., https://arxiv.org/abs/1506.02640; Li et al.,
https://arxiv.org/abs/2006.04388; Sandler et al., https://arxiv.org/abs/1801.04381).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

BINS = 8
"""Number of bins, one stride wide each, for the predicted distance from a location to a side of its box."""

PRIOR = -math.log(20)
"""Initial logit of every class, low because most locations show nothing."""


def convolution(channels: int, width: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution followed by BatchNorm and SiLU."""
    layer = nn.Conv2d(channels, width, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.SiLU())


class Bottleneck(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, width: int, *, shortcut: bool) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = convolution(width, width, 3), convolution(width, width, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return x + y if self.shortcut else y


class SplitBlock(nn.Module):
    """A block as C2f of YOLO: half of the channels passes through bottlenecks, and all their outputs are
    concatenated.
    """

    def __init__(self, channels: int, width: int, depth: int = 1, *, shortcut: bool = True) -> None:
        super().__init__()
        half = width // 2
        self.enter, self.leave = convolution(channels, width), convolution((2 + depth) * half, width)
        self.blocks = nn.ModuleList(Bottleneck(half, shortcut=shortcut) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class PoolingPyramid(nn.Module):
    """A block as SPPF of YOLO: three poolings in a row, whose outputs are concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = convolution(width, width // 2), convolution(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class SplitHead(nn.Module):
    """Predicts boxes and classes at every location: (n, 4 + classes, locations), boxes in pixels, classes as
    probabilities.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.strides = tuple(strides)
        inner = widths[0]
        self.boxes, self.classes = (
            nn.ModuleList(
                nn.Sequential(convolution(width, inner, 3), convolution(inner, inner, 3), nn.Conv2d(inner, outputs, 1))
                for width in widths
            )
            for outputs in (4 * BINS, num_classes)
        )
        for branch in self.classes:
            nn.init.constant_(branch[-1].bias, PRIOR)  # type: ignore[index]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = []
        for x, stride, boxes, classes in zip(maps, self.strides, self.boxes, self.classes, strict=True):
            sides = boxes(x).unflatten(1, (4, BINS)).flatten(3).softmax(2)
            steps = torch.arange(BINS, dtype=x.dtype, device=x.device)[None, None, :, None]
            left, top, right, bottom = ((sides * steps).sum(2) * stride).unbind(1)
            x_middle, y_middle = _make_grid(x, stride)
            middle = [x_middle + (right - left) / 2, y_middle + (bottom - top) / 2]
            sizes = [left + right, top + bottom]
            levels.append(torch.cat([torch.stack(middle + sizes, 1), classes(x).flatten(2).sigmoid()], 1))
        return torch.cat(levels, 2)


def _make_grid(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Pixel coordinates x and y, each (locations,), of the centres of a feature map's cells."""
    height, width = x.shape[-2:]
    rows, columns = (stride * (torch.arange(count, device=x.device) + 0.5).to(x) for count in (height, width))
    return columns.expand(height, width).flatten(), rows[:, None].expand(height, width).flatten()


class SplitDetector(nn.Module):
    """A backbone of split blocks, a pyramid from coarse to fine and back, and a head at strides of 8 and 16."""

    def __init__(self, num_classes: int = 8, widths: Sequence[int] = (12, 24, 48, 64)) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (3, 64, 64), "crop_mode": "border", "crop_pct": 1.0}
        first, second, third, fourth = widths
        self.stem = nn.Sequential(convolution(3, first, 3, 2), convolution(first, second, 3, 2))
        self.early = SplitBlock(second, second)
        self.fine = nn.Sequential(convolution(second, third, 3, 2), SplitBlock(third, third, 2))
        self.coarse = nn.Sequential(
            convolution(third, fourth, 3, 2), SplitBlock(fourth, fourth), PoolingPyramid(fourth)
        )
        self.up = SplitBlock(third + fourth, third, shortcut=False)
        self.down = convolution(third, third, 3, 2)
        self.merge = SplitBlock(third + fourth, fourth, shortcut=False)
        self.head = SplitHead((third, fourth), (8, 16), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(self.early(self.stem(x)))
        coarse = self.coarse(fine)
        fine = self.up(torch.cat([interpolate(coarse, scale_factor=2.0), fine], 1))
        coarse = self.merge(torch.cat([self.down(fine), coarse], 1))
        return self.head([fine, coarse])


def glyph_yolo(num_classes: int = 8) -> nn.Module:
    """An anchor-free detector for images of 64 x 64 pixels."""
    return SplitDetector(num_classes)


class InvertedResidual(nn.Module):
    """A block as in MobileNetV2: widen, depthwise convolution, narrow; with a shortcut where shapes are equal."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        inner = expansion * channels
        project = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))
        self.layers = nn.Sequential(convolution(channels, inner), convolution(inner, inner, 3, stride, inner), project)
        self.shortcut = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


ANCHORS = ((1.0, 0.7), (1.4, 1.0), (1.0, 1.4))
"""The anchor boxes at each location: ratio of height to width, and size in units of 2 strides."""


class AnchorDetector(nn.Module):
    """A detector of inverted residuals with heads at strides 8 and 16: corners in pixels, and logits of every
    anchor.
    """

    def __init__(self, num_classes: int = 8, widths: Sequence[int] = (16, 24, 32, 48, 64)) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (3, 64, 64), "crop_mode": "squash", "crop_pct": 1.0}
        self.num_classes = num_classes
        self.stem = convolution(3, widths[0], 3, 2)
        strides = (2, 2, 1, 2)
        pairs = zip(pairwise(widths), strides, strict=True)
        self.blocks = nn.ModuleList(InvertedResidual(*pair, stride) for pair, stride in pairs)
        self.deep = InvertedResidual(widths[-1], widths[-1], 1)
        self.boxes, self.classes = (
            nn.ModuleList(_make_separable(width, len(ANCHORS) * outputs) for width in widths[-2:])
            for outputs in (4, num_classes)
        )
        for branch in self.classes:
            nn.init.constant_(branch[-1].bias, PRIOR)  # type: ignore[index]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = []
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        corners, logits = [], []
        for stride, level, boxes, classes in zip(
            (8, 16), (maps[2], self.deep(x)), self.boxes, self.classes, strict=True
        ):
            codes = boxes(level).unflatten(1, (len(ANCHORS), 4)).movedim(2, -1).flatten(1, 3)
            corners.append(_decode_anchor_codes(codes, level, stride))
            logits.append(classes(level).unflatten(1, (len(ANCHORS), self.num_classes)).movedim(2, -1).flatten(1, 3))
        return {"boxes": torch.cat(corners, 1), "logits": torch.cat(logits, 1)}


def _make_separable(width: int, outputs: int) -> nn.Sequential:
    """A separable convolution: depthwise, then 1 x 1."""
    return nn.Sequential(convolution(width, width, 3, groups=width), nn.Conv2d(width, outputs, 1))


def _decode_anchor_codes(codes: Tensor, level: Tensor, stride: int) -> Tensor:
    """Turn predicted codes (n, anchors * locations, 4) into box corners in pixels.

    A code shifts the anchor by shares of its sides, and scales it by the exponential.
    """
    x, y = (each.repeat(len(ANCHORS)) for each in _make_grid(level, stride))
    cells = level.shape[-2] * level.shape[-1]
    shapes = torch.tensor(ANCHORS, device=level.device, dtype=level.dtype)
    sizes = 2 * stride * shapes[:, 1] * torch.stack([shapes[:, 0].sqrt(), shapes[:, 0].rsqrt()])
    heights, widths = sizes[..., None].expand(-1, -1, cells).flatten(1)
    move_x, move_y, grow_x, grow_y = codes.unbind(-1)
    x, y = x + move_x * widths, y + move_y * heights
    half_x, half_y = widths * grow_x.clamp(max=4.0).exp() / 2, heights * grow_y.clamp(max=4.0).exp() / 2
    return torch.stack([x - half_x, y - half_y, x + half_x, y + half_y], -1)


def glyph_ssd(num_classes: int = 8) -> nn.Module:
    """A detector with anchors for images of 64 x 64 pixels."""
    return AnchorDetector(num_classes)
