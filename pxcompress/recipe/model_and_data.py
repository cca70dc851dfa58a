"""The part of a recipe about the model, its weights, and the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, MISSING, dataclass

from pxcompress.checks import check_types
from pxcompress.choices import INPUT_LAYOUTS, one_of
from pxcompress.errors import InputError, unknown
from pxcompress.registry import names_in, option

MOST_SEED = 2**31 - 1
"""Largest seed: all libraries that draw random numbers take it."""

IN_PYTHON = "batches in Python"
"""Name of the data if batches were given in Python, with a module."""


@dataclass(frozen=True)
class ModelAndData:
    """A model, where its weights come from, and the data.

    `classes` are the only ones of the data and of the model's outputs that are kept, in this order (empty: all);
    `input_size` is a side in pixels, or height and width (None: the model's own, or the embedded data's). Raises
    `InputError` for values out of range.
    """

    model: str = option(
        MISSING,
        "Model to prune: a timm name, hf-hub:NAME, local-dir:PATH, hf:FOLDER (transformers), an ONNX file, or "
        "package.module:factory, a function that returns your own nn.Module.",
    )
    _: KW_ONLY
    data: str = option(
        "digits",
        "Your data: a folder of images, a .csv or .jsonl table, a .txt of texts, .npz or .npy arrays, a timm dataset "
        "spec, or package.module:factory, a function that returns them; or, to try things out, an embedded data set: "
        f"{one_of(names_in('pxcompress.demo'))}.",
    )
    classes: Sequence[str] = option(
        (), "Keep only these classes of the classifier: names with commas, or a file with one per line."
    )
    task: str = option(
        "auto",
        f"What the model's outputs mean and how they are judged: {one_of(names_in('pxcompress.tasks'))}, or your own "
        "package.module:Class. agreement: compares with the dense model, without labels.  [default: by the data]",
    )
    checkpoint: str | None = option(
        None, "File with the weights of --model: .safetensors, or a .pth that holds tensors only."
    )
    input_size: int | tuple[int, int] | None = option(
        None, "Side of the square input in pixels, or HEIGHTxWIDTH.  [default: the model's own]"
    )
    input_mean: str | None = option(
        None,
        "Mean that is subtracted from pixels in [0, 1], one or one per channel with commas; or the name of a scaling: "
        "imagenet, 0-1, -1-1, 0-255.  [default: as the model's configuration says]",
    )
    input_std: str | None = option(
        None, "Standard deviation that pixels are divided by, where --input-mean has numbers."
    )
    input_scale: float | None = option(
        None, "Largest value of the pixels that --input-mean and --input-std are for, such as 255.  [default: 1]"
    )
    layout: str = option(
        "auto",
        "Where an ONNX file has the channels of images: nchw (first), nhwc (last), or auto, as its shapes tell.",
    )
    skip_corrupt: bool = option(
        False, "Skip images that cannot be read, instead of stopping at the first; the report counts them."
    )
    seed: int = option(0, "Seed of every random draw.")

    def __post_init__(self) -> None:
        check_types(self, ModelAndData)
        sides = self.input_size if isinstance(self.input_size, tuple) else (self.input_size,)
        if any(side is not None and side < 8 for side in sides):
            raise InputError(f"input-size is {'x'.join(map(str, sides))}; expected sides of 8 pixels or more")
        if not 0 <= self.seed <= MOST_SEED:
            raise InputError(f"seed is {self.seed}; expected a whole number from 0 to {MOST_SEED}")
        if self.layout not in INPUT_LAYOUTS:
            raise InputError(str(unknown("layout", self.layout, INPUT_LAYOUTS)))
        _check_classes(self.classes)


def _check_classes(names: Sequence[str]) -> None:
    """Raise `InputError` for a selection of classes that is a single one or has repetitions; an empty one means all."""
    if len(names) == 1:
        raise InputError(f"classes are only {names[0]!r}; expected two or more names, or a file with one per line")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"class {name!r} is given {names.count(name)} times; give it once")
