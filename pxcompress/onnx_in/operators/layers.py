"""Convolutions, pooling and norms as functions, for weights that are computed in the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pxcompress.onnx_in.operators.table import Settings, Unsupported, operator

CONVOLUTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
MAX_POOLS: tuple[Any, ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
AVERAGE_POOLS: tuple[Any, ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def window(node: Settings, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and pads (all beginnings, then all ends) of a convolution or pooling, for images of spatial
    `sizes`.
    """
    rank = len(kernel)
    strides, dilations = list(node.get("strides", [1] * rank)), list(node.get("dilations", [1] * rank))
    pads, auto = list(node.get("pads", [0] * 2 * rank)), node.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = [], []
        for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
            total = max(0, (math.ceil(size / stride) - 1) * stride + dilation * (width - 1) + 1 - size)
            less, more = total // 2, total - total // 2
            begins.append(less if auto == "SAME_UPPER" else more)
            ends.append(more if auto == "SAME_UPPER" else less)
        pads = begins + ends
    return strides, dilations, pads


def pad_sides(pads: Sequence[int]) -> list[int]:
    """Pads in the order of `F.pad`: last axis first, beginning and end together."""
    rank = len(pads) // 2
    return [pads[axis + side * rank] for axis in reversed(range(rank)) for side in (0, 1)]


@operator("MaxPool")
def _max_pool(node: Settings, x: Tensor) -> Tensor:
    if node.outputs > 1:
        raise Unsupported("MaxPool with indices")
    kernel = list(node["kernel_shape"])
    strides, dilations, pads = window(node, x.shape[2:], kernel)
    rank = len(kernel)
    if pads[:rank] != pads[rank:] or any(2 * pad > width for pad, width in zip(pads, kernel * 2, strict=True)):
        x, pads = F.pad(x, pad_sides(pads), value=-math.inf), [0] * 2 * rank
    ceil = bool(node.get("ceil_mode", 0))
    return MAX_POOLS[rank - 1](x, kernel, strides, pads[:rank], dilations, ceil_mode=ceil)


@operator("AveragePool")
def _average_pool(node: Settings, x: Tensor) -> Tensor:
    kernel = list(node["kernel_shape"])
    strides, dilations, pads = window(node, x.shape[2:], kernel)
    if any(dilation != 1 for dilation in dilations):
        raise Unsupported("AveragePool with dilations")
    rank, include = len(kernel), bool(node.get("count_include_pad", 0))
    pool, ceil = AVERAGE_POOLS[rank - 1], bool(node.get("ceil_mode", 0))
    if pads[:rank] == pads[rank:] and all(2 * pad <= width for pad, width in zip(pads, kernel * 2, strict=True)):
        return pool(x, kernel, strides, pads[:rank], ceil, include)
    sums = pool(F.pad(x, pad_sides(pads)), kernel, strides, 0, ceil)
    if include:
        return sums
    return sums / pool(F.pad(torch.ones_like(x[:1, :1]), pad_sides(pads)), kernel, strides, 0, ceil)


@operator("Conv")
def _conv(node: Settings, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.dim() - 2
    strides, dilations, pads = window(node, x.shape[2:], weight.shape[2:])
    if pads[:rank] != pads[rank:]:
        x, pads = F.pad(x, pad_sides(pads)), [0] * 2 * rank
    return CONVOLUTIONS[rank - 1](x, weight, bias, strides, pads[:rank], dilations, node.get("group", 1))


@operator("ConvTranspose")
def _conv_transpose(node: Settings, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.dim() - 2
    if not plain_transposed(node, rank):
        raise Unsupported("ConvTranspose with output_shape, auto_pad or unequal pads")
    strides, dilations, pads = window(node, x.shape[2:], weight.shape[2:])
    more, groups = node.get("output_padding", [0] * rank), node.get("group", 1)
    return TRANSPOSED[rank - 1](x, weight, bias, strides, pads[:rank], more, groups, dilations)


def plain_transposed(node: Settings, rank: int) -> bool:
    """Whether PyTorch can express the padding of a transposed convolution."""
    pads = list(node.get("pads", [0] * 2 * rank))
    auto = node.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return auto and node.get("output_shape") is None and pads[:rank] == pads[rank:]


@operator("Gemm")
def _gemm(node: Settings, x: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
    x, y = (x.T if node.get("transA") else x), (y.T if node.get("transB") else y)
    product = node.get("alpha", 1.0) * (x @ y)
    return product if z is None else product + node.get("beta", 1.0) * z


@operator("BatchNormalization")
def _batch_norm(node: Settings, x: Tensor, weight: Tensor, bias: Tensor, *moments: Tensor) -> Tensor:
    if node.get("training_mode"):
        raise Unsupported("BatchNormalization in training mode")
    return F.batch_norm(x, moments[0], moments[1], weight, bias, False, 0.0, node.get("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(node: Settings, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
    axis, eps = node.get("axis", -1) % x.dim(), node.get("epsilon", 1e-5)
    shape = x.shape[axis:]
    made = F.layer_norm(x, shape, weight.reshape(shape), None if bias is None else bias.reshape(shape), eps)
    if node.outputs == 1:
        return made
    axes = tuple(range(axis, x.dim()))
    return made, x.mean(axes, keepdim=True), (x.var(axes, correction=0, keepdim=True) + eps).rsqrt()


@operator("RMSNormalization")
def _rms_norm(node: Settings, x: Tensor, weight: Tensor) -> Tensor:
    shape = x.shape[node.get("axis", -1) % x.dim() :]
    return F.rms_norm(x, shape, weight.expand(shape), node.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(node: Settings, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, None, None, weight, bias, True, 0.0, node.get("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(node: Settings, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups = node["num_groups"]
    if node.opset < 21:  # one number for each group
        each = x.shape[1] // groups
        weight, bias = weight.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, weight, bias, node.get("epsilon", 1e-5))


@operator("LRN")
def _local_response_norm(node: Settings, x: Tensor) -> Tensor:
    return F.local_response_norm(
        x, node["size"], node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    )
