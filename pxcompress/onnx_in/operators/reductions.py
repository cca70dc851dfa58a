"""Operators that reduce many numbers to fewer, such as sums, means and extremes, and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pxcompress.onnx_in.operators.table import Operator, Settings, Unsupported, axes_of, operator, to_number


def _product(x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


REDUCTIONS: dict[str, Operator] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keepdim=keep),
}
"""ONNX's name -> function of a tensor, a tuple of axes, and whether these axes stay with size 1."""


def _make_reduction(function: Operator) -> Operator:
    def run(node: Settings, x: Tensor, axes: Any = None) -> Tensor:
        chosen = axes_of(node, axes)
        if not chosen and node.get("noop_with_empty_axes"):
            return x
        return function(x, tuple(chosen) or tuple(range(x.dim())), bool(node.get("keepdims", 1)))

    return run


for _name, _function in REDUCTIONS.items():
    operator(_name)(_make_reduction(_function))


def _arg(node: Settings, x: Tensor, largest: bool) -> Tensor:
    """Index of the largest or smallest value along an axis.

    Of equal values the first, or the last if the node asks for it.
    """
    axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
    if node.get("select_last_index"):
        flipped = x.flip(axis)
        place = flipped.argmax(axis, keep) if largest else flipped.argmin(axis, keep)
        return x.shape[axis] - 1 - place
    return x.argmax(axis, keep) if largest else x.argmin(axis, keep)


@operator("ArgMax")
def _argmax(node: Settings, x: Tensor) -> Tensor:
    return _arg(node, x, largest=True)


@operator("ArgMin")
def _argmin(node: Settings, x: Tensor) -> Tensor:
    return _arg(node, x, largest=False)


@operator("TopK")
def _topk(node: Settings, x: Tensor, count: Any = None) -> tuple[Tensor, Tensor]:
    count = node.get("k") if count is None else count
    number = int(to_number(count) if isinstance(count, Tensor) else count[0] if isinstance(count, list) else count)
    values, indices = x.topk(number, node.get("axis", -1), bool(node.get("largest", 1)), bool(node.get("sorted", 1)))
    return values, indices


@operator("GlobalAveragePool")
def _global_average_pool(node: Settings, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(node: Settings, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@operator("LpNormalization")
def _lp_normalization(node: Settings, x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, node.get("p", 2), node.get("axis", -1))


@operator("MeanVarianceNormalization")
def _mean_variance(node: Settings, x: Tensor) -> Tensor:
    axes = tuple(node.get("axes", (0, 2, 3)))
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


ATTENTION = {"q_num_heads", "kv_num_heads", "scale", "is_causal", "softmax_precision"}
"""Attributes of ONNX's Attention operator that are supported."""


@operator("Attention")
def _attention(node: Settings, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *past: Any) -> Tensor:
    """Attention of opset 23 on (n, heads, tokens, d), or on (n, tokens, heads * d) with counts of heads."""
    odd = sorted(name for name in node.attributes.keys() - ATTENTION if node[name])
    if any(value is not None for value in past) or node.outputs > 1:
        odd.append("a cache or several outputs")
    if mask is not None and node.get("is_causal"):
        odd.append("a mask beside a causal one")
    if odd:
        raise Unsupported(f"Attention with {', '.join(odd)}")
    flat = q.dim() == 3
    if flat:
        counts = (node["q_num_heads"], node["kv_num_heads"], node["kv_num_heads"])
        q, k, v = (x.unflatten(2, (count, -1)).transpose(1, 2) for x, count in zip((q, k, v), counts, strict=True))
    scale = node.get("scale") or 1 / math.sqrt(q.shape[-1])
    grouped = q.shape[1] != k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=bool(node.get("is_causal")), scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2) if flat else out
