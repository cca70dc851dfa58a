"""Off-the-shelf timm models that cost about as much as a slim one: is pruning worth it, or would one of them do?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

import torch

from pxcompress.cost.count import count_macs, count_params
from pxcompress.data import load_splits
from pxcompress.deploy.answers import torch_accuracy
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.intervals import speedup
from pxcompress.deploy.measure import Tried, file_bytes, latency
from pxcompress.errors import InputError, ModelError
from pxcompress.models.loading import Architecture, Loaded, load_model
from pxcompress.proof import Rival
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.subject import Subject

FAMILIES = (
    ("resnet10t", "resnet14t", "resnet18", "resnet26", "resnet34", "resnet50"),
    ("mobilenetv3_small_050", "mobilenetv3_small_100", "mobilenetv3_large_075", "mobilenetv3_large_100"),
    ("efficientnet_lite0", "efficientnet_b0", "efficientnet_b1"),
    ("regnety_002", "regnety_004", "regnety_008", "regnety_016"),
    ("convnext_atto", "convnext_femto", "convnext_pico", "convnext_nano", "convnext_tiny"),
    ("vit_tiny_patch16_224", "vit_small_patch32_224", "vit_small_patch16_224"),
)
"""Usual choices for images, the smallest of each family first."""

MOST = 4
"""Models of a comparison: each takes an export."""

FARTHEST = 2.0
"""Factor of the MACs within which a model counts as similar."""

IMAGENET = 1000
"""Classes of the data that timm's own weights are for."""


@dataclass(frozen=True)
class Other:
    """An off-the-shelf model as a file; `top1` is None where its weights are random."""

    name: str
    path: Path
    params: int
    macs: int
    top1: float | None


def similar(macs: int, shape: Sequence[int], classes: int) -> tuple[str, ...]:
    """Names of the model of each family whose MACs are nearest to `macs`, those within `FARTHEST`, at most `MOST`.

    `shape` is that of one input, (channels, height, width). Nothing is computed but counts.
    """
    nearest = (min((_distance(name, macs, shape, classes), name) for name in family) for family in FAMILIES)
    found = sorted(pair for pair in nearest if pair[0] <= log(FARTHEST))
    return tuple(name for _, name in found[:MOST])


def _distance(name: str, macs: int, shape: Sequence[int], classes: int) -> float:
    """Of the logarithms of the MACs; infinite for a model that cannot take such images."""
    sized = {"img_size": shape[-1]} if name.startswith("vit") else {}
    try:
        with torch.device("meta"):
            model = Architecture(name, {"num_classes": classes, **sized}).build().eval()
            return abs(log(count_macs(model, torch.zeros(1, *shape)) / macs))
    except (ModelError, RuntimeError):  # too small for its strides
        return float("inf")


def check_comparable(recipe: Recipe, subject: Subject) -> None:
    """Raise `InputError` where the recipe asks for off-the-shelf models and the inputs are no square colour images."""
    shape = tuple(subject.splits.example.shape[1:])
    square = subject.loaded.preprocessing.is_image and shape[0] == 3 and shape[1] == shape[2]
    if recipe.compare and not square:
        raise InputError(f"--compare knows models of square colour images, the inputs have shape {shape}; leave it out")


def take(subject: Subject, macs: int, folder: Path, run: Run) -> tuple[Other, ...]:
    """Off-the-shelf models of about `macs`, exported into `folder`, for the classes and images of `subject`.

    They have their own weights, and an accuracy, where these can be fetched and know the classes of the data; else
    random ones.
    """
    example, classes = subject.splits.example, len(subject.source.classes)
    found = []
    names = similar(macs, tuple(example.shape[1:]), classes)
    run.clock.say(f"off the shelf with as many MACs: {', '.join(names) or 'none'}")
    for name in names:
        with run.clock.stage(f"export {name}"):
            loaded = _loaded(name, subject, example.shape[-1])
            batch = run.recipe.onnx_batch
            path = export_onnx(loaded.model, example, folder / f"{name}.onnx", {}, batch=batch).path
            top1 = _top1(loaded, subject, run.recipe.seed) if loaded.weights == "pretrained" else None
            found.append(Other(name, path, count_params(loaded.model), count_macs(loaded.model, example), top1))
    return tuple(found)


def _loaded(name: str, subject: Subject, side: int) -> Loaded:
    classes = len(subject.source.classes)
    if classes == IMAGENET and not subject.source.embedded:
        try:
            return load_model(name, classes=classes, pretrained=True, input_size=side)
        except ModelError:  # no network
            pass
    return load_model(name, classes=classes, input_size=side)


def _top1(loaded: Loaded, subject: Subject, seed: int) -> float:
    """On the test split, its images prepared as this model wants them."""
    splits = load_splits(subject.source, loaded.preprocessing, seed=seed)
    return torch_accuracy(loaded.model, splits.test)


def rated(others: Sequence[Other], slim: Tried, tried: Sequence[Tried]) -> tuple[Rival, ...]:
    """What was measured of `others`, beside the slim model."""
    return tuple(
        Rival(
            other.name,
            other.params,
            other.macs,
            file_bytes(other.path),
            latency(each.seconds),
            speedup(slim.seconds, each.seconds),
            other.top1,
        )
        for other, each in zip(others, tried, strict=True)
    )
