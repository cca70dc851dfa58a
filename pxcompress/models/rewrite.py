"""The same model in plain layers, so that what a layer computes with is what it holds: same numbers, removable units.

nn.MultiheadAttention becomes explicit q, k, v and output layers; a layer that derives its weights at every call (weight
standardisation, weight or spectral norm) becomes one that holds the derived weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from pxcompress.state import observed

TOLERANCE = 1e-5
"""Largest difference between a layer and its plain version, as a share of the outputs' scale."""


def plain(model: nn.Module) -> nn.Module:
    """A copy of `model` in which such layers are plain ones; `model` itself where there are none.

    A layer whose plain version does not compute the same stays as it is.
    """
    names = [name for name, module in model.named_modules() if _may_be_rewritten(module)]
    if not names:
        return model
    twin = copy.deepcopy(model)
    for name in names:
        module = twin.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            made: nn.Module | None = _explicit(module)
        elif parametrize.is_parametrized(module):
            made = _settled(module)
        else:
            made = _with_its_weights(module)
        if made is not None:
            made.train(module.training)
            parent, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(parent), attribute, made)
    return twin


class ExplicitAttention(nn.Module):
    """What nn.MultiheadAttention computes, in layers of their own; built from one."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.dropout = attention.num_heads, attention.dropout
        self.head_dim = attention.head_dim
        self.batch_first = attention.batch_first
        weights: Any = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        biases: Any = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        self.q, self.k, self.v = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(  # noqa: PLR0913  (those of nn.MultiheadAttention)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Same arguments and results as nn.MultiheadAttention's, for batched inputs."""
        if not self.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        q, k, v = (
            layer(part).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer, part in ((self.q, query), (self.k, key), (self.v, value))
        )
        mask = _mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            output = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        return (output if self.batch_first else output.transpose(0, 1)), weights


def _mask(attention: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to scores (n, heads, queries, keys), from the two masks nn.MultiheadAttention takes."""
    parts = []
    if attention is not None:  # (queries, keys) or (n * heads, queries, keys)
        parts.append(attention.unflatten(0, (len(like), -1)) if attention.dim() == 3 else attention)
    if padding is not None:  # (n, keys)
        parts.append(padding[:, None, None])
    made = [
        torch.zeros_like(part, dtype=like.dtype).masked_fill(part, -torch.inf) if part.dtype == torch.bool else part
        for part in parts
    ]
    return sum(made[1:], made[0]) if made else None


class _Weights(TorchFunctionMode):
    """Records the weights that convolutions compute with, and the shapes of what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Size, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d and not kwargs:
            self.calls.append((args[0].shape, args[1].detach().clone()))
        return func(*args, **(kwargs or {}))


def _may_be_rewritten(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return module.bias_k is None and not module.add_zero_attn
    own_forward = isinstance(module, nn.Conv2d) and type(module).forward is not nn.Conv2d.forward
    return own_forward or parametrize.is_parametrized(module)


def _explicit(attention: nn.MultiheadAttention) -> nn.Module:
    return ExplicitAttention(attention).to(attention.out_proj.weight.device)


def _settled(module: nn.Module) -> nn.Module:
    """A copy of a parametrized layer in which the tensors are what its parametrizations make of them."""
    made = copy.deepcopy(module)
    made.__class__ = parametrize.type_before_parametrizations(module)  # the class is shared with `module`: not touched
    del made.parametrizations
    for name in module.parametrizations:  # type: ignore[union-attr]
        made.register_parameter(name, nn.Parameter(getattr(module, name).detach().clone()))
    return made


def _with_its_weights(module: nn.Module) -> nn.Module | None:
    """A plain convolution with the weights that `module` derives; None where it derives none, or does more."""
    assert isinstance(module, nn.Conv2d)
    side = tuple(2 * dilation * size + 1 for dilation, size in zip(module.dilation, module.kernel_size, strict=True))
    inputs = torch.randn(2, module.in_channels, *side, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(module.weight)
    try:
        with torch.no_grad(), observed(module), _Weights() as seen:
            expected = module(inputs)
    except Exception:  # noqa: BLE001  (a user's forward may raise anything, or want more than one input)
        return None
    if len(seen.calls) != 1 or torch.equal(seen.calls[0][1], module.weight):
        return None
    shape, weight = seen.calls[0]
    made = _like(module, weight, padded=shape != inputs.shape)
    with torch.no_grad(), observed(made):
        found = made(inputs)
    same = found.shape == expected.shape and (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    return made if same else None


def _like(module: nn.Conv2d, weight: Tensor, *, padded: bool) -> nn.Conv2d:
    """A convolution as `module`, with other weights; `padded` says that its inputs are padded to keep their size."""
    made: nn.Conv2d = (Conv2dSame if padded else nn.Conv2d)(
        module.in_channels,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        stride=module.stride,  # type: ignore[arg-type]
        padding=0 if padded else module.padding,  # type: ignore[arg-type]
        dilation=module.dilation,  # type: ignore[arg-type]
        groups=module.groups,
        bias=module.bias is not None,
    ).to(weight)
    with torch.no_grad():
        made.weight.copy_(weight)
        if made.bias is not None and module.bias is not None:
            made.bias.copy_(module.bias)
    return made


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
