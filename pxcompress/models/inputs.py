"""The inputs that a model takes, as it describes them itself in timm's terms, and the preprocessing for the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from pxcompress.errors import ModelError
from pxcompress.models.signature import Signature
from pxcompress.models.tokens import Tokenizer
from pxcompress.types import ImageSize, Input, Preprocessing


def config_of(model: nn.Module) -> Mapping[str, Any]:
    """The module's pretrained_cfg or default_cfg (timm's names); empty where it has neither."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        if isinstance(config, Mapping):
            return config
    return {}


EXAMPLE_TOKENS = 32
"""Number of tokens of the example text for tracing and export, where there are no data to take one from."""


def preprocessing_of(
    model: nn.Module,
    input_size: int | ImageSize | tuple[int, ...] | None = None,
    inputs: tuple[Input, ...] = (),
) -> Preprocessing:
    """How to make inputs for `model`; `input_size` is in pixels, or the shape of an input that is no image.

    Without it the model's own size is taken. `inputs` describes several inputs that the data have. Raises `ModelError`
    for a side in pixels if the model takes no images.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if isinstance(tokenizer, Tokenizer):
        if input_size is not None and not inputs:
            if isinstance(input_size, int):
                data_text = f"images of {input_size} pixels"
            else:
                data_text = f"inputs of shape {'x'.join(map(str, input_size))}"
            raise ModelError(f"the model takes texts, not {data_text}; give --data of texts, without --input-size")
        tokens = (len(tokenizer.names), min(EXAMPLE_TOKENS, tokenizer.longest))
        return Preprocessing(tokens, inputs=tokenizer.inputs, tokenizer=tokenizer)
    if inputs and isinstance(input_size, tuple):
        return Preprocessing(input_size, inputs=inputs)
    config = config_of(model)
    channels, *sides = config.get("input_size", (_image_channels(model), 224, 224))
    size = ImageSize(input_size, input_size) if isinstance(input_size, int) else input_size
    if size is not None and not isinstance(size, ImageSize):
        return Preprocessing(size)
    if len(sides) != 2:
        if size is not None:
            shape = "x".join(map(str, (channels, *sides)))
            raise ModelError(f"the model takes inputs of shape {shape}, no images; give --data with such inputs")
        return Preprocessing((channels, *sides))
    args = {} if size is None else {"input_size": (channels, *size)}
    data_config = resolve_model_data_config(model, args=args, pretrained_cfg=config)
    channels, *sides = data_config["input_size"]
    if _image_channels(model) != 3:  # timm keeps the number of the pretrained weights where `in_chans` is another
        channels = _image_channels(model)
    return Preprocessing(
        input_size=(channels, *sides),
        mean=_each_channel(data_config["mean"], channels),
        std=_each_channel(data_config["std"], channels),
        interpolation=data_config["interpolation"],
        crop=float(data_config["crop_pct"]),
        crop_mode=data_config["crop_mode"],
    )


def check_takes(preprocessing: Preprocessing, name: str, noun: str) -> None:
    """Raise `ModelError` if the model `name` does not take the data's kind of samples (`noun`: "images", "texts",
    ...).
    """
    if preprocessing.tokenizer is not None:
        takes = "texts"
    elif preprocessing.is_image:
        takes = "images"
    else:
        return
    if noun in ("texts", "images") and noun != takes:
        raise ModelError(f"model {name!r} takes {takes}, the data are {noun}; give {takes}, or a model of {noun}")


def blank_inputs(preprocessing: Preprocessing, samples: int = 1) -> Tensor:
    """Inputs without content, (samples, ...): zeros, or texts that repeat one token."""
    return Signature(preprocessing.inputs).blank(preprocessing.input_size, samples)


def _image_channels(model: nn.Module) -> int:
    """Number of channels of the model's images: 1 or 4 if its first convolution has as many, else 3."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return first.in_channels if first is not None and first.in_channels in (1, 4) else 3


def _each_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One number for each of `channels`; if there are not as many, grey and alpha channels get the mean."""
    if len(values) == channels:
        return tuple(values)
    mean = sum(values) / len(values)
    return (*values, mean) if (len(values), channels) == (3, 4) else (mean,) * channels


def with_whole_images(preprocessing: Preprocessing, model: nn.Module) -> Preprocessing:
    """`preprocessing` that crops nothing: images are padded, unless the model says otherwise."""
    config = config_of(model)
    crop_mode, crop = config.get("crop_mode", "border"), config.get("crop_pct", 1.0)
    return replace(preprocessing, crop_mode=crop_mode, crop=float(crop))
