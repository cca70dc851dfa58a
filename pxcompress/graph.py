"""The only door to torch_pruning: which units a model has, and their physical removal.

Geometry is written down once, here: every `Member` says which rows of which axis each unit owns. Scorers, meters and
repairs read it from there and never ask again how a layer is shaped.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from pxcompress.errors import ModelError
from pxcompress.state import device_of, observed, time_limit
from pxcompress.types import Axis, Fixed, Group, Kind, Member, Plan, Pruned, Structure

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRODUCERS = (*CONVOLUTIONS, nn.Linear)
SPANNING_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


REMOVAL_TOLERANCE = 1e-4
"""Largest difference between removing units and zeroing them, as a share of the outputs' scale."""

NOT_EXACT = "removing its units is not the same as zeroing them"

TRACING_SECONDS = 90.0
"""After this the model is refused: torch-pruning does not come to an end on some graphs."""


@dataclass(frozen=True)
class _Attention:
    """A fused-qkv attention module whose heads can be removed: `heads` blocks of `head_dim` rows of `proj`'s input."""

    name: str
    heads: int
    head_dim: int


def is_depthwise(module: nn.Module) -> bool:
    """Whether every input channel of a convolution has its own output channel and reaches no other."""
    return isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels == module.out_channels > 1


def find_groups(model: nn.Module, example: Tensor, keep: Sequence[str] = (), *, prove: bool = True) -> Structure:
    """Everything that can be removed from `model`, in execution order, and what stays with the reason.

    `example` has shape (1, ...); the outputs of the modules named in `keep` (the classifier) stay whole. Every group is
    proved by a trial: half of its units are removed, and the outputs must be those of zeroing them; a group that
    fails stays. `prove` off leaves that out, for a model that was proved before.
    Raises `ModelError` where the model cannot be traced.
    """
    missing = set(keep) - {name for name, _ in model.named_modules()}
    if missing:
        raise ModelError(f"model has no module {min(missing)!r} whose outputs could be kept")
    twin, dependencies = _traced_copy(model, example)
    names: dict[Any, str] = {module: name for name, module in twin.named_modules()}
    names.update({parameter: name for name, parameter in twin.named_parameters()})
    with _guarded("model's groups cannot be found"):
        found = list(_candidates(dependencies, names, set(keep)))
    groups = [group for group in found if isinstance(group, Group)]
    inexact = {group.name for group in _inexact(model, groups, example)} if prove else set()
    fixed = [layer for layer in found if isinstance(layer, Fixed)]
    fixed += [Fixed(group.name, group.units, NOT_EXACT) for group in groups if group.name in inexact]
    order = {name: place for place, name in enumerate(names.values())}
    return Structure(
        tuple(sorted((group for group in groups if group.name not in inexact), key=lambda group: order[group.name])),
        tuple(sorted(fixed, key=lambda layer: order[layer.name])),
    )


