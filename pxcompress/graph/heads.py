"""Attention heads: which rows of layers and parameters each head owns, computed from shapes.

That the heads of a module can go at all is left to the trial that every group has to pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.graph.attention_layouts import AttentionLayout, layers_below, layout_of, read_attribute
from pxcompress.graph.dependencies import PRODUCERS
from pxcompress.graph.narrow import narrow_heads_
from pxcompress.types import Group, Member


@dataclass(frozen=True)
class Attention:
    """An attention module of a model, by name, and the names of its layers.

    `inputs` make queries, keys and values, and `output` reads the heads. `followers` are layers with one output for
    each head, `norms` those between the projections and the heads.
    """

    name: str
    layout: AttentionLayout
    heads: int
    inputs: tuple[str, ...]
    output: str
    norms: tuple[str, ...] = ()
    followers: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose outputs belong to heads."""
        return (*self.inputs, *self.followers)


def find_attentions(model: nn.Module) -> Iterator[Attention]:
    """The modules of a model that have a registered attention layout and whose layers divide evenly into heads."""
    for name, module in model.named_modules():
        layout = layout_of(module)
        if layout is None:
            continue
        heads = layout.heads(module)
        inputs, outputs = (layers_below(module, children) for children in (layout.projections, layout.outputs))
        rows = [module.get_submodule(layer).out_features for layer in inputs]
        if any(width % heads for width in (module.get_submodule(outputs[0]).in_features, *rows)):
            continue
        norms = layers_below(module, layout.projections, nn.BatchNorm1d)
        linear = [layer for layer, part in module.named_modules() if isinstance(part, nn.Linear)]
        others = [layer for layer in linear if layer not in (*inputs, *outputs)]
        followers = [layer for layer in others if module.get_submodule(layer).out_features == heads]
        input_names, norm_names, follower_names, output_names = (
            tuple(f"{name}.{layer}".lstrip(".") for layer in layers) for layers in (inputs, norms, followers, outputs)
        )
        yield Attention(name, layout, heads, input_names, output_names[0], norm_names, follower_names)


def head_group(model: nn.Module, attention: Attention) -> Group:
    """The group whose units are the heads of one attention module."""
    module = model.get_submodule(attention.name)
    inner: int = model.get_submodule(attention.output).in_features  # type: ignore[assignment]
    heads = torch.arange(attention.heads).unsqueeze(1)
    members = [Member(attention.output, "in", torch.arange(inner).reshape(attention.heads, -1))]
    for name in (*attention.inputs, *attention.norms):
        rows = len(model.get_submodule(name).weight)  # type: ignore[arg-type]
        members.append(Member(name, "out", _list_head_rows(rows, inner, attention)))
    members += [Member(name, "out", heads) for name in attention.followers]
    for name, tensor in _find_head_tensors(module):
        path = f"{attention.name}.{name}".lstrip(".")
        if tensor.shape == (inner,):
            members.append(Member(path, "out", torch.arange(inner).reshape(attention.heads, -1), 0))
        elif isinstance(tensor, nn.Parameter) and (axes := _find_head_axes(name, tensor, attention)):
            members.append(Member(path, "out", heads, axes[0]))
    return Group(attention.name, "head", attention.heads, tuple(members))


def set_heads_(model: nn.Module, group: Group, kept_heads: int) -> None:
    """Set the number of heads of an attention module after removal, and the widths that follow from it, in place."""
    module = model.get_submodule(group.name)
    inner = group.members[0].index.numel()
    layout = layout_of(module)
    assert layout is not None, f"{group.name} has had a layout when its heads were found"
    for key in (*layout.counts, *layout.widths):
        if isinstance(value := read_attribute(module, key), int):
            path, _, name = key.rpartition(".")
            setattr(module.get_submodule(path), name, value * kept_heads // group.units)
    for key in layout.caches:
        if hasattr(module, key):
            setattr(module, key, {})
    narrow_heads_(module, group.units, inner, kept_heads)


def set_stream_(model: nn.Module, group: Group, left: int) -> None:
    """Set the input width of the attention modules that read the stream `group` to `left`, in place."""
    heads = {reader: attention for attention in find_attentions(model) for reader in attention.inputs}
    for member in group.consumers:
        module = model.get_submodule(member.module.rpartition(".")[0])
        if attention := heads.get(member.module):
            inner: int = model.get_submodule(attention.output).in_features  # type: ignore[assignment]
            narrow_heads_(module, attention.heads, inner, stream=left)
        else:
            narrow_heads_(module, 1, group.units + 1, stream=left)


def _find_head_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of tensors that may have an axis of heads, within an attention module.

    They are its own parameters and buffers of floating point, and the tables (of two or more axes) of its parts.
    """
    for path, part in module.named_modules():
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            is_head_tensor = part is module or (tensor.dim() > 1 and not isinstance(part, PRODUCERS))
            if is_head_tensor and tensor.is_floating_point() and tensor.dim():
                yield f"{path}.{name}".lstrip("."), tensor


def _find_head_axes(name: str, tensor: Tensor, attention: Attention) -> list[int]:
    """Axes of a parameter that may be the heads, the most likely first: the last one of a table, else the first."""
    is_table = any(part in name for part in attention.layout.tables)
    ends = (tensor.dim() - 1, 0) if is_table else (0, tensor.dim() - 1)
    return [axis for axis in ends if tensor.shape[axis] == attention.heads]


def _list_head_rows(rows: int, inner: int, attention: Attention) -> Tensor:
    """Rows of every head (heads, k) in a projection with `rows` outputs, ordered as the layout says."""
    heads = attention.heads
    if attention.layout.rows == "heads" or rows % inner:
        return torch.arange(rows).reshape(heads, -1)
    return torch.arange(rows).reshape(rows // inner, heads, inner // heads).transpose(0, 1).reshape(heads, -1)
