"""How pixels become a model's input: by name, by numbers, or as the model itself says."""

from __future__ import annotations

from dataclasses import replace

from pxcompress.errors import InputError
from pxcompress.models.inputs import config_of
from pxcompress.models.loading import Loaded
from pxcompress.models.preprocess_file import OWN, PRESETS, Numbers


def with_values(loaded: Loaded, mean: str | None, std: str | None) -> Loaded:
    """`loaded` with the preprocessing that is asked for: a preset as `mean`, or numbers for both.

    Raises `InputError` for other texts, and where nothing is asked for and an ONNX file does not say it.
    """
    preprocessing = loaded.preprocessing
    if not preprocessing.is_image:
        return loaded
    if mean is None and std is None:
        if loaded.weights == "file" and "mean" not in config_of(loaded.model):
            raise InputError(
                f"{loaded.architecture.name} does not say how pixels become its input; give --input-mean with one of "
                f"{', '.join(PRESETS)}, or numbers with --input-std, or lay a {OWN} beside it"
            )
        return loaded
    channels = preprocessing.input_size[0]
    if mean in PRESETS and std is None:
        values = PRESETS[mean]
    elif mean is None or std is None:
        raise InputError(
            f"input-mean is {mean}, input-std is {std}; expected numbers for both, or input-mean as one of "
            f"{', '.join(PRESETS)}"
        )
    else:
        values = _numbers("input-mean", mean), _numbers("input-std", std)
    means, stds = (_for_channels(each, channels) for each in values)
    if any(value <= 0 for value in stds):
        raise InputError(f"input-std is {std}; expected numbers above 0")
    return replace(loaded, preprocessing=replace(preprocessing, mean=means, std=stds))


def _numbers(name: str, text: str) -> Numbers:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{name} is {text!r}; expected numbers with commas, such as 0.5,0.5,0.5") from error


def _for_channels(values: Numbers, channels: int) -> Numbers:
    if len(values) not in (1, channels):
        raise InputError(f"{len(values)} numbers are given for {channels} channels; give one, or one for each")
    return values * channels if len(values) == 1 else values
