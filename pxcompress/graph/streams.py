"""Finds the residual streams of pre-norm transformers: layers that write them, norms that read them, and their readers.

Read from the dependency graph. That a stream is what this says is proved where it is rotated (`rotation`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from pxcompress.graph.dependencies import CONVOLUTIONS, PRODUCERS, is_depthwise


@dataclass(frozen=True)
class StreamNorm:
    """A norm that reads a stream, and the linear layers that read the norm.

    `reads_all` is false if something else reads the norm as well; `is_within` is true if other norms do, without a
    layer between.
    """

    name: str
    readers: tuple[str, ...]
    reads_all: bool
    is_within: bool = False


@dataclass(frozen=True)
class Stream:
    """A residual stream of `width` channels; all its parts are given by name.

    `writers` are layers whose outputs are added to it, `tables` parameters (..., width) that are added, such as
    position embeddings and class tokens; `scales` are pairs of a parameter (width,) and the writer whose outputs it
    multiplies.
    """

    width: int
    writers: tuple[str, ...]
    tables: tuple[str, ...]
    scales: tuple[tuple[str, str], ...]
    norms: tuple[StreamNorm, ...]


def read_stream(raw: Any, names: dict[Any, str]) -> Stream | str:
    """The stream in torch-pruning's group `raw`, or the reason why its width stays; "" if it has no LayerNorm."""
    nodes = {item.dep.target.module: item.dep.target for item in raw}
    norms = [module for module in nodes if isinstance(module, nn.LayerNorm)]
    if not norms:
        return ""
    width = norms[0].normalized_shape[-1]
    if any(norm.normalized_shape != (width,) for norm in norms) or len(raw[0].idxs) != width:
        return f"LayerNorm {names[norms[0]]} takes its statistics over more than these channels"
    for module in nodes:
        if is_depthwise(module):
            return f"depthwise convolution {names[module]} runs along single channels of it"
        if isinstance(module, nn.Module) and module in names and not isinstance(module, (*PRODUCERS, nn.LayerNorm)):
            return f"{type(module).__name__} {names[module]} works on single channels of it"
    read_norms = [_read_norm(names, nodes[norm]) for norm in norms]
    within = [norm.name for norm in read_norms if norm.is_within]
    if len(within) > 1 or len(within) == len(norms):
        return f"LayerNorm {within[0]} lies within the stream (post-norm), not on a branch of it"
    readers = {name for norm in read_norms for name in norm.readers}
    layers = [module for module in names if module in nodes and isinstance(module, PRODUCERS)]  # in the model's order
    writers = [names[module] for module in layers if names[module] not in readers]
    parameters = {module: node for module, node in nodes.items() if _is_wide(module)}
    scales = {
        names[module]: _find_scaled_writer(names, node) for module, node in parameters.items() if module.dim() == 1
    }
    if unknown := next((name for name, writer in scales.items() if not writer), None):
        return f"parameter {unknown} is added or multiplied outside any layer"
    tables = tuple(names[module] for module in parameters if module.dim() > 1 and module.shape[-1] == width)
    return Stream(width, tuple(writers), tables, tuple(scales.items()), tuple(read_norms))


def _read_norm(names: dict[Any, str], norm: Any) -> StreamNorm:
    """A norm together with the layers that read its output."""
    readers: dict[str, None] = {}
    reads_all, is_within = True, False
    for node in _list_behind(norm):
        if isinstance(node.module, nn.Linear):
            readers[names[node.module]] = None
        elif isinstance(node.module, nn.LayerNorm):
            is_within = True
        elif node.module in names or not node.outputs:
            reads_all = False
    return StreamNorm(names[norm.module], tuple(readers), reads_all and bool(readers) and not is_within, is_within)


def _is_wide(module: Any) -> bool:
    """Whether `module` is a parameter of more than one number."""
    return isinstance(module, nn.Parameter) and module.numel() > 1


def _list_behind(node: Any) -> Iterator[Any]:
    """The first layers, parameters or outputs that follow a node, across operations without parameters."""
    pending, seen = list(node.outputs), set()
    while pending:
        following = pending.pop()
        if id(following) in seen:
            continue
        seen.add(id(following))
        if following.outputs and not isinstance(following.module, (*CONVOLUTIONS, nn.Linear, nn.LayerNorm)):
            pending += following.outputs
        else:
            yield following


def _find_scaled_writer(names: dict[Any, str], scale: Any) -> str:
    """Name of the layer whose outputs a parameter multiplies; "" if there is none."""
    products = [node for node in scale.outputs if "Mul" in str(getattr(node, "name", ""))]
    pending: list[Any] = [node for product in products for node in product.inputs if node is not scale]
    while pending:
        node = pending.pop()
        if isinstance(node.module, PRODUCERS):
            return names[node.module]
        if isinstance(node.module, nn.Parameter) or not node.inputs:
            continue
        pending += node.inputs
    return ""
