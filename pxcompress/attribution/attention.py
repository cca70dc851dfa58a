"""Rules for attention: softmax, fused or spelled-out scaled dot product, nn.MultiheadAttention.

AttnLRP: Achtibat et al. 2024. CP-LRP: Ali et al. 2022. The z+ rule through the softmax is a third choice in the search
of "Pruning by Explaining Revisited".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pxcompress.attribution.transformer import Handler, carries_gradient, product, scale_gradient
from pxcompress.state import device_of, evaluating

SoftmaxRule = Literal["cp", "attn", "zplus"]

SOFTMAX_RULES: Mapping[SoftmaxRule, str] = {
    "cp": "attention weights are constants, all relevance flows through the values (CP-LRP)",
    "attn": "softmax linearised at its input, half of a product's relevance to each factor (AttnLRP)",
    "zplus": "as attn, but only positive contributions through the softmax, its constant kept as a bias",
}
"""The rules for softmax that the text of a composite may name after `softmax=`, each with its description."""


class _SoftmaxZPlus(torch.autograd.Function):
    """The z+ rule for a softmax s, which is replaced by its linear approximation at x; the constant of that is a bias.

    Contributions z_ji = s_j (delta_ij - s_i) x_i and the bias b_j = s_j - sum_i z_ji, positive parts only. With x+ and
    x- the sizes of x's parts and T = sum_i s_i x-_i, the j-th denominator over s_j is
    (1 - s_j) x+_j + T - s_j x-_j + (1 - x_j + sum_i s_i x_i)+, so nothing of size n^2 a row is built.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        s = x.softmax(dim)
        ctx.save_for_backward(x, s)
        ctx.dim = dim
        return s

    @staticmethod
    def backward(ctx: Any, m: Tensor) -> tuple[Tensor, None]:
        x, s = ctx.saved_tensors
        x = x.masked_fill(s == 0, 0.0)  # masked positions: -inf
        positive, negative_part = x.clamp(min=0), (-x).clamp(min=0)
        negative = (s * negative_part).sum(ctx.dim, keepdim=True)
        bias = (1 - x + (s * x).sum(ctx.dim, keepdim=True)).clamp(min=0)
        share = s * m / ((1 - s) * positive + negative - s * negative_part + bias + 1e-6)
        total = share.sum(ctx.dim, keepdim=True)
        return torch.where(x >= 0, (1 - s) * share, s * (share - total)), None


def _keep_gradient(func: Handler, *args: Any, **kwargs: Any) -> Any:
    """Call `func` with its ordinary gradient, as the rule "cp" (CP-LRP) wants it.

    That rule takes attention weights as constants; `marks.prepare_call` has detached them before this call.
    """
    return func(*args, **kwargs)


def _softmax_zplus(func: Handler, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dim = kwargs["dim"] if "dim" in kwargs else args[0]
    return _SoftmaxZPlus.apply(x, dim) if carries_gradient(x) else func(x, *args, **kwargs)


def _attention_attn(func: Handler, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    query, key = (scale_gradient(x, 0.25) if carries_gradient(x) else x for x in (query, key))
    return func(query, key, scale_gradient(value, 0.5) if carries_gradient(value) else value, *args, **kwargs)


def _attention_zplus(func: Handler, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    arguments = dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
    if arguments.get("enable_gqa"):
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scale = arguments.get("scale")
    scores = product(torch.matmul, query * (query.shape[-1] ** -0.5 if scale is None else scale), key.transpose(-2, -1))
    mask = arguments.get("attn_mask")
    if arguments.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return product(torch.matmul, _softmax_zplus(torch.softmax, _mask_scores(scores, mask), -1), value)


def _mask_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Attention scores with a mask applied, as in `scaled_dot_product_attention`: a boolean mask keeps where True,
    others add.
    """
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


ATTENTION: Mapping[SoftmaxRule, Mapping[str, Handler]] = {
    "cp": {"softmax": _keep_gradient, "scaled_dot_product_attention": _keep_gradient},
    "attn": {"softmax": _keep_gradient, "scaled_dot_product_attention": _attention_attn},
    "zplus": {"softmax": _softmax_zplus, "scaled_dot_product_attention": _attention_zplus},
}


class _Calls(TorchFunctionMode):
    """Collects the names of the torch functions that are called while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def has_attention(model: nn.Module, example: Tensor) -> bool:
    """Whether `model` runs attention, so that the choice of a softmax rule matters.

    `example` is one input, (1, ...).
    """
    with evaluating(model), torch.no_grad(), _Calls() as calls:
        model(example.to(device_of(model)))
    return not calls.names.isdisjoint({*ATTENTION["cp"], "multi_head_attention_forward"})


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int, **parameters: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute `F.multi_head_attention_forward` (tokens on the first axis) by functions that have LRP rules of their
    own.
    """
    q, k, v = _project(query, key, value, parameters)
    (length, batch, width), source = q.shape, k.shape[0]
    q, k, v = (x.reshape(x.shape[0], batch, num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    mask = _additive_mask(parameters, (batch, num_heads, length, source), q.dtype)
    weights = None
    if parameters["need_weights"]:
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        out = torch.matmul(weights, v)
        weights = weights.mean(1) if parameters["average_attn_weights"] else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.permute(2, 0, 1, 3).reshape(length, batch, width)
    return F.linear(out, parameters["out_proj_weight"], parameters["out_proj_bias"]), weights


def _project(query: Tensor, key: Tensor, value: Tensor, parameters: Mapping[str, Any]) -> list[Tensor]:
    """Queries, keys and values, projected by one joint weight or by three separate ones."""
    bias = parameters["in_proj_bias"]
    if not parameters["use_separate_proj_weight"] and query is key and key is value:
        return list(F.linear(query, parameters["in_proj_weight"], bias).chunk(3, dim=-1))
    if parameters["use_separate_proj_weight"]:
        weights = [parameters["q_proj_weight"], parameters["k_proj_weight"], parameters["v_proj_weight"]]
    else:
        weights = list(parameters["in_proj_weight"].chunk(3))
    biases = [None] * 3 if bias is None else list(bias.chunk(3))
    return [F.linear(x, weight, b) for x, weight, b in zip((query, key, value), weights, biases, strict=True)]


def _additive_mask(
    parameters: Mapping[str, Any], shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Tensor | None:
    """Attention mask and padding mask as one tensor to add to scores, broadcastable to `shape`.

    True in them means "ignore". None if there is no mask.
    """
    batch, heads, _, source = shape
    attention, padding = parameters["attn_mask"], parameters["key_padding_mask"]
    if attention is not None and attention.dim() == 3:
        attention = attention.view(batch, heads, *attention.shape[1:])
    if padding is not None:
        padding = padding.view(batch, 1, 1, source)
    total = None
    for mask in (attention, padding):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
        total = mask if total is None else total + mask
    return total
