"""The copy of a model that attributions are made on."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pxcompress.attribution import transformer
from pxcompress.errors import ModelError


def copy_for_attribution(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, without parameter gradients or in-place activations. Raises `ModelError`."""
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{type(model).__name__} cannot be copied for attribution: {error}") from error
    twin.eval()  # which need not return anything
    twin.requires_grad_(False)
    for module in twin.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False  # type: ignore[assignment]
    return twin


def default_example(model: nn.Module) -> Tensor:
    """An input of zeros, (1, ...), of the size in a timm model's configuration.

    Raises `ModelError` for a model without one.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    if "input_size" not in config:
        raise ModelError(f"{type(model).__name__} does not say its input size; give an example input of shape (1, ...)")
    return torch.zeros(1, *config["input_size"])


def give_identity_rules_(twin: nn.Module) -> None:
    """Give modules that compute x * gate(x) step by step the identity rule, as if they were one activation function."""
    for module in twin.modules():
        if type(module).__name__ in transformer.SELF_GATED and not type(module).__module__.startswith("torch."):
            rule = partial(
                transformer.identity_rule, function=module.forward, activation=transformer.ACTIVATIONS["silu"]
            )
            object.__setattr__(module, "forward", rule)


def check_same(expected: Any, output: Any, name: str) -> None:
    """Raise `ModelError` where a copy's output is not the model's, since its relevances would explain another model."""
    if not isinstance(output, Tensor):
        raise ModelError(
            f"{name} returns {type(output).__name__}; attribution needs a model that returns a tensor of logits"
        )
    tolerance = 1e-3 if output.dtype in (torch.float32, torch.float64) else 5e-2
    difference = float((expected - output.detach()).abs().max())
    if not difference <= tolerance * max(float(expected.abs().max()), 1e-3):
        raise ModelError(
            f"{name}: its copy with folded BatchNorm differs by {difference:.3g} on the example, so it cannot be "
            "attributed; check that the example is what the model expects and that its forward is deterministic"
        )


def classifier_names(twin: nn.Module) -> set[str]:
    """Names of the modules that a timm model returns as its classifier; a distilled model has two."""
    get_classifier = getattr(twin, "get_classifier", None)
    if not callable(get_classifier):
        return set()
    classifier = get_classifier()
    heads = {id(head) for head in (classifier if isinstance(classifier, (tuple, list)) else (classifier,))}
    return {name for name, module in twin.named_modules() if id(module) in heads}
