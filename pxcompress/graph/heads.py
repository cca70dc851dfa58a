"""Attention heads: what each one owns of layers and parameters, by arithmetic on their shapes.

That the heads of a module can go at all is left to the trial that every group has to pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.graph.dependencies import PRODUCERS
from pxcompress.graph.narrow import narrowed_
from pxcompress.types import Group, Member

PROJECTIONS = ("qkv", "qk", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj")
OUTPUTS = ("proj", "out_proj")
COUNTS = ("num_heads", "heads")
WIDTHS = (*COUNTS, "attn_dim", "all_head_dim", "attention_dim", "key_attn_dim", "val_attn_dim")
"""Attributes that grow with the number of heads. The scale and the size of a head stay what they were."""

CACHES = ("attention_bias_cache",)
"""Attributes that hold what was computed from all heads."""

TOGETHER = ("val_dim", "head_first")
"""Attributes of modules whose projections hold all that belongs to a head together, as LeViT's and MaxViT's do."""


@dataclass(frozen=True)
class Attention:
    """An attention module: the layers that make its queries, keys and values, and the one that reads its heads.

    `followers` are layers with one output for each head, `norms` those between the projections and the heads.
    """

    name: str
    heads: int
    inputs: tuple[str, ...]
    output: str
    norms: tuple[str, ...] = ()
    followers: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers whose outputs belong to heads."""
        return (*self.inputs, *self.followers)


def attentions(model: nn.Module) -> Iterator[Attention]:
    """Modules that count their heads, with linear projections named as usual, and a linear output projection."""
    for name, module in model.named_modules():
        heads = _count(module)
        inputs, outputs = _below(module, PROJECTIONS, nn.Linear), _below(module, OUTPUTS, nn.Linear)
        if not heads or not inputs or len(outputs) != 1:
            continue
        rows = [module.get_submodule(layer).out_features for layer in inputs]
        if any(width % heads for width in (module.get_submodule(outputs[0]).in_features, *rows)):
            continue
        norms = _below(module, PROJECTIONS, nn.BatchNorm1d)
        linear = [layer for layer, part in module.named_modules() if isinstance(part, nn.Linear)]
        others = [layer for layer in linear if layer not in (*inputs, *outputs)]
        followers = [layer for layer in others if module.get_submodule(layer).out_features == heads]
        input_names, norm_names, follower_names, output_names = (
            tuple(f"{name}.{layer}".lstrip(".") for layer in layers) for layers in (inputs, norms, followers, outputs)
        )
        yield Attention(name, heads, input_names, output_names[0], norm_names, follower_names)


def head_group(model: nn.Module, attention: Attention) -> Group:
    """The heads of one attention module as units."""
    module = model.get_submodule(attention.name)
    inner: int = model.get_submodule(attention.output).in_features  # type: ignore[assignment]
    is_per_head = any(getattr(module, key, False) for key in TOGETHER)
    heads = torch.arange(attention.heads).unsqueeze(1)
    members = [Member(attention.output, "in", torch.arange(inner).reshape(attention.heads, -1))]
    for name in (*attention.inputs, *attention.norms):
        rows = len(model.get_submodule(name).weight)  # type: ignore[arg-type]
        members.append(Member(name, "out", _rows(rows, inner, attention.heads, is_per_head=is_per_head)))
    members += [Member(name, "out", heads) for name in attention.followers]
    for name, tensor in _own(module):
        path = f"{attention.name}.{name}".lstrip(".")
        if tensor.shape == (inner,):
            members.append(Member(path, "out", torch.arange(inner).reshape(attention.heads, -1), 0))
        elif isinstance(tensor, nn.Parameter) and (axes := _axes_of_heads(name, tensor, attention.heads)):
            members.append(Member(path, "out", heads, axes[0]))
    return Group(attention.name, "head", attention.heads, tuple(members))


def set_heads_(model: nn.Module, group: Group, kept: int) -> None:
    """Tell an attention module how many of its heads are left."""
    module = model.get_submodule(group.name)
    inner = group.members[0].index.numel()
    for key in WIDTHS:
        if isinstance(value := getattr(module, key, None), int):
            setattr(module, key, value * kept // group.units)
    for key in CACHES:
        if hasattr(module, key):
            setattr(module, key, {})
    narrowed_(module, group.units, inner, kept)


def _count(module: nn.Module) -> int:
    """Heads of an attention module; 0 of any other."""
    counts = (getattr(module, key, None) for key in COUNTS)
    return next((count for count in counts if isinstance(count, int)), 0)


def _below(module: nn.Module, parts: Sequence[str], kind: type[nn.Module]) -> list[str]:
    """Names of the layers of `kind` in the children `parts` of `module`, as far as it has them."""
    children = [(part, child) for part in parts if isinstance(child := getattr(module, part, None), nn.Module)]
    return [
        f"{part}.{name}".rstrip(".")
        for part, child in children
        for name, layer in child.named_modules()
        if isinstance(layer, kind)
    ]


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """An attention module's parameters and buffers of floating point, and the tables of what it is made of."""
    for path, part in module.named_modules():
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            is_head_tensor = part is module or (tensor.dim() > 1 and not isinstance(part, PRODUCERS))
            if is_head_tensor and tensor.is_floating_point() and tensor.dim():
                yield f"{path}.{name}".lstrip("."), tensor


def _axes_of_heads(name: str, tensor: Tensor, heads: int) -> list[int]:
    """Dimensions of a parameter that may be its heads, the likeliest first: the last one of a table, else the first."""
    ends = (tensor.dim() - 1, 0) if "table" in name else (0, tensor.dim() - 1)
    return [dim for dim in ends if tensor.shape[dim] == heads]


def _rows(rows: int, inner: int, heads: int, *, is_per_head: bool) -> Tensor:
    """Rows of every head (heads, k): blocks of all heads one after the other, or all that a head has together."""
    if is_per_head or rows % inner:
        return torch.arange(rows).reshape(heads, -1)
    return torch.arange(rows).reshape(rows // inner, heads, inner // heads).transpose(0, 1).reshape(heads, -1)
