"""Finds a user's own functions by name, "package.module:factory"; the current folder can be imported from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from torch import nn

from pxcompress.errors import ModelError, describe
from pxcompress.imports import find_object, own_code
from pxcompress.models.detectors import BACKGROUND, raw_detector

OPTIONS = ("num_classes", "img_size")
"""Arguments that a factory gets if it accepts them."""


def find_factory(name: str) -> Callable[..., object]:
    """Import the callable `package.module:factory`. Raises `ModelError`."""
    factory = find_object(name, "model")
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ModelError(f"model {name!r} is a {type(factory).__name__}; expected a callable that returns an nn.Module")
    return factory


def call_factory(name: str, kwargs: Mapping[str, object]) -> nn.Module:
    """The module that the factory `name` returns; a torchvision detector is wrapped to return raw boxes.

    Raises `ModelError` where it fails or takes other arguments.
    """
    # Architectures are read from files: such a name must not become a way to call any function with any arguments.
    refused_keys = [key for key, value in kwargs.items() if key not in OPTIONS or not isinstance(value, int)]
    if refused_keys:
        raise ModelError(f"model {name!r} refused: argument {refused_keys[0]!r}; expected only {OPTIONS} as integers")
    factory = find_factory(name)
    own = getattr(factory, "__module__", "").startswith("torchvision.models.detection")
    counted = dict(kwargs)
    if own and isinstance(classes := kwargs.get("num_classes"), int):
        counted["num_classes"] = classes + BACKGROUND
    try:
        with own_code():
            model = factory(**counted, **_without_backbone_weights(factory))
    except Exception as error:  # the user's callable may fail in any way
        arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise ModelError(f"model {name!r}: calling it with ({arguments}) failed: {describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r} returned a {type(model).__name__}; expected an nn.Module")
    return raw_detector(model)


def _without_backbone_weights(factory: Callable[..., object]) -> dict[str, None]:
    """Arguments that stop torchvision's builders from downloading backbone weights, which would be replaced anyway."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    return {name: None for name in ("weights_backbone", "encoder_weights") if name in parameters}
