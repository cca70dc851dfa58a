"""Saves a slim Hugging Face model as a folder for `from_pretrained`, if a configuration can describe it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from pxcompress.models.hugging_face import ImageModel, TextModel, find_class, without_pooler
from pxcompress.models.tokens import Tokenizer

FOLDER = "transformers"
"""Name of the folder for `from_pretrained` in a run folder."""

WIDTHS = ("intermediate_size", "hidden_dim")
"""Names that configurations have for the width of MLPs; it is one number for all layers."""


def save_slim(slim: nn.Module, dense: nn.Module, folder: Path) -> str:
    """Save `slim`, pruned from `dense`, to `folder / FOLDER` if possible; returns a sentence on how to load it.

    A configuration has one width for all layers, to which narrower ones are padded with zeros, and cannot say that
    heads are gone. The result is empty for models that are not from Hugging Face.
    """
    if not isinstance(slim, ImageModel | TextModel) or not isinstance(dense, ImageModel | TextModel):
        return ""
    cls, (config, width) = find_class(type(dense.net).__name__), _narrow_config(slim.net, dense.net)
    net = cls(config, **without_pooler(cls))
    state = _fill_up(slim.net.state_dict(), net.state_dict(), width)
    if state is None:
        return (
            f"the configuration of {cls.__name__} cannot say what is gone: pxcompress.load(folder) loads the slim "
            "model, from_pretrained does not (it does where heads stay: --keep '*attention*')"
        )
    net.load_state_dict(state)
    net.save_pretrained(folder / FOLDER)
    if isinstance(tokenizer := getattr(dense, "tokenizer", None), Tokenizer):
        (folder / FOLDER / "tokenizer.json").write_text(tokenizer.content, encoding="utf-8")
    return (
        f"{FOLDER}/ in the folder is the slim model for {cls.__name__}.from_pretrained, every layer with {width} "
        "neurons (narrower ones are filled up with zeros)"
    )


def _narrow_config(slim: Any, dense: Any) -> tuple[Any, int]:
    """The dense configuration with the MLP width of the slim net's widest layer, and that width."""
    config = copy.deepcopy(dense.config)
    layers = dict(slim.named_modules())
    widest = 0
    for name in WIDTHS:
        width = getattr(config, name, None)
        widths = {
            layers[path].out_features
            for path, layer in dense.named_modules()
            if isinstance(layer, nn.Linear) and layer.out_features == width and path in layers
        }
        if widths:
            widest = max(widths)
            setattr(config, name, widest)
    return config, widest


def _fill_up(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], width: int) -> dict[str, Tensor] | None:
    """`state` with zeros that widen narrower layers to `width`; None if other weights are missing too."""
    if state.keys() != expected.keys():
        return None
    result = {}
    for name, value in state.items():
        lacking = [(size, own) for size, own in zip(expected[name].shape, value.shape, strict=True) if size != own]
        if any(size != width or own > size for size, own in lacking):
            return None
        fill = [(0, size - own) for size, own in zip(expected[name].shape, value.shape, strict=True)]
        result[name] = pad(value.detach().cpu(), [count for pair in reversed(fill) for count in pair])
    return result
