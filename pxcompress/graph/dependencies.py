"""torch-pruning's dependency graph with corrections: right index mappings for reshapes and splits, and groups that end.

The rest of the package reads it through `tracing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRODUCERS = (*CONVOLUTIONS, nn.Linear)

MOST_VISITS = 64
"""Most visits to one edge of the dependency graph before tracing is given up.

With partial residuals torch-pruning would never stop. Nor would it where it takes a reshape for a flatten; there it is
given up because more rows come along than any layer has.
"""


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution is depthwise: each input channel has output channels of its own, the same number for
    all.
    """
    return isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels > 1


class Graph(tp.DependencyGraph):
    """torch-pruning's dependency graph, with indices mapped through reshapes and splits by the sizes that autograd
    saved.

    torch-pruning itself takes every reshape for a flatten, and misses a split of the last axis, the channels of tokens.
    """

    def _build_dependency(self, module2node: Any) -> None:
        super()._build_dependency(module2node)
        size_readers = {tp.ops.OPTYPE.RESHAPE: _reshape_sizes, tp.ops.OPTYPE.SPLIT: _split_sizes}
        for node in module2node.values():
            if node.type == tp.ops.OPTYPE.CONCAT:
                node.module.concat_sizes = _read_concat_sizes(node)
            if node.type in size_readers and hasattr(node.grad_fn, "_saved_self_sym_sizes"):
                node.grad_fn = size_readers[node.type](node.grad_fn)
                node.enable_index_mapping = True  # off where a position embedding comes before

    def build_dependency(self, model: nn.Module, *args: Any, **kwargs: Any) -> Graph:
        with _allow_unknown_parts():
            super().build_dependency(model, *args, **kwargs)
        self.partners = _find_partners(model)
        for node in self.module2node.values():
            if node.type == tp.ops.OPTYPE.SPLIT and node.module.offsets and hasattr(node.grad_fn, "split"):
                _map_parts(node)
            if node.type == tp.ops.OPTYPE.RESHAPE:
                _map_paths(node)
            if is_depthwise(node.module) and node.module.out_channels > node.module.in_channels:
                self._link_ends(node)
        return self

    def get_pruner_of_module(self, module: Any) -> Any:
        """The function of Torch-Pruning that prunes a module.

        Torch-Pruning takes every convolution with one output per group for a depthwise one; here it must also have
        one input per group.
        """
        return _make_convolution_pruner(module) or super().get_pruner_of_module(module)

    def _link_ends(self, node: Any) -> None:
        """Link every input channel of a depthwise convolution to its outputs, for convolutions with several outputs an
        input.
        """
        pruner, width = self.get_pruner_of_module(node.module), node.module.out_channels // node.module.in_channels
        ends = pruner.prune_in_channels, pruner.prune_out_channels
        for trigger, handler in (ends, ends[::-1]):
            inner = tp.dependency.Dependency(trigger, handler, source=node, target=node)
            inner.index_mapping[0] = partial(_widen_rows if trigger is ends[0] else _narrow_rows, width)
            node.dependencies.append(inner)


