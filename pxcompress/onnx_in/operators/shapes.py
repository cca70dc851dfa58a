"""Operators that move, cut, join and make tensors, without arithmetic on their values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pxcompress.onnx_in.operators.table import Settings, Unsupported, axes_of, operator, to_ints, to_number


@operator("Shape")
def _shape(node: Settings, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[node.get("start", 0) : node.get("end")], dtype=torch.int64)


@operator("Size")
def _size(node: Settings, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@operator("Concat")
def _concat(node: Settings, *parts: Tensor) -> Tensor:
    return torch.cat(parts, node["axis"])


@operator("Flatten")
def _flatten(node: Settings, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    return x.reshape(int(torch.tensor(x.shape[:axis]).prod()) if axis else 1, -1)


@operator("Reshape")
def _reshape(node: Settings, x: Tensor, sizes: Any) -> Tensor:
    shape = to_ints(sizes)
    if not node.get("allowzero"):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return x.reshape(shape)


@operator("Transpose")
def _transpose(node: Settings, x: Tensor) -> Tensor:
    return x.permute(node.get("perm") or tuple(reversed(range(x.dim()))))


@operator("Squeeze")
def _squeeze(node: Settings, x: Tensor, axes: Any = None) -> Tensor:
    chosen = axes_of(node, axes) or [axis for axis, size in enumerate(x.shape) if size == 1]
    return x.squeeze(tuple(chosen))


@operator("Unsqueeze")
def _unsqueeze(node: Settings, x: Tensor, axes: Any = None) -> Tensor:
    chosen = axes_of(node, axes)
    for axis in sorted(axis % (x.dim() + len(chosen)) for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Expand")
def _expand(node: Settings, x: Tensor, sizes: Any) -> Tensor:
    shape = to_ints(sizes)
    own = [1] * (len(shape) - x.dim()) + list(x.shape)
    shape = [1] * (x.dim() - len(shape)) + shape
    return x.expand([max(a, b) if min(a, b) == 1 else a for a, b in zip(own, shape, strict=True)])


@operator("Tile")
def _tile(node: Settings, x: Tensor, repeats: Any) -> Tensor:
    return x.repeat(to_ints(repeats))


@operator("Slice")
def _slice(node: Settings, x: Tensor, *bounds: Any) -> Tensor:
    """ONNX's Slice; `bounds` are starts, ends, axes and steps, but before opset 10 the first three are attributes."""
    parts = [to_ints(value) for value in bounds] + [[]] * (4 - len(bounds))
    starts, ends = parts[0] or list(node.get("starts", ())), parts[1] or list(node.get("ends", ()))
    axes = parts[2] or list(node.get("axes", ())) or list(range(len(starts)))
    for start, end, axis, step in zip(starts, ends, axes, parts[3] or [1] * len(starts), strict=True):
        x = _cut(x, axis, start, end, step)
    return x


