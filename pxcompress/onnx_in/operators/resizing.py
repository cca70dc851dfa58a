"""Operators that enlarge or shrink images, such as Resize."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pxcompress.onnx_in.operators.table import Settings, Unsupported, operator, to_ints

GRID_MODES = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic"}
SMOOTH = {1: "linear", 2: "bilinear", 3: "trilinear"}


@operator("Resize", "Upsample")
def _resize(node: Settings, x: Tensor, *how: Any) -> Tensor:
    """ONNX's Resize; `how` is roi, scales and sizes, but before opset 11 only scales, or an attribute."""
    scales, sizes = _read_scales_and_sizes(node, how)
    target, factors = _target(node, x, scales, sizes)
    if target[:2] != list(x.shape[:2]):
        raise Unsupported("a Resize of batch or channels")
    target = target[2:]
    where = node.get("coordinate_transformation_mode", "half_pixel" if node.opset >= 11 else "asymmetric")
    if node.get("mode", "nearest") == "nearest":
        return _nearest(node, x, target, where)
    return _smooth(node, x, target, factors, where)


def _read_scales_and_sizes(node: Settings, how: Sequence[Any]) -> tuple[Any, Any]:
    arguments = [*how, None, None, None]
    if node.opset < 11:
        return (arguments[0] if arguments[0] is not None else node.get("scales")), None
    return arguments[1], arguments[2]


def _target(node: Settings, x: Tensor, scales: Any, sizes: Any) -> tuple[list[int], list[float] | None]:
    """Sizes of the result, and the scale factors of its spatial axes; None where sizes were given instead."""
    axes = node.get("axes") or list(range(x.dim()))
    if sizes is not None and len(to_ints(sizes)):
        if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise Unsupported("a Resize that keeps the aspect ratio")
        full = list(x.shape)
        for axis, size in zip(axes, to_ints(sizes), strict=True):
            full[axis] = size or x.shape[axis]
        return full, None
    factors = [1.0] * x.dim()
    for axis, factor in zip(axes, scales.tolist() if isinstance(scales, Tensor) else scales, strict=True):
        factors[axis] = float(factor)
    return [math.floor(size * factor) for size, factor in zip(x.shape, factors, strict=True)], factors[2:]


def _nearest(node: Settings, x: Tensor, target: list[int], where: str) -> Tensor:
    rounding = node.get("nearest_mode", "round_prefer_floor" if node.opset >= 11 else "floor")
    if target == list(x.shape[2:]):
        return x
    whole = all(size % own == 0 for size, own in zip(target, x.shape[2:], strict=True))
    rounded = where in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round")
    if (where, rounding) == ("asymmetric", "floor") or (whole and rounded):  # for whole factors both pick the same
        return F.interpolate(x, size=target, mode="nearest")
    raise Unsupported(f"a nearest Resize with {where} and {rounding}")


def _smooth(node: Settings, x: Tensor, target: list[int], factors: list[float] | None, where: str) -> Tensor:
    mode, cubic = node.get("mode"), node.get("mode") == "cubic"
    smooth = "bicubic" if cubic else SMOOTH[len(target)]
    if cubic and abs(node.get("cubic_coeff_a", -0.75) + 0.75) > 1e-6:
        raise Unsupported("a cubic Resize with another coefficient")
    if node.get("antialias"):
        raise Unsupported("a Resize with antialias")
    pairs = zip(target, x.shape[2:], factors or [], strict=False)
    exact = all(abs(size - own * factor) <= 1e-6 for size, own, factor in pairs)
    if where == "align_corners" and exact:
        return F.interpolate(x, size=target, mode=smooth, align_corners=True)
    if where not in ("half_pixel", "pytorch_half_pixel") or (where == "pytorch_half_pixel" and 1 in target):
        raise Unsupported(f"a {mode} Resize with {where}")
    if not exact:
        return F.interpolate(x, scale_factor=factors, mode=smooth, align_corners=False)
    return F.interpolate(x, size=target, mode=smooth, align_corners=False)


@operator("GridSample")
def _grid_sample(node: Settings, x: Tensor, grid: Tensor) -> Tensor:
    mode = GRID_MODES.get(node.get("mode", "linear"), "bicubic")
    return F.grid_sample(x, grid, mode, node.get("padding_mode", "zeros"), bool(node.get("align_corners", 0)))
