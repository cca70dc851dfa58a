"""Reads torch-pruning's dependency graph: which rows of which layers must be removed together.

Geometry is written down here: every `Member` says which rows of which axis each unit owns. Scorers, meters and repairs
read it from there and never ask again how a layer is shaped.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from pxcompress.errors import ModelError, describe
from pxcompress.graph.dependencies import CONVOLUTIONS, PRODUCERS, Graph, is_depthwise, use_linked_groups
from pxcompress.graph.rotation import DirectionNorm, make_direction_group
from pxcompress.graph.streams import Stream, read_stream
from pxcompress.models.adapter import all_outputs
from pxcompress.state import can_have_gradient, copy_sharing, device_of, time_limit, without_checkpointing
from pxcompress.types import Axis, FixedLayer, Group, Kind, Member

FIXED_LAYERS = (nn.modules.conv._ConvTransposeNd, nn.RNNBase, nn.MultiheadAttention, nn.Bilinear)
"""Layers of which no channel is removed, and whose inputs therefore stay."""

SPANNING_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)

TRACING_ERRORS = (RuntimeError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, AssertionError)
"""Exceptions of torch-pruning where it cannot follow the outputs of a layer."""

TRACING_SECONDS = 90.0
"""Seconds after which tracing a model is given up."""


def trace_groups(
    model: nn.Module, example: Tensor, keep: Collection[str], head_layers: Collection[str]
) -> list[Group | FixedLayer]:
    """Groups of rows to remove together, and layers that must stay; none for the layers in `head_layers`.

    The outputs of the modules in `keep` stay whole. Raises `ModelError` where the model cannot be traced.
    """
    graph, names = _trace_dependencies(model, example)
    with _raise_model_errors("model's groups cannot be found"), use_linked_groups(graph.model):
        return list(_list_candidates(graph, names, set(keep), head_layers))


def trace_streams(model: nn.Module, example: Tensor) -> list[Stream]:
    """The residual streams of a model whose norms could be rotated too. Raises as `trace_groups` does."""
    graph, names = _trace_dependencies(model, example)
    streams: list[Stream] = []
    with _raise_model_errors("model's streams cannot be found"), use_linked_groups(graph.model):
        for module in [module for module in graph.module2node if isinstance(module, PRODUCERS)]:
            if is_depthwise(module) or any(names[module] in stream.writers for stream in streams):
                continue
            with suppress(*TRACING_ERRORS):
                stream = read_stream(_get_whole_group(graph, module), names)
                if isinstance(stream, Stream):
                    streams.append(stream)
    return streams


def _trace_dependencies(model: nn.Module, example: Tensor) -> tuple[Any, dict[Any, str]]:
    """torch-pruning's graph of a copy of `model`, and a map from the copy's modules and parameters to names."""
    with _raise_model_errors("model cannot be traced"):
        twin = copy_sharing(model)
        twin.eval()  # a module's own train() may return nothing
        for parameter in twin.parameters():
            parameter.requires_grad_(can_have_gradient(parameter))
        single = [layer for layer in twin.modules() if isinstance(layer, CONVOLUTIONS) and _is_single(layer)]
        graph = Graph().build_dependency(
            twin, example.to(device_of(twin)), forward_fn=_trace_outputs, verbose=False, ignored_layers=single
        )
    names: dict[Any, str] = {module: name for name, module in twin.named_modules()}
    names.update({parameter: name for name, parameter in twin.named_parameters()})
    return graph, names


def _trace_outputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    """The outputs of a model that depend on its parameters."""
    return [value for value in all_outputs(model, example) if value.requires_grad]


def _list_candidates(
    graph: Any, names: dict[Any, str], keep: set[str], head_layers: Collection[str]
) -> Iterator[Group | FixedLayer]:
    """For every convolution and linear layer: the groups of its outputs, or the reason why they stay."""
    covered_layers: set[Any] = set()
    for module in [module for module in graph.module2node if isinstance(module, PRODUCERS)]:
        if module in covered_layers or names[module] in head_layers:
            continue
        units = len(module.weight)
        if isinstance(module, CONVOLUTIONS) and module.groups == units > 1 and not is_depthwise(module):
            yield FixedLayer(names[module], units, "each of its groups has one output")
            continue
        try:
            raw = _get_whole_group(graph, module)
            wide = _spread_over(graph, raw)
            raw = _start_from_first(graph, names, raw)
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever torch-pruning stumbles over: the others go on)
            yield FixedLayer(names[module], units, f"its units cannot be followed: {describe(error)}")
            continue
        if wide is not None:
            yield FixedLayer(names[module], units, f"its one output is broadcast over those of {names[wide]}")
            continue
        producers = _list_producers(graph, raw)
        covered_layers |= producers
        if not any(names.get(producer) in head_layers for producer in producers):
            for group in _list_producer_groups(graph, names, raw, keep):
                yield group
                if isinstance(group, FixedLayer):
                    yield from _find_neighbours(group, producers, names)


def _find_neighbours(fixed: FixedLayer, producers: Collection[Any], names: dict[Any, str]) -> Iterator[FixedLayer]:
    """The other layers whose outputs are tied to those of the layer `fixed`, and so stay too."""
    for module, name in names.items():
        if isinstance(module, PRODUCERS) and module in producers and name != fixed.name:
            yield FixedLayer(name, len(module.weight), f"its outputs meet those of {fixed.name}, which stay")


@contextmanager
def _raise_model_errors(task: str) -> Iterator[None]:
    """A context that turns any failure of torch-pruning, or taking too long, into one `ModelError` about `task`."""
    with warnings.catch_warnings(), torch.enable_grad(), without_checkpointing():
        warnings.simplefilter("ignore")
        try:
            with time_limit(TRACING_SECONDS):
                yield
        except Exception as error:  # a user's forward and torch-pruning may raise anything
            raise ModelError(f"{task}: {describe(error)}") from error


def _is_single(layer: nn.Module) -> bool:
    """Whether a convolution has a single channel, as in ECA, where torch-pruning would prune the axis it runs along."""
    return bool(layer.in_channels == layer.out_channels == 1)


def _list_producers(dependencies: Any, raw: Any) -> set[Any]:
    """Modules whose outputs, or parameters, belong to torch-pruning's group `raw`."""
    return {item.dep.target.module for item in raw if _get_axis(dependencies, item) == "out"}


