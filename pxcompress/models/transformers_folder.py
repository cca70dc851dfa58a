"""A slim model of Hugging Face's as a folder for `from_pretrained`, where its configuration can say the widths."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from pxcompress.errors import ModelError
from pxcompress.models.hugging_face import ImageModel, TextModel, find_class, without_pooler
from pxcompress.models.tokens import Tokenizer

FOLDER = "transformers"
"""Name of that folder in a run folder."""

WIDTHS = ("intermediate_size", "hidden_dim")
"""What configurations call the neurons of every layer's MLP: one number for all layers."""


def save_slim(slim: nn.Module, dense: nn.Module, folder: Path) -> str:
    """Write `slim`, pruned from `dense`, to `folder / FOLDER` if a configuration builds it; says how it is loaded.

    A configuration has one width for all layers and no way to say that heads are gone. Empty for other models.
    """
    if not isinstance(slim, ImageModel | TextModel) or not isinstance(dense, ImageModel | TextModel):
        return ""
    cls, config = find_class(type(dense.net).__name__), _narrowed(slim.net, dense.net)
    state = slim.net.state_dict()
    try:
        net = cls(config, **without_pooler(cls))
        net.load_state_dict(state)
    except (RuntimeError, ValueError, ModelError):  # widths that this configuration cannot say
        return (
            f"the configuration of {cls.__name__} cannot say widths that differ from layer to layer, or that heads are "
            "gone: pxcompress.load(folder) loads the slim model, from_pretrained does not (it does with --keep "
            "'*attention*' --normalise uniform)"
        )
    net.save_pretrained(folder / FOLDER)
    if isinstance(tokenizer := getattr(dense, "tokenizer", None), Tokenizer):
        (folder / FOLDER / "tokenizer.json").write_text(tokenizer.content, encoding="utf-8")
    return f"{FOLDER}/ in the folder has the slim model for {cls.__name__}.from_pretrained"


def _narrowed(slim: Any, dense: Any) -> Any:
    """The dense configuration with the width that all layers have in the slim net, where they have one."""
    config = copy.deepcopy(dense.config)
    layers = dict(slim.named_modules())
    for name in WIDTHS:
        width = getattr(config, name, None)
        widths = {
            layers[path].out_features
            for path, layer in dense.named_modules()
            if isinstance(layer, nn.Linear) and layer.out_features == width and path in layers
        }
        if len(widths) == 1:
            setattr(config, name, widths.pop())
    return config
