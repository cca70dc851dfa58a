"""torch-pruning's dependency graph, read once: which rows of which layers hang together.

Geometry is written down here: every `Member` says which rows of which axis each unit owns. Scorers, meters and repairs
read it from there and never ask again how a layer is shaped.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from pxcompress.errors import ModelError
from pxcompress.models.adapter import everything
from pxcompress.state import can_have_gradient, device_of, sharing, time_limit
from pxcompress.types import Axis, Fixed, Group, Kind, Member

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRODUCERS = (*CONVOLUTIONS, nn.Linear)
SPANNING_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)

TRACING_SECONDS = 90.0
"""After this the model is refused."""

MOST_VISITS = 64
"""How often units may come along the same edge of the graph: with partial residuals torch-pruning never stops. Nor does
it where it takes a reshape for a flatten: there are more rows then than any layer has."""


def is_depthwise(module: nn.Module) -> bool:
    """Whether every input channel of a convolution has output channels of its own, as many as all others have."""
    return isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels > 1


def traced_groups(
    model: nn.Module, example: Tensor, keep: Collection[str], known: Collection[str]
) -> list[Group | Fixed]:
    """Groups as torch-pruning sees them, and what is known to stay; none that layers named in `known` make.

    The outputs of the modules in `keep` stay whole. Raises `ModelError` where the model cannot be traced.
    """
    with _guarded("model cannot be traced"):
        twin = sharing(model)
        twin.eval()  # a module's own train() may return nothing
        for parameter in twin.parameters():
            parameter.requires_grad_(can_have_gradient(parameter))
        single = [layer for layer in twin.modules() if isinstance(layer, CONVOLUTIONS) and _is_single(layer)]
        graph = _Graph().build_dependency(
            twin, example.to(device_of(twin)), forward_fn=_traced, verbose=False, ignored_layers=single
        )
    names: dict[Any, str] = {module: name for name, module in twin.named_modules()}
    names.update({parameter: name for name, parameter in twin.named_parameters()})
    with _guarded("model's groups cannot be found"), _settled(twin):
        return list(_candidates(graph, names, set(keep), known))


def _traced(model: nn.Module, example: Tensor) -> list[Tensor]:
    """What comes out of a model and depends on its parameters."""
    return [value for value in everything(model, example) if value.requires_grad]


def _candidates(graph: Any, names: dict[Any, str], keep: set[str], known: Collection[str]) -> Iterator[Group | Fixed]:
    """One group, or the reason why there is none, for every convolution and linear layer that is not in one already."""
    seen: set[Any] = set()
    for module in [module for module in graph.module2node if isinstance(module, PRODUCERS)]:
        if module in seen or names[module] in known:
            continue
        pruner = graph.get_pruner_of_module(module)
        units = pruner.get_out_channels(module)
        try:
            raw = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(units)))
            raw = _from_first(graph, names, raw)
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever torch-pruning stumbles over: the others go on)
            yield Fixed(names[module], units, f"its units cannot be followed: {_first_line(error)}")
            continue
        producers = _producers(graph, raw)
        seen |= producers
        if not any(names.get(producer) in known for producer in producers):
            found = _producer_group(graph, names, raw, keep)
            yield found
            if isinstance(found, Fixed):
                yield from _beside(found, producers, names)


def _beside(found: Fixed, producers: Collection[Any], names: dict[Any, str]) -> Iterator[Fixed]:
    """The other layers that write what `found` writes: they stay with it."""
    for module, name in names.items():
        if isinstance(module, PRODUCERS) and module in producers and name != found.name:
            yield Fixed(name, len(module.weight), f"its outputs meet those of {found.name}, which stay")


@contextmanager
def _guarded(what: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one `ModelError`, also when it takes too long."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            with time_limit(TRACING_SECONDS):
                yield
        except Exception as error:  # a user's forward and torch-pruning may raise anything
            raise ModelError(f"{what}: {type(error).__name__}: {_first_line(error)}") from error


class _Graph(tp.DependencyGraph):
    """Lets indices map through reshapes and splits as the sizes say, which torch-pruning does not find by their names.

    Without them it takes every reshape for a flatten, and a split of the last axis, the channels of tokens, for none.
    """

    def _build_dependency(self, module2node: Any) -> None:
        super()._build_dependency(module2node)
        mended = {tp.ops.OPTYPE.RESHAPE: _reshape_sizes, tp.ops.OPTYPE.SPLIT: _split_sizes}
        for node in module2node.values():
            if node.type in mended and hasattr(node.grad_fn, "_saved_self_sym_sizes"):
                node.grad_fn = mended[node.type](node.grad_fn)
                node.enable_index_mapping = True  # off where a position embedding comes before

    def build_dependency(self, *args: Any, **kwargs: Any) -> _Graph:
        with _unknown_parts():
            super().build_dependency(*args, **kwargs)
        for node in self.module2node.values():
            if node.type == tp.ops.OPTYPE.SPLIT and node.module.offsets and hasattr(node.grad_fn, "split"):
                _map_parts(node)
        return self


@contextmanager
def _unknown_parts() -> Iterator[None]:
    """A concatenation of tokens that no layer made (a class token) is no error: it maps nothing."""
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


class _Linked(tp.dependency.Group):
    """A group that remembers which root rows meet in one row of a layer (a gate, a sum): they only go together."""

    def __init__(self, widest: int) -> None:
        super().__init__()
        self.widest = widest
        self.links: set[tuple[int, int]] = set()
        self.visits: Counter[int] = Counter()

    def add_dep(self, dep: Any, idxs: Any) -> None:
        self.visits[id(dep)] += 1
        if self.visits[id(dep)] > MOST_VISITS or len(idxs) > self.widest:
            raise RecursionError("torch-pruning does not come to an end")
        super().add_dep(dep, idxs)

    def add_and_merge(self, dep: Any, idxs: Any) -> None:
        for item in self.items:
            if item.dep.target == dep.target and item.dep.handler == dep.handler:
                roots = {index.idx: index.root_idx for index in item.idxs}
                met = {(roots[index.idx], index.root_idx) for index in idxs if index.idx in roots}
                self.links |= {pair for pair in met if pair[0] != pair[1] and None not in pair}
        super().add_and_merge(dep, idxs)


@contextmanager
def _settled(model: nn.Module) -> Iterator[None]:
    """torch-pruning's groups as `_Linked`, without working out for each again how indices map: nothing changes here."""
    layers = [layer for layer in model.modules() if isinstance(layer, PRODUCERS)]
    widths = [max(len(layer.weight), layer.weight.shape[1] * getattr(layer, "groups", 1)) for layer in layers]
    mapping, graph = tp.dependency.index_mapping, tp.dependency.graph
    update, group = mapping.update_index_mapping, graph.Group
    mapping.update_index_mapping, graph.Group = (lambda graph: None), partial(_Linked, max(widths, default=0))
    try:
        yield
    finally:
        mapping.update_index_mapping, graph.Group = update, group