def _spread_over(dependencies: Any, raw: Any) -> Any:
    """For a layer with one output: the layer with many outputs over which that is broadcast; None if there is none."""
    root = raw[0].dep.target.module
    others = [module for module in _list_producers(dependencies, raw) if isinstance(module, PRODUCERS)]
    for module in others if len(raw[0].idxs) == 1 else ():
        if len(module.weight) > 1 and root in _get_whole_group(dependencies, module).broadcast:
            return module
    return None


def _get_whole_group(dependencies: Any, module: Any) -> Any:
    """torch-pruning's group of all outputs of a layer."""
    pruner = dependencies.get_pruner_of_module(module)
    if is_depthwise(module):  # by its inputs, of which each may have several outputs
        return dependencies.get_pruning_group(module, pruner.prune_in_channels, list(range(module.in_channels)))
    return dependencies.get_pruning_group(module, pruner.prune_out_channels, list(range(len(module.weight))))


def _start_from_first(dependencies: Any, names: dict[Any, str], raw: Any) -> Any:
    """The group of all outputs of the first layer in `raw`, which may be more than `raw` if they are split."""
    producers = [module for module in _list_producers(dependencies, raw) if module in names]
    whole_producers = [module for module in producers if isinstance(module, PRODUCERS) and not is_depthwise(module)]
    order = {module: place for place, module in enumerate(names)}
    first_producer = min(whole_producers, key=order.__getitem__, default=raw[0].dep.target.module)
    if first_producer is raw[0].dep.target.module:
        return raw
    whole_raw = _get_whole_group(dependencies, first_producer)
    return whole_raw if set(producers) <= _list_producers(dependencies, whole_raw) else raw


