"""Attention heads: which rows of which layers each one owns, by arithmetic on the layers' shapes.

That the heads of a module can go at all is left to the trial that every group has to pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.types import Group, Member

PROJECTIONS = ("qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj")
OUTPUTS = ("proj", "out_proj")
WIDTHS = ("num_heads", "attn_dim", "all_head_dim", "attention_dim", "key_attn_dim", "val_attn_dim")
"""Attributes that grow with the number of heads. The scale and the size of a head stay what they were."""


@dataclass(frozen=True)
class Attention:
    """An attention module: the layers that make its queries, keys and values, and the one that reads its heads."""

    name: str
    heads: int
    inputs: tuple[str, ...]
    output: str


def attentions(model: nn.Module) -> Iterator[Attention]:
    """Modules with `num_heads`, linear projections named as usual, and a linear output projection."""
    for name, module in model.named_modules():
        heads = getattr(module, "num_heads", None)
        inputs = _linear(module, PROJECTIONS)
        outputs = _linear(module, OUTPUTS)
        if not isinstance(heads, int) or not inputs or len(outputs) != 1:
            continue
        inner = module.get_submodule(outputs[0]).in_features
        if inner % heads == 0 and all(module.get_submodule(part).out_features % heads == 0 for part in inputs):
            prefix = f"{name}." if name else ""
            yield Attention(name, heads, tuple(prefix + part for part in inputs), prefix + outputs[0])


def head_group(model: nn.Module, attention: Attention) -> Group:
    """The heads of one attention module as units."""
    weight: Tensor = model.get_submodule(attention.output).weight  # type: ignore[assignment]
    inner = weight.shape[1]
    members = [Member(attention.output, "in", torch.arange(inner).reshape(attention.heads, -1))]
    for name in attention.inputs:
        rows = len(model.get_submodule(name).weight)  # type: ignore[arg-type]
        members.append(Member(name, "out", _rows(rows, inner, attention.heads)))
    return Group(attention.name, "head", attention.heads, tuple(members))


def set_heads_(model: nn.Module, group: Group, kept: int) -> None:
    """Tell an attention module how many of its heads are left."""
    module = model.get_submodule(group.name)
    for key in WIDTHS:
        if isinstance(value := getattr(module, key, None), int):
            setattr(module, key, value * kept // group.units)


def _linear(module: nn.Module, names: Sequence[str]) -> list[str]:
    return [name for name in names if isinstance(getattr(module, name, None), nn.Linear)]


def _rows(rows: int, inner: int, heads: int) -> Tensor:
    """Rows of every head (heads, k): blocks of all heads one after the other, or all that a head has together."""
    if rows % inner:
        return torch.arange(rows).reshape(heads, -1)
    return torch.arange(rows).reshape(rows // inner, heads, inner // heads).transpose(0, 1).reshape(heads, -1)
