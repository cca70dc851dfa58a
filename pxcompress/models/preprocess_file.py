"""Reads how pixels are normalised from a file beside the model: preprocess.json, or that of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from pxcompress.errors import ModelError, describe

Numbers = tuple[float, ...]

PRESETS: dict[str, tuple[Numbers, Numbers]] = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "0-1": ((0.0,), (1.0,)),
    "-1-1": ((0.5,), (0.5,)),
    "0-255": ((0.0,), (1 / 255,)),
}
"""Name of a preset -> mean and std of pixels from 0 to 1, for each channel or for all alike."""

OWN, HUGGING_FACE = "preprocess.json", "preprocessor_config.json"

KEYS = ("mean", "std", "interpolation", "crop", "classes")
"""Keys of preprocess.json; "mean" names a preset, or is numbers as "std" is; the others are optional."""

RESAMPLING: Mapping[int, str] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Number that Hugging Face writes for an interpolation -> its name."""


def read_beside(model: Path, channels: int) -> dict[str, Any]:
    """Preprocessing from NAME.preprocess.json, preprocess.json or preprocessor_config.json beside a model, in timm's
    terms.

    Empty if there is no such file. Raises `ModelError` for one that cannot be understood.
    """
    for path in (model.with_suffix(f".{OWN}"), model.with_name(OWN), model.with_name(HUGGING_FACE)):
        if path.is_file():
            try:
                record = json.loads(path.read_text(encoding="utf-8-sig"))
                return _theirs(record, channels) if path.name == HUGGING_FACE else _own(record, channels)
            except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
                reason = describe(error)
                raise ModelError(
                    f"{path.name} beside {model.name} is not understood ({reason}); expected JSON with "
                    f'"mean" (one of {", ".join(PRESETS)}, or {channels} numbers) and "std"'
                ) from error
    return {}


def _own(record: Mapping[str, Any], channels: int) -> dict[str, Any]:
    if unknown := sorted(record.keys() - set(KEYS)):
        raise ValueError(f"unknown key {unknown[0]!r}; expected {', '.join(KEYS)}")
    mean, std = PRESETS[record["mean"]] if isinstance(record["mean"], str) else (record["mean"], record["std"])
    named = {"interpolation": "interpolation", "crop": "crop_pct", "classes": "label_names"}
    return _values(mean, std, channels) | {named[key]: record[key] for key in named if key in record}


def _theirs(record: Mapping[str, Any], channels: int) -> dict[str, Any]:
    mean, std = (record["image_mean"], record["image_std"]) if record.get("do_normalize", True) else PRESETS["0-1"]
    scale = 255 * record.get("rescale_factor", 1 / 255) if record.get("do_rescale", True) else 255.0
    values = _values([each / scale for each in mean], [each / scale for each in std], channels)
    return values | {"interpolation": RESAMPLING.get(record.get("resample", 3), "bicubic")}


def _values(mean: Any, std: Any, channels: int) -> dict[str, Any]:
    """Mean and standard deviation as one number for each channel. Raises `ValueError`."""
    made = {"mean": [float(each) for each in mean], "std": [float(each) for each in std]}
    for key, numbers in made.items():
        if len(numbers) not in (1, channels) or (key == "std" and min(numbers) <= 0):
            raise ValueError(f"{key} is {numbers}")
    return {key: tuple(numbers * (channels if len(numbers) == 1 else 1)) for key, numbers in made.items()}