def _is_single(layer: nn.Module) -> bool:
    """Whether a convolution has no channel to lose; torch-pruning takes what it runs along for channels (ECA)."""
    return bool(layer.in_channels == layer.out_channels == 1)


def _reshape_sizes(grad_fn: Any) -> SimpleNamespace:
    """Axes in front of a reshape, as four: a flatten is told from other reshapes by their product."""
    sizes = (*grad_fn._saved_self_sym_sizes, 1, 1, 1)
    return SimpleNamespace(_saved_self_sizes=(*sizes[:3], prod(sizes[3:])))


def _split_sizes(grad_fn: Any) -> SimpleNamespace:
    """A split's axis, 1 for the last of several, and the sizes of its parts."""
    sizes, axis = grad_fn._saved_self_sym_sizes, grad_fn._saved_dim
    axis = len(sizes) - 1 if axis >= len(sizes) else axis  # -1 reads as 2^64 - 1
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
    """Map every reader of a split to the part it reads; torch-pruning counts readers, where a part may have several."""
    sizes = torch.tensor([0, *node.grad_fn._saved_split_sizes]).cumsum(0).tolist()
    for reader in set(node.outputs):
        edges = getattr(reader.grad_fn, "next_functions", ())
        parts = [sizes[part : part + 2] for function, part in edges if function is node.grad_fn.split]
        for source, target, reverse in ((node, reader, False), (reader, node, True)):
            between = [dependency for dependency in source.dependencies if dependency.target is target]
            for dependency, part in zip(between, parts, strict=False):
                mapping = tp.dependency.index_mapping._SplitIndexMapping(offset=part, reverse=reverse)
                dependency.index_mapping[0] = mapping


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _producers(dependencies: Any, raw: Any) -> set[Any]:
    """Modules whose outputs, or what they carry, belong to the group."""
    return {item.dep.target.module for item in raw if _axis(dependencies, item) == "out"}


def _from_first(dependencies: Any, names: dict[Any, str], raw: Any) -> Any:
    """`raw` from its first producer on, with all outputs of that one: more than in `raw` where they are split."""
    producers = [module for module in _producers(dependencies, raw) if module in names]
    full = [module for module in producers if isinstance(module, PRODUCERS) and not is_depthwise(module)]
    order = {module: place for place, module in enumerate(names)}
    first = min(full, key=order.__getitem__)
    if first is raw[0].dep.target.module:
        return raw
    pruner = dependencies.get_pruner_of_module(first)
    rows = list(range(pruner.get_out_channels(first)))
    rooted = dependencies.get_pruning_group(first, pruner.prune_out_channels, rows)
    return rooted if set(producers) <= _producers(dependencies, rooted) else raw


