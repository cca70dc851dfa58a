"""Makes PyTorch layers from the weights of ONNX nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from pxcompress.onnx_in.operators.layers import plain_transposed, window
from pxcompress.onnx_in.operators.table import Settings

CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fill_(layer: Any, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Copy weight and bias into a layer, and return it."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def make_convolution(node: Settings, weight: Tensor, bias: Tensor | None, *, padded: bool, size: Sequence[int]) -> Any:
    """A convolution layer for images of `size`; `padded` says that its input has been padded already."""
    rank, groups = weight.dim() - 2, node.get("group", 1)
    strides, dilations, pads = window(node, size, weight.shape[2:])
    layer = skip_init(
        CONVOLUTIONS[rank - 1],
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=tuple(strides),
        padding=(0,) * rank if padded else tuple(pads[:rank]),
        dilation=tuple(dilations),
        groups=groups,
        bias=bias is not None,
    )
    return fill_(layer, weight, bias)


def make_transposed(node: Settings, weight: Tensor, bias: Tensor | None) -> nn.Module | None:
    """A transposed convolution layer; None if PyTorch's cannot express its padding."""
    rank, groups = weight.dim() - 2, node.get("group", 1)
    if not plain_transposed(node, rank):
        return None
    strides, dilations, pads = window(node, (), weight.shape[2:])
    layer = skip_init(
        TRANSPOSED[rank - 1],
        weight.shape[0],
        weight.shape[1] * groups,
        tuple(weight.shape[2:]),
        stride=tuple(strides),
        padding=tuple(pads[:rank]),
        output_padding=tuple(node.get("output_padding", [0] * rank)),
        groups=groups,
        bias=bias is not None,
        dilation=tuple(dilations),
    )
    return fill_(layer, weight, bias)


def make_batch_norm(rank: int, values: Sequence[Tensor], eps: float) -> nn.Module:
    """A BatchNorm layer for inputs with `rank` axes; `values` are weight, bias, mean and variance."""
    weight, bias, mean, variance = values
    layer = NORMS[rank - 2](len(weight), eps)
    fill_(layer, weight, bias)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)
    return layer


def make_layer_norm(shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> nn.Module:
    """A LayerNorm layer over the last axes, which have this shape."""
    sizes = tuple(shape)
    layer = nn.LayerNorm(sizes, eps, elementwise_affine=weight is not None or bias is not None, bias=bias is not None)
    if weight is None and bias is None:
        return layer
    ones = torch.ones(sizes) if weight is None else weight
    return fill_(layer, ones.reshape(sizes), None if bias is None else bias.reshape(sizes))