def _find_partners(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Maps each module that shares a parameter to the other module that has it too."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in set(module.parameters(recurse=False)):
            owners.setdefault(parameter, []).append(module)
    return {module: other for few in owners.values() for module in few for other in few if other is not module}


@contextmanager
def _allow_unknown_parts() -> Iterator[None]:
    """A context in which a concatenation with tokens that no layer made, such as a class token, is no error."""
    mapping = tp.dependency.index_mapping
    update = mapping.update_concat_index_mapping

    def update_known(graph: Any, node: Any) -> None:
        with suppress(TypeError):  # it adds up the sizes of the parts, None for one that it does not know
            update(graph, node)

    mapping.update_concat_index_mapping = update_known
    try:
        yield
    finally:
        mapping.update_concat_index_mapping = update


def _widen_rows(width: int, rows: Any) -> Any:
    """Output rows of a depthwise convolution for input `rows`; each input has `width` outputs."""
    return [row._replace(idx=row.idx * width + place) for row in rows for place in range(width)]


def _narrow_rows(width: int, rows: Any) -> Any:
    """Input rows of a depthwise convolution for output `rows`, each input once."""
    return list(dict.fromkeys(row._replace(idx=row.idx // width) for row in rows))


class _LinkedGroup(tp.dependency.Group):
    """A group of torch-pruning that records which root rows meet in one row of a layer, and so are removed together.

    That happens at a gate or a sum. A layer from which outputs would be removed that it does not have is left out: a
    gate of one channel, which is broadcast.
    """

    def __init__(self, widest: int) -> None:
        super().__init__()
        self.widest = widest
        self.links: set[tuple[int, int]] = set()
        self.visits: Counter[int] = Counter()
        self.operations: set[tuple[Any, ...]] = set()
        self.broadcast: set[Any] = set()

    def add_dep(self, dep: Any, idxs: Any) -> None:
        self.visits[id(dep)] += 1
        if self.visits[id(dep)] > MOST_VISITS or len(idxs) > self.widest:
            raise RecursionError("torch-pruning does not come to an end")
        self.operations.add(_make_key(dep, idxs))
        super().add_dep(dep, idxs)

    def has_pruning_op(self, dep: Any, idxs: Any) -> bool:
        """Whether the group contains this operation already; faster than torch-pruning, which compares with all."""
        return _make_key(dep, idxs) in self.operations

    def add_and_merge(self, dep: Any, idxs: Any) -> None:
        if _exceeds_outputs(dep, idxs):
            self.broadcast.add(dep.target.module)
            return
        for item in self.items:
            if item.dep.target == dep.target and item.dep.handler == dep.handler:
                roots = {index.idx: index.root_idx for index in item.idxs}
                meeting_rows = {(roots[index.idx], index.root_idx) for index in idxs if index.idx in roots}
                self.links |= {pair for pair in meeting_rows if pair[0] != pair[1] and None not in pair}
        super().add_and_merge(dep, idxs)


def _make_key(dep: Any, idxs: Any) -> tuple[Any, ...]:
    """A key that is equal for equal operations of a group: the node, what is done to it, and the rows."""
    return dep.target, dep.handler, tuple(idxs)


def _make_convolution_pruner(module: Any) -> Any:
    """torch-pruning's pruner for ordinary convolutions; None for depthwise ones and other modules."""
    is_ordinary = isinstance(module, CONVOLUTIONS) and not is_depthwise(module)
    return tp.pruner.function.PrunerBox[tp.ops.OPTYPE.CONV] if is_ordinary else None


def _exceeds_outputs(dep: Any, rows: Any) -> bool:
    """Whether `rows` to remove from a layer's outputs go beyond the outputs that it has."""
    module = dep.target.module
    if not isinstance(module, (*PRODUCERS, _BatchNorm)):
        return False
    pruner = _make_convolution_pruner(module) or tp.pruner.function.PrunerBox[tp.ops.module2type(module)]
    reads = isinstance(module, PRODUCERS) and dep.handler == pruner.prune_in_channels and not is_depthwise(module)
    return not reads and max(row.idx for row in rows) >= pruner.get_out_channels(module)


@contextmanager
def use_linked_groups(model: nn.Module) -> Iterator[None]:
    """A context in which Torch-Pruning makes groups of the class `_LinkedGroup`, which has the corrections made here.

    It also keeps the index mappings that `Graph` has corrected, instead of computing them again for every group.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, PRODUCERS)]
    widths = [max(len(layer.weight), layer.weight.shape[1] * getattr(layer, "groups", 1)) for layer in layers]
    mapping, graph = tp.dependency.index_mapping, tp.dependency.graph
    update, group = mapping.update_index_mapping, graph.Group
    mapping.update_index_mapping, graph.Group = (lambda graph: None), partial(_LinkedGroup, max(widths, default=0))
    try:
        yield
    finally:
        mapping.update_index_mapping, graph.Group = update, group


def _reshape_sizes(grad_fn: Any) -> SimpleNamespace:
    """Sizes in front of a reshape as exactly four numbers, the form in which torch-pruning tells a flatten from
    others.
    """
    sizes = (*grad_fn._saved_self_sym_sizes, 1, 1, 1)
    return SimpleNamespace(_saved_self_sizes=(*sizes[:3], prod(sizes[3:])))


def _read_concat_sizes(node: Any) -> list[int] | None:
    """Channels of each part of a concatenation, on axis 1 of feature maps or on the last axis.

    None where it joins something else, or where a part has no node of its own. torch-pruning guesses them from the
    layers above, and takes the one channel of a gate for that of what it gates, and a part of a split for the whole.
    """
    edges, dims = node.grad_fn.next_functions, len(node.grad_fn._input_metadata[0].shape)
    axis = _read_saved_axis(node.grad_fn, dims)
    if len(edges) != len(node.inputs) or (axis != dims - 1 and (dims == 3 or axis != 1)):
        return None
    if any(function is None for function, _ in edges):
        return None
    return [function._input_metadata[place].shape[axis] for function, place in edges]


def _read_saved_axis(grad_fn: Any, dims: int) -> int:
    """The axis that an operation saved, as a number from 0 on, since autograd stores -1 as 2^64 - 1."""
    axis: int = grad_fn._saved_dim
    return axis if axis < dims else axis - 2**64 + dims


def _split_sizes(grad_fn: Any) -> SimpleNamespace:
    """A split's axis (1 for the last of several axes) and the sizes of its parts."""
    sizes = grad_fn._saved_self_sym_sizes
    axis = _read_saved_axis(grad_fn, len(sizes))
    if hasattr(grad_fn, "_saved_split_sizes"):
        parts = grad_fn._saved_split_sizes
    else:
        part = grad_fn._saved_split_size
        parts = [min(part, sizes[axis] - start) for start in range(0, sizes[axis], part)]
    return SimpleNamespace(
        _saved_self_sym_sizes=sizes,
        _saved_dim=1 if axis == len(sizes) - 1 else axis,
        _saved_split_sizes=parts,
        split=grad_fn,
    )


def _map_parts(node: Any) -> None:
    """Map each layer behind a split to the part that it reads.

    Torch-pruning counts readers, but a part may have several.
    """
    sizes = torch.tensor([0, *node.grad_fn._saved_split_sizes]).cumsum(0).tolist()
    for reader in set(node.outputs):
        edges = getattr(reader.grad_fn, "next_functions", ())
        parts = [sizes[part : part + 2] for function, part in edges if function is node.grad_fn.split]
        for source, target, reverse in ((node, reader, False), (reader, node, True)):
            dependencies_between = [dependency for dependency in source.dependencies if dependency.target is target]
            for dependency, part in zip(dependencies_between, parts, strict=False):
                mapping = tp.dependency.index_mapping._SplitIndexMapping(offset=part, reverse=reverse)
                dependency.index_mapping[0] = mapping


def _map_paths(node: Any) -> None:
    """Map channels to paths, where a reshape makes two axes of them and a softmax over the first weighs the paths.

    A channel occurs in every path then, as in selective kernels, and all its rows are removed together.
    """
    picks = [reader.grad_fn for reader in node.outputs if "Softmax" in getattr(reader.grad_fn, "name", str)()]
    shapes = {(*pick._saved_result.shape[:3], _read_saved_axis(pick, pick._saved_result.dim())) for pick in picks}
    if len(picks) != len(node.outputs) or len(shapes) != 1 or (shape := shapes.pop())[-1] != 1 or len(shape) < 4:
        return
    _, paths, channels, _ = shape
    for source in node.inputs:
        for dependency in source.dependencies:
            if dependency.target is node:
                dependency.index_mapping[0] = partial(_merge_paths, channels)
        for dependency in node.dependencies:
            if dependency.target is source:
                dependency.index_mapping[0] = partial(_spread_over_paths, paths, channels)


def _merge_paths(channels: int, rows: Any) -> Any:
    """The channel rows for rows (paths x channels,), each channel once."""
    return list({row.idx % channels: row._replace(idx=row.idx % channels) for row in rows}.values())


def _spread_over_paths(paths: int, channels: int, rows: Any) -> Any:
    """Rows of the given channels in all paths."""
    return [row._replace(idx=row.idx + path * channels) for row in rows for path in range(paths)]
