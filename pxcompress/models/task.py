"""Restricts a classifier to some of its classes: the outputs and weights of the others are removed."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pxcompress.errors import ModelError, describe
from pxcompress.models.loading import classifier_names
from pxcompress.state import device_of, evaluating

TOLERANCE = 1e-4
"""Largest accepted change of the remaining scores, as a share of their scale."""


def slice_classes(model: nn.Module, example: Tensor, outputs: Sequence[int]) -> nn.Module:
    """A copy of `model` with only the classes `outputs`, in that order; their scores stay the same.

    `example` has shape (n, ...). The rows of every classifier's weight and bias are taken (a distilled DeiT has two).
    Raises `ModelError` where there is no such layer, an output that it does not have, or where what follows it changes
    the scores of the classes that stay.
    """
    names = classifier_names(model, example)
    if not names:
        raise ModelError(f"{type(model).__name__} has no linear or convolutional classifier to take classes from")
    twin = copy.deepcopy(model)
    layers = [twin.get_submodule(name) for name in names]
    widths = {len(layer.weight) for layer in layers}  # type: ignore[arg-type]
    width = min(widths)
    if len(widths) > 1 or any(getattr(layer, "groups", 1) > 1 for layer in layers):
        raise ModelError(f"classifier {' and '.join(names)} has no output of its own for every class; expected one")
    for output in outputs:
        if not 0 <= output < width:
            raise ModelError(f"output {output} is asked for, but classifier {names[0]!r} has {width}, from 0 on")
    for layer in layers:
        _keep_rows(layer, torch.tensor(outputs))
    for module in twin.modules():
        if getattr(module, "num_classes", None) == width:
            module.num_classes = len(outputs)  # type: ignore[assignment]
    _check(model, twin, example, outputs)
    return twin


def _keep_rows(layer: nn.Module, rows: Tensor) -> None:
    """Keep only the outputs `rows` of a linear layer or convolution, in place."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        class_rows = parameter.detach()[rows.to(parameter.device)].clone()
        setattr(layer, name, nn.Parameter(class_rows, requires_grad=parameter.requires_grad))
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(rows))


def _check(model: nn.Module, twin: nn.Module, example: Tensor, outputs: Sequence[int]) -> None:
    inputs = example.to(device_of(model))
    try:
        with torch.no_grad(), evaluating(model), evaluating(twin):
            dense_scores, twin_scores = model(inputs)[:, list(outputs)], twin(inputs)
    except Exception as error:  # what follows the classifier may fail in any way
        raise ModelError(
            f"{type(model).__name__} does not run with {len(outputs)} classes: {describe(error)}"
        ) from error
    if (
        twin_scores.shape != dense_scores.shape
        or not (twin_scores - dense_scores).abs().max() <= TOLERANCE * dense_scores.abs().max()
    ):
        raise ModelError(
            f"{type(model).__name__} gives classes another score when others are removed; expected its classifier's "
            "outputs as they are: leave a softmax behind it out"
        )