def _cut(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    size = x.shape[axis]
    if step < 0:  # PyTorch has no negative steps
        places = range(*slice(start, None if end < -size else end, step).indices(size))
        return x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
    index = [slice(None)] * x.dim()
    index[axis] = slice(max(start, -size), min(end, size) if end >= 0 else max(end, -size), step)
    return x[tuple(index)]


@operator("Split")
def _split(node: Settings, x: Tensor, sizes: Any = None) -> tuple[Tensor, ...]:
    axis, widths = node.get("axis", 0), to_ints(sizes) or list(node.get("split", ()))
    if not widths:
        return x.chunk(node.get("num_outputs") or node.outputs, axis)
    return x.chunk(len(widths), axis) if len(set(widths)) == 1 else x.split(widths, axis)


@operator("Gather")
def _gather(node: Settings, x: Tensor, index: Tensor) -> Tensor:
    axis = node.get("axis", 0)
    if not index.dim():
        return x.select(axis, int(index))
    flat = torch.where(index < 0, index + x.shape[axis], index).long().reshape(-1)
    return x.index_select(axis, flat).unflatten(axis, index.shape)


@operator("GatherElements")
def _gather_elements(node: Settings, x: Tensor, index: Tensor) -> Tensor:
    axis = node.get("axis", 0)
    return x.gather(axis, torch.where(index < 0, index + x.shape[axis], index).long())


@operator("GatherND")
def _gather_nd(node: Settings, x: Tensor, index: Tensor) -> Tensor:
    if node.get("batch_dims", 0):
        raise Unsupported("GatherND with batch_dims")
    return x[tuple(index.long().unbind(-1))]


@operator("ScatterND")
def _scatter_nd(node: Settings, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    if node.get("reduction", "none") != "none":
        raise Unsupported("ScatterND with a reduction")
    return x.index_put(tuple(index.unbind(-1)), updates)


@operator("ScatterElements")
def _scatter_elements(node: Settings, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    if node.get("reduction", "none") != "none":
        raise Unsupported("ScatterElements with a reduction")
    axis = node.get("axis", 0)
    return x.scatter(axis, torch.where(index < 0, index + x.shape[axis], index).long(), updates)


PAD_MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@operator("Pad")
def _pad(node: Settings, x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    widths = to_ints(pads) or list(node.get("pads", ()))
    fill = to_number(value) if value is not None else node.get("value", 0.0)
    chosen = to_ints(axes) or list(range(x.dim()))
    sides = [0] * (2 * x.dim())
    for place, axis in enumerate(chosen):
        at = 2 * (x.dim() - 1 - axis % x.dim())
        sides[at], sides[at + 1] = widths[place], widths[place + len(chosen)]
    if not any(sides):
        return x
    mode = node.get("mode", "constant")
    while len(sides) > 2 and not any(sides[-2:]):
        sides = sides[:-2]
    if mode == "constant":
        return F.pad(x, sides, value=fill)
    if len(sides) < 2 * (x.dim() - 2):  # PyTorch wants all spatial axes
        sides += [0] * (2 * (x.dim() - 2) - len(sides))
    return F.pad(x, sides, mode=PAD_MODES[mode])


@operator("Range")
def _range(node: Settings, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(to_number(start), to_number(limit), to_number(delta), dtype=start.dtype)


@operator("ConstantOfShape")
def _constant_of_shape(node: Settings, sizes: Any) -> Tensor:
    value = node.get("value")
    value = torch.zeros(1) if value is None else value
    return torch.full(to_ints(sizes), value.item(), dtype=value.dtype)


@operator("Trilu")
def _trilu(node: Settings, x: Tensor, diagonal: Any = None) -> Tensor:
    place = 0 if diagonal is None else (to_ints(diagonal) or [0])[0]
    return x.triu(place) if node.get("upper", 1) else x.tril(place)


@operator("OneHot")
def _one_hot(node: Settings, index: Tensor, depth: Any, values: Tensor) -> Tensor:
    count = to_ints(depth)[0]
    index = index.long()
    inside = (index >= -count) & (index < count)
    hot = F.one_hot(index % count, count).bool() & inside[..., None]
    return torch.where(hot, values[1], values[0]).movedim(-1, node.get("axis", -1))


@operator("NonZero")
def _nonzero(node: Settings, x: Tensor) -> Tensor:
    return x.nonzero().T


@operator("DepthToSpace")
def _depth_to_space(node: Settings, x: Tensor) -> Tensor:
    block = node["blocksize"]
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, channels, height, width = x.shape
    blocks = x.reshape(n, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, channels // block**2, height * block, width * block)


@operator("SpaceToDepth")
def _space_to_depth(node: Settings, x: Tensor) -> Tensor:
    if node.get("mode", "DCR") != "DCR":
        raise Unsupported("SpaceToDepth in another mode than DCR")
    n, channels, height, width = x.shape
    block = node["blocksize"]
    blocks = x.reshape(n, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, channels * block**2, height // block, width // block)
