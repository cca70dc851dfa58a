"""Models as tests load them, and refusals to."""

import os
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from pxcompress.errors import ModelError
from pxcompress.models.loading import LoadedModel, load_model

SMALL = "test_resnet"


def load(name: str, **options: object) -> LoadedModel:
    return load_model(name, **{"classes": 4, "input_size": 32, "device": "cpu", **options})


def refusal(name: str, **options: object) -> str:
    """The message of the error that loading gives: one line."""
    with pytest.raises(ModelError) as caught:
        load(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def equal(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def saved(folder: Path, name: str = SMALL, classes: int = 4, safe: bool = True, **options: object) -> nn.Module:
    """A timm model with random weights and statistics, in `folder` as timm saves it: safetensors, or a pickle."""
    model = timm.create_model(name, num_classes=classes, **options)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    save_for_hf(model, folder, safe_serialization=safe)
    return model


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("executed",)
