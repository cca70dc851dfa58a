"""How pixels are normalised for a model: by the name of a preset, by numbers, or as the model itself says."""

from __future__ import annotations

import math
from dataclasses import replace

from pxcompress.errors import InputError
from pxcompress.models.inputs import config_of
from pxcompress.models.loading import LoadedModel
from pxcompress.models.preprocess_file import OWN, PRESETS, Numbers


def with_values(loaded: LoadedModel, mean: str | None, std: str | None, scale: float | None = None) -> LoadedModel:
    """`loaded` with the mean and std that the user asks for: `mean` names a preset, or both are numbers.

    They are for pixels from 0 to `scale`, which is 1 if it is not given; with a scale alone, pixels are only divided by
    it. Raises `InputError` for other texts, for models that take no images, and where nothing is given and an ONNX file
    has no numbers of its own.
    """
    value_by_option = {"mean": mean, "std": std, "scale": scale}
    texts = [f"input-{name} is {value}" for name, value in value_by_option.items() if value is not None]
    if not loaded.preprocessing.is_image:
        if texts:
            raise InputError(f"{texts[0]}, but {loaded.architecture.name} takes no images; leave it out")
        return loaded
    if not texts:
        _check_known(loaded)
        return loaded
    if mean in PRESETS and std is None and scale is None:
        return _with_numbers(loaded, *PRESETS[mean])
    if scale is not None and not 0 < scale < math.inf:
        raise InputError(f"input-scale is {scale}; expected the largest value of a pixel, such as 255")
    if mean in PRESETS or (scale is None and None in (mean, std)):
        raise InputError(
            f"{', '.join(texts)}; expected numbers for --input-mean and --input-std, or --input-mean alone as one of "
            f"{', '.join(PRESETS)}"
        )
    means, stds = _numbers("input-mean", mean or "0"), _numbers("input-std", std or "1")
    if any(value <= 0 for value in stds):
        raise InputError(f"input-std is {std}; expected numbers above 0")
    largest = scale or 1.0
    return _with_numbers(loaded, tuple(each / largest for each in means), tuple(each / largest for each in stds))


def _check_known(loaded: LoadedModel) -> None:
    """Raise `InputError` for an ONNX file that does not say how pixels are normalised."""
    if loaded.weights == "file" and "mean" not in config_of(loaded.model):
        raise InputError(
            f"{loaded.architecture.name} does not say how pixels become its input; give --input-mean with one of "
            f"{', '.join(PRESETS)}, or numbers with --input-std, or lay a {OWN} beside it"
        )


def _with_numbers(loaded: LoadedModel, means: Numbers, stds: Numbers) -> LoadedModel:
    """`loaded` with this mean and std, each one number for all channels or one for each."""
    channels = loaded.preprocessing.input_size[0]
    mean, std = _for_channels(means, channels), _for_channels(stds, channels)
    return replace(loaded, preprocessing=replace(loaded.preprocessing, mean=mean, std=std))


def _numbers(name: str, text: str) -> Numbers:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{name} is {text!r}; expected numbers with commas, such as 0.5,0.5,0.5") from error
    if not all(map(math.isfinite, values)):
        raise InputError(f"{name} is {text!r}; expected finite numbers")
    return values


def _for_channels(values: Numbers, channels: int) -> Numbers:
    if len(values) not in (1, channels):
        raise InputError(f"{len(values)} numbers are given for {channels} channels; give one, or one for each")
    return values * channels if len(values) == 1 else values