def _producer_group(dependencies: Any, names: dict[Any, str], raw: Any, kept: set[str]) -> Group | Fixed:
    """The group of a convolution's or linear layer's outputs, or why they stay."""
    first, units = raw[0].dep.target.module, len(raw[0].idxs)
    name = names[first]
    reason = _why_fixed(names, raw, kept, dependencies)
    if reason:
        return Fixed(name, units, reason)
    kind: Kind = "neuron" if isinstance(first, nn.Linear) else "channel"
    return _build(dependencies, names, raw, (name, kind), _coupled(dependencies, raw, units))


def _build(
    dependencies: Any, names: dict[Any, str], raw: Any, label: tuple[str, Kind], unit_of_root: Tensor
) -> Group | Fixed:
    """A `Group` from torch-pruning's items; `unit_of_root` (root rows,) says which unit each root row belongs to."""
    name, kind = label
    units = int(unit_of_root.max()) + 1
    members = []
    for item in raw:
        module = item.dep.target.module
        if module not in names:
            continue
        unit = unit_of_root[torch.tensor(item.root_idxs)]
        counts = torch.bincount(unit, minlength=units)
        if len(set(counts.tolist())) != 1:
            return Fixed(name, units, f"its units own unequal shares of {names[module]}")
        order = torch.argsort(unit, stable=True)
        index = torch.tensor(item.idxs)[order].reshape(units, -1)
        members.append(Member(names[module], _axis(dependencies, item), index))
    return Group(name, kind, units, tuple(members))


def _why_fixed(names: dict[Any, str], raw: Any, kept: set[str], dependencies: Any) -> str:
    """Why the outputs of this group must stay; empty when they need not."""
    consumers = 0
    for item in raw:
        module = item.dep.target.module
        name = names.get(module, "")
        if name in kept and _axis(dependencies, item) == "out":
            return "the classifier's outputs are the classes"
        if isinstance(module, SPANNING_NORMS):
            return f"{type(module).__name__} {name} takes its statistics over these channels"
        if isinstance(module, nn.Parameter):
            return f"parameter {name} is added or multiplied outside any layer"
        if any(row is None for row in item.root_idxs):
            return f"torch-pruning cannot follow its units into {name or type(module).__name__}"
        consumers += bool(name) and _axis(dependencies, item) == "in"
    return "" if consumers else "its outputs reach the model's output"


def _axis(dependencies: Any, item: Any) -> Axis:
    """ "in" for rows a convolution or linear layer consumes, else "out"."""
    module = item.dep.target.module
    consumes = isinstance(module, PRODUCERS) and not is_depthwise(module)
    return "in" if consumes and dependencies.is_in_channel_pruning_fn(item.dep.handler) else "out"


def _coupled(dependencies: Any, raw: Any, rows: int) -> Tensor:
    """Unit of every root row (rows,): rows that meet in one row, or hold the same place in equal parts, go together.

    A grouped convolution stays regular only when every one of its groups loses the same places, and a split into
    equal parts (`chunk`) cuts at the same places only when every part loses as many.
    """
    label = torch.arange(rows)
    places = [found for item in raw if (found := _places(dependencies, item)) is not None]
    if raw.links:
        first, second = torch.tensor(sorted(raw.links)).T
        places.append((torch.cat([first, second]), torch.arange(len(first)).repeat(2)))
    changed = True
    while changed:
        before = label.clone()
        for root, place in places:
            lowest = torch.full((int(place.max()) + 1,), rows).scatter_reduce(0, place, label[root], "amin")
            label[root] = lowest[place]
        changed = not torch.equal(before, label)
    return torch.unique(label, return_inverse=True)[1]


def _places(dependencies: Any, item: Any) -> tuple[Tensor, Tensor] | None:
    """Root rows and their place in the parts of a grouped convolution or of an equal split; None elsewhere."""
    module = item.dep.target.module
    if item.dep.target.type == tp.ops.OPTYPE.SPLIT and len(set(module.split_sizes or ())) == 1:
        width = module.split_sizes[0]
    elif isinstance(module, CONVOLUTIONS) and module.groups > 1 and not is_depthwise(module):
        rows = module.in_channels if _axis(dependencies, item) == "in" else module.out_channels
        width = rows // module.groups
    else:
        return None
    return torch.tensor(item.root_idxs), torch.tensor(item.idxs) % width