def prune(model: nn.Module, groups: Sequence[Group], plan: Plan, example: Tensor) -> Pruned:
    """Remove the planned units physically from a copy of `model`; `model` itself becomes the frozen `dense`.

    Equals the dense model with the same units zeroed (`masked`), to rounding.
    """
    slim, dependencies = _traced_copy(model, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for group in groups:
            removed = plan.removed.get(group.name, ())
            if removed:
                root = group.members[0]
                module = slim.get_submodule(root.module)
                pruner = dependencies.get_pruner_of_module(module)
                remove = pruner.prune_out_channels if root.axis == "out" else pruner.prune_in_channels
                dependencies.get_pruning_group(module, remove, root.rows(removed).tolist()).prune()
    by_name = {group.name: group for group in groups}
    for attention in _attentions(model):
        if attention.name in by_name:
            _set_heads(slim.get_submodule(attention.name), len(plan.kept(by_name[attention.name])), attention.head_dim)
    for module in slim.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.num_features = module.running_mean.numel()
    for parameter, original in zip(slim.parameters(), model.parameters(), strict=True):
        parameter.grad = None
        parameter.requires_grad_(original.requires_grad)
    for slim_module, dense_module in zip(slim.modules(), model.modules(), strict=True):
        slim_module.training = dense_module.training
    return Pruned(model=slim, dense=model, groups=tuple(groups), plan=plan)


def masked(model: nn.Module, groups: Sequence[Group], plan: Plan) -> nn.Module:
    """A copy of `model` in which no layer reads the planned units any more: the oracle for `prune`."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for group in groups:
            removed = plan.removed.get(group.name, ())
            if removed:
                for member in group.consumers:
                    module = twin.get_submodule(member.module)
                    _zero_inputs(module, member.rows(removed))
    return twin


def removal_error(pruned: Pruned, inputs: Tensor) -> float:
    """Largest difference between the pruned model's outputs and the masked dense ones, as a share of their scale.

    Meant before any repair; `inputs` has shape (n, ...). About 1e-6 in float32 where removal is exact.
    """
    twin = masked(pruned.dense, pruned.groups, pruned.plan)
    with torch.no_grad(), observed(pruned.model), observed(twin):
        inputs = inputs.to(device_of(pruned.model))
        slim, reference = pruned.model(inputs), twin(inputs)
    return float((slim - reference).abs().max() / reference.abs().max().clamp_min(1e-12))


def _zero_inputs(module: nn.Module, rows: Tensor) -> None:
    """Zero what `module` reads from input channels `rows`."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    groups = getattr(module, "groups", 1)
    rows = rows.to(weight.device)
    if groups == 1:
        weight[:, rows] = 0
        return
    width = weight.shape[1]
    per_group = weight.unflatten(0, (groups, -1))
    per_group[rows // width, :, rows % width] = 0


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


def _traced_copy(model: nn.Module, example: Tensor) -> tuple[nn.Module, Any]:
    """A copy of `model` in eval mode and its dependency graph."""
    with _guarded("model cannot be traced"):
        twin = copy.deepcopy(model).eval().requires_grad_(True)
        graph = tp.DependencyGraph().build_dependency(twin, example.to(device_of(twin)), verbose=False)
    return twin, graph


def _candidates(dependencies: Any, names: dict[Any, str], kept: set[str]) -> Iterator[Group | Fixed]:
    """Groups as torch-pruning sees them, and what is known to stay."""
    attentions = {f"{attention.name}.qkv": attention for attention in _attentions(dependencies.model)}
    for raw in dependencies.get_all_groups(root_module_types=PRODUCERS):
        root = names[raw[0].dep.target.module]
        if root in attentions:
            yield _head_group(dependencies, names, attentions[root])
        else:
            yield _producer_group(dependencies, names, raw, kept)


def _inexact(model: nn.Module, groups: Sequence[Group], example: Tensor) -> list[Group]:
    """The groups of which half cannot be removed exactly, found by halving the set of suspects."""
    if not groups or _removal_is_exact(model, groups, example):
        return []
    if len(groups) == 1:
        return list(groups)
    middle = len(groups) // 2
    return _inexact(model, groups[:middle], example) + _inexact(model, groups[middle:], example)


def _removal_is_exact(model: nn.Module, groups: Sequence[Group], example: Tensor) -> bool:
    removed = {group.name: tuple(range(1, group.units, 2)) for group in groups}
    inputs = torch.randn(2, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    try:
        pruned = prune(model, groups, Plan(removed, "trial", "units", 0, 0, 0), example)
        return removal_error(pruned, inputs) <= REMOVAL_TOLERANCE
    except Exception:  # noqa: BLE001  (torch-pruning and the cut model may fail in any way; the group stays then)
        return False


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _producer_group(dependencies: Any, names: dict[Any, str], raw: Any, kept: set[str]) -> Group | Fixed:
    """The group of a convolution's or linear layer's outputs, rooted at its first producer."""
    producers = [item.dep.target.module for item in raw if _axis(dependencies, item) == "out"]
    order = list(names)
    full = [module for module in producers if isinstance(module, PRODUCERS) and not is_depthwise(module)]
    first = min(full or producers, key=order.index)
    if first is not raw[0].dep.target.module:
        pruner = dependencies.get_pruner_of_module(first)
        rooted = dependencies.get_pruning_group(
            first, pruner.prune_out_channels, list(range(pruner.get_out_channels(first)))
        )
        if _shape(rooted) == _shape(raw):
            raw = rooted
    name, units = names[first], len(raw[0].idxs)
    reason = _why_fixed(names, raw, kept, dependencies)
    if reason:
        return Fixed(name, units, reason)
    kind: Kind = "neuron" if isinstance(first, nn.Linear) else "channel"
    return _build(dependencies, names, raw, (name, kind), _coupled(dependencies, raw, units))


def _head_group(dependencies: Any, names: dict[Any, str], attention: _Attention) -> Group | Fixed:
    """The heads of one attention module, removed through the input of its output projection."""
    model: nn.Module = dependencies.model
    projection = model.get_submodule(f"{attention.name}.proj")
    rows = attention.heads * attention.head_dim
    raw = dependencies.get_pruning_group(projection, tp.prune_linear_in_channels, list(range(rows)))
    modules = {names[item.dep.target.module] for item in raw if item.dep.target.module in names}
    expected = {f"{attention.name}.proj", f"{attention.name}.qkv"}
    if modules != expected:
        others = ", ".join(sorted(modules - expected)) or "nothing reaches qkv"
        return Fixed(attention.name, attention.heads, f"heads are coupled to other layers: {others}")
    return _build(dependencies, names, raw, (attention.name, "head"), torch.arange(rows) // attention.head_dim)


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


def _shape(raw: Any) -> list[tuple[int, str, int]]:
    return sorted((id(item.dep.target.module), item.dep.handler.__name__, len(item.idxs)) for item in raw)


def _coupled(dependencies: Any, raw: Any, rows: int) -> Tensor:
    """Unit of every root row (rows,): rows that hold the same place in each group of a grouped convolution go together.

    A grouped convolution stays regular only when every one of its groups loses the same places.
    """
    label = torch.arange(rows)
    places = [found for item in raw if (found := _places(dependencies, item)) is not None]
    changed = True
    while changed:
        before = label.clone()
        for root, place in places:
            lowest = torch.full((int(place.max()) + 1,), rows).scatter_reduce(0, place, label[root], "amin")
            label[root] = lowest[place]
        changed = not torch.equal(before, label)
    return torch.unique(label, return_inverse=True)[1]


def _places(dependencies: Any, item: Any) -> tuple[Tensor, Tensor] | None:
    """Root rows and their place inside the groups of a grouped convolution; None for every other module."""
    module = item.dep.target.module
    if not isinstance(module, CONVOLUTIONS) or module.groups == 1 or is_depthwise(module):
        return None
    width = module.in_channels if _axis(dependencies, item) == "in" else module.out_channels
    return torch.tensor(item.root_idxs), torch.tensor(item.idxs) % (width // module.groups)


def _attentions(model: nn.Module) -> Iterator[_Attention]:
    """Attention modules with a fused qkv projection, as timm writes them."""
    for name, module in model.named_modules():
        qkv, projection, heads = (getattr(module, key, None) for key in ("qkv", "proj", "num_heads"))
        if not (isinstance(qkv, nn.Linear) and isinstance(projection, nn.Linear) and isinstance(heads, int)):
            continue
        if qkv.out_features == 3 * projection.in_features and projection.in_features % heads == 0:
            yield _Attention(name, heads, projection.in_features // heads)


def _set_heads(attention: nn.Module, heads: int, head_dim: int) -> None:
    """Tell an attention module how many heads it has left. timm reads `num_heads` and `attn_dim`; `scale` stays."""
    sizes: dict[str, int] = {"num_heads": heads, "attn_dim": heads * head_dim, "head_dim": head_dim}
    for key, value in sizes.items():
        if hasattr(attention, key):
            setattr(attention, key, value)