def _list_producer_groups(
    dependencies: Any, names: dict[Any, str], raw: Any, keep: set[str]
) -> Sequence[Group] | Sequence[FixedLayer]:
    """The groups for the outputs of a convolution or linear layer, or the reason why they stay."""
    first_producer, units = raw[0].dep.target.module, len(raw[0].idxs)
    name = names[first_producer]
    if any(isinstance(item.dep.target.module, DirectionNorm) for item in raw):
        stream = read_stream(raw, names)
        return [make_direction_group(name, stream)] if isinstance(stream, Stream) else [FixedLayer(name, units, stream)]
    reason = _explain_fixed(names, raw, keep, dependencies)
    if is_depthwise(first_producer):
        reason, units = (
            reason or "it is depthwise, and reads channels that no other layer makes",
            len(first_producer.weight),
        )
    if reason:
        return [FixedLayer(name, units, reason)]
    kind: Kind = "neuron" if isinstance(first_producer, nn.Linear) else "channel"
    return _build(dependencies, names, raw, (name, kind), _find_units_of_rows(dependencies, raw, units))


def _build(
    dependencies: Any, names: dict[Any, str], raw: Any, label: tuple[str, Kind], unit_of_root: Tensor
) -> Sequence[Group] | Sequence[FixedLayer]:
    """Groups made from torch-pruning's items; `unit_of_root` (root rows,) maps each root row to its unit.

    There are several where the units own different layers, as with a convolution over a part of the channels. The one
    of the fewest layers has the first layer's name, and each other one that of a layer which the former do not have.
    """
    name, kind = label
    units = int(unit_of_root.max()) + 1
    parts = list(_list_members(dependencies, names, raw, unit_of_root))
    rows_by_unit = torch.stack([torch.bincount(unit, minlength=units) for _, unit in parts])
    groups: dict[str, Group] = {}
    for shares in sorted(rows_by_unit.unique(dim=1).T, key=torch.count_nonzero):
        units_agree = (rows_by_unit == shares[:, None]).all(0)
        members = [
            replace(member, index=member.index[units_agree[unit]].reshape(-1, share))
            for (member, unit), share in zip(parts, shares.tolist(), strict=True)
            if share
        ]
        others = {member.module for group in groups.values() for member in group.members}
        free_parameters = [member.module for member in members if member.module not in others and member.dim is None]
        if not free_parameters:
            return [FixedLayer(name, units, f"its units own unequal shares of {members[0].module}")]
        groups[free_parameters[0]] = Group(free_parameters[0], kind, int(units_agree.sum()), tuple(members))
    return list(groups.values())


def _list_members(
    dependencies: Any, names: dict[Any, str], raw: Any, unit_of_root: Tensor
) -> Iterator[tuple[Member, Tensor]]:
    """torch-pruning's items as members with an index (rows,), and the unit of each of these rows, ascending."""
    for item in raw:
        if _is_input_of_depthwise(dependencies, item):
            continue
        unit = unit_of_root[torch.tensor(item.root_idxs)]
        order = torch.argsort(unit, stable=True)
        rows = torch.tensor(item.idxs)[order]
        module = item.dep.target.module
        if module in names:
            dim = _find_axis_of_vector(module) if isinstance(module, nn.Parameter) else None
            yield Member(names[module], _get_axis(dependencies, item), rows, dim), unit[order]
        elif sizes := _find_held_sizes(names, item.dep.target):
            yield Member(sizes, "out", rows, 0), unit[order]


def _find_axis_of_vector(parameter: Tensor) -> int | None:
    """The only dimension of a parameter with more than one row; None if there are several, or none."""
    dims = [dim for dim, size in enumerate(parameter.shape) if size > 1]
    return dims[0] if len(dims) == 1 else None


def _find_held_sizes(names: dict[Any, str], node: Any) -> str:
    """Name of the attribute with the sizes of a split into unequal parts; "" for other operations, or if none has them.

    It belongs to the nearest of the modules around the layer whose outputs are split.
    """
    sizes = list(node.module.split_sizes or ()) if node.type == tp.ops.OPTYPE.SPLIT else []
    if len(set(sizes)) < 2:
        return ""
    while node.module not in names and node.inputs:
        node = node.inputs[0]
    inside_out = [module for module in reversed(names) if _is_around(names[module], names.get(node.module, ""))]
    for module in inside_out:
        for attribute, value in vars(module).items():
            if isinstance(value, tuple | list) and list(value) == sizes:
                return f"{names[module]}.{attribute}".lstrip(".")
    return ""


