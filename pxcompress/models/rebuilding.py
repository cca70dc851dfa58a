"""Builds a model again from its architecture, its state dict, and tensors that a state dict leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pxcompress.errors import ModelError
from pxcompress.models.outputs import difference, leaves
from pxcompress.state import device_of, evaluating, seeded

if TYPE_CHECKING:
    from pxcompress.models.loading import Architecture

TOLERANCE = 1e-4
"""Largest accepted difference of a model that is built again, as a share of the outputs' scale."""

OTHER_SEED = 1_000_003
"""A seed that no run uses, so that random numbers drawn while building differ from those of the first build."""


def unregistered_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a model that its state dict leaves out, by name: non-persistent buffers and plain attributes."""
    state_keys = set(model.state_dict(keep_vars=True))
    tensors = {}
    for path, module in model.named_modules():
        attributes = {**vars(module), **module._buffers}
        for name, value in attributes.items():
            if isinstance(value, Tensor) and (full_name := f"{path}.{name}".lstrip(".")) not in state_keys:
                tensors[full_name] = value.detach()
    return tensors


def restore_unregistered_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set the `tensors` that `unregistered_tensors` returned as attributes of `model`, in place."""
    for full_name, value in tensors.items():
        path, _, name = full_name.rpartition(".")
        setattr(model.get_submodule(path), name, value)


def check_rebuilds(model: nn.Module, architecture: Architecture, shape: tuple[int, ...]) -> None:
    """Raise `ModelError` for a factory that builds another model each time, which a run folder could not store.

    `shape` is that of one input.
    """
    inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with seeded(OTHER_SEED):
        rebuilt_model = architecture.build()
    try:
        rebuilt_model.load_state_dict(model.state_dict())
        restore_unregistered_(
            rebuilt_model, {name: value.clone() for name, value in unregistered_tensors(model).items()}
        )
        with torch.no_grad(), evaluating(model), evaluating(rebuilt_model):
            rebuilt_outputs, model_outputs = (
                leaves(each(inputs.to(device_of(each)))) for each in (rebuilt_model, model)
            )
    except Exception:  # noqa: BLE001  (a model that does not run on such inputs is refused elsewhere, with its reason)
        return
    error = difference(rebuilt_outputs, model_outputs)
    if error > TOLERANCE:  # a NaN is no other model
        raise ModelError(
            f"model {architecture.name!r} is another one each time it is built, with the same weights: something is "
            "drawn or counted that is in no tensor of it; register what is drawn as buffers, or draw it from a seed"
        )
