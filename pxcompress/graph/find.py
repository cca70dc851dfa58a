"""Finds the units of a model that can be removed, each group proved by a trial."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pxcompress.errors import ModelError
from pxcompress.graph.heads import find_attentions, head_group
from pxcompress.graph.tracing import trace_groups
from pxcompress.graph.trial import prepare_trial
from pxcompress.types import FixedLayer, Group, Structure


def find_groups(model: nn.Module, example: Tensor, keep: Sequence[str] = (), *, prove: bool = True) -> Structure:
    """Find all groups that can be removed from `model`, in execution order, and the layers that stay, with the reason.

    `example` has shape (1, ...); the outputs of the modules named in `keep` (the classifier) stay whole. Every group is
    proved by a `Trial`: half of its units are removed, and the outputs must be those of zeroing them; a group that
    fails stays, as do layers that the example does not reach. `prove` off leaves that out, for a model that was proved
    before.
    Raises `ModelError` where the model cannot be traced or tried.
    """
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    unknown_names = set(keep) - set(order)
    if unknown_names:
        raise ModelError(f"model has no module {min(unknown_names)!r} whose outputs could be kept")
    trial = prepare_trial(model, example) if prove else None
    heads = list(find_attentions(model))
    head_layers = {name for attention in heads for name in attention.layers}
    candidates = [
        *trace_groups(model, example, keep, head_layers),
        *(head_group(model, attention) for attention in heads),
    ]
    groups = [group for group in candidates if isinstance(group, Group)]
    fixed = {group.name: FixedLayer(group.name, 1, "it has one unit") for group in groups if _is_single(group)}
    groups = [group for group in groups if not _is_single(group)]
    fixed |= {layer.name: layer for layer in candidates if isinstance(layer, FixedLayer)}
    if trial:
        units = {group.name: group.units for group in groups}
        fixed |= {name: FixedLayer(name, units[name], reason) for name, reason in trial.faults(groups).items()}
        fixed |= {layer.name: layer for layer in trial.idle.fixed}
    return Structure(
        tuple(sorted((group for group in groups if group.name not in fixed), key=lambda group: order[group.name])),
        tuple(sorted(fixed.values(), key=lambda layer: order[layer.name])),
    )


def _is_single(group: Group) -> bool:
    """Whether a group has only one unit, without which nothing behind it would run."""
    return group.units == 1 and group.kind != "head"