def _is_around(name: str, layer: str) -> bool:
    """Whether the module `name` contains the module `layer`."""
    return not name or layer.startswith(f"{name}.")


def _is_input_of_depthwise(dependencies: Any, item: Any) -> bool:
    """Whether an item is about the inputs of a depthwise convolution with several outputs for each, which count
    instead.
    """
    module = item.dep.target.module
    several = is_depthwise(module) and module.out_channels > module.in_channels
    return several and bool(item.dep.handler == dependencies.get_pruner_of_module(module).prune_in_channels)


def _explain_fixed(names: dict[Any, str], raw: Any, keep: set[str], dependencies: Any) -> str:
    """The reason why the outputs of this group must stay; "" if they can be removed."""
    consumers, reaches_output = 0, False
    for item in raw:
        module = item.dep.target.module
        name, reads = names.get(module, ""), _get_axis(dependencies, item) == "in"
        if name in keep and not reads:
            return "the classifier's outputs are the classes"
        if isinstance(module, SPANNING_NORMS):
            stays = read_stream(raw, names)
            reason = f"{type(module).__name__} {name} takes its statistics over these channels"
            return stays if isinstance(stays, str) and stays else reason
        if isinstance(module, FIXED_LAYERS):
            return f"{type(module).__name__} {name} reads or writes them, and of those no channel is removed"
        if isinstance(module, nn.Parameter) and _find_axis_of_vector(module) is None:
            return f"parameter {name} is added or multiplied outside any layer"
        if module in dependencies.partners:
            return f"{name} has a weight that {names[dependencies.partners[module]]} has as well"
        if any(row is None for row in item.root_idxs):
            return f"torch-pruning cannot follow its units into {name or type(module).__name__}"
        if reads and max(item.idxs) >= dependencies.get_in_channels(module):
            return f"{name} reads fewer channels: a sum, mean or product of all lies between"
        consumers += bool(name) and reads
        reaches_output |= item.dep.target.type == tp.ops.OPTYPE.OUTPUT or not item.dep.target.outputs
    if consumers:
        return ""
    return (
        "its outputs reach the model's output" if reaches_output else "no convolution or linear layer reads its outputs"
    )


def _get_axis(dependencies: Any, item: Any) -> Axis:
    """ "in" for rows that a convolution or linear layer reads, else "out"."""
    module = item.dep.target.module
    consumes = isinstance(module, PRODUCERS) and not is_depthwise(module)
    return "in" if consumes and dependencies.is_in_channel_pruning_fn(item.dep.handler) else "out"


def _find_units_of_rows(dependencies: Any, raw: Any, rows: int) -> Tensor:
    """The unit of every root row (rows,).

    Rows belong together if they meet in one row of a layer, or at the same place of equal parts. A grouped convolution
    stays regular only if every one of its groups loses the same places, and a split into equal parts (`chunk`) cuts at
    the same places only if every part loses as many.
    """
    label = torch.arange(rows)
    places = [pair for item in raw if (pair := _list_places(dependencies, item)) is not None]
    if raw.links:
        first, second = torch.tensor(sorted(raw.links)).T
        places.append((torch.cat([first, second]), torch.arange(len(first)).repeat(2)))
    has_changed = True
    while has_changed:
        previous_label = label.clone()
        for root, place in places:
            lowest = torch.full((int(place.max()) + 1,), rows).scatter_reduce(0, place, label[root], "amin")
            label[root] = lowest[place]
        has_changed = not torch.equal(previous_label, label)
    return torch.unique(label, return_inverse=True)[1]


def _list_places(dependencies: Any, item: Any) -> tuple[Tensor, Tensor] | None:
    """Root rows, and their place within the parts of a grouped convolution or an equal split; None for other items."""
    module = item.dep.target.module
    if item.dep.target.type == tp.ops.OPTYPE.SPLIT and len(set(module.split_sizes or ())) == 1:
        width = module.split_sizes[0]
    elif isinstance(module, CONVOLUTIONS) and module.groups > 1 and not is_depthwise(module):
        rows = module.in_channels if _get_axis(dependencies, item) == "in" else module.out_channels
        width = rows // module.groups
    else:
        return None
    return torch.tensor(item.root_idxs), torch.tensor(item.idxs) % width
