"""Models that timm can build: by name, from a repository on the hub, or from a folder that timm saved."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import timm
from timm.models import get_arch_pretrained_cfgs
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import nn

from pxcompress.errors import ModelError, find_similar, short
from pxcompress.models.checkpoint import SAVE_HINT
from pxcompress.types import ImageSize

FORMS = "a timm name, hf-hub:OWNER/NAME, local-dir:PATH, hf:FOLDER, package.module:factory or FILE.onnx"
_FETCHING = ("pretrained", "checkpoint_path", "cache_dir")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".tar")

Side = int | ImageSize | None
"""Size of an image in pixels: the side of a square, or height and width; None for the model's own."""


@dataclass(frozen=True)
class TimmSource:
    """A model as timm knows it: its architecture, and the configuration from a folder or repository, if any.

    `origin` is the name for which timm is asked for weights.
    """

    name: str
    origin: str
    config: Mapping[str, Any] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    holds_weights: bool = False


def timm_source(name: str) -> TimmSource:
    """Look up `name` in timm. Raises `ModelError` for an unknown name or unknown weights."""
    kind, colon, rest = name.partition(":")
    if colon and kind in ("local-dir", "hf-hub", "hf_hub") and rest:
        return _config_source(name, kind, rest)
    architecture, _, tag = name.partition(".")
    if name and not timm.is_model(architecture) and Path(name).expanduser().is_dir():
        raise ModelError(f"model {name!r} is a folder; give a model file in it, hf:{name} or local-dir:{name}")
    if colon or "/" in name:
        raise ModelError(f"model {name!r} is none of: {FORMS}")
    if not timm.is_model(architecture):
        close_names = find_similar(architecture, timm.list_models())
        hint = f"did you mean {' or '.join(close_names)}?" if close_names else f"expected {FORMS}"
        raise ModelError(f"unknown model {name!r}; {hint}")
    weight_names = get_arch_pretrained_cfgs(architecture)
    if tag and name not in weight_names:
        raise ModelError(f"unknown weights {tag!r} of model {architecture!r}; known: {', '.join(sorted(weight_names))}")
    return TimmSource(name, origin=name)


def _config_source(name: str, kind: str, place: str) -> TimmSource:
    """The source from the config.json of a folder or hub repository. Raises `ModelError`."""
    local = kind == "local-dir"
    folder = Path(place).expanduser()
    try:
        config, architecture, kwargs = (
            load_model_config_from_path(folder) if local else load_model_config_from_hf(place)
        )
    except OSError as error:
        reason = f"no config.json in {place!r}" if local else f"config.json could not be fetched: {short(error)}"
        raise ModelError(f"model {name!r}: {reason}; expected a folder or repository saved by timm") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ModelError(
            f"model {name!r}: config.json is not timm's ({short(repr(error))}); "
            "expected 'architecture', 'num_classes' and 'pretrained_cfg'"
        ) from error
    return replace(
        timm_source(str(architecture)),
        origin=f"local-dir:{folder}" if local else name,
        config=config,
        kwargs=dict(kwargs or {}),
        holds_weights=not local or any(file.suffix in _WEIGHT_SUFFIXES for file in folder.iterdir()),
    )


def fetch_model(name: str, source: TimmSource, kwargs: Mapping[str, Any]) -> nn.Module:
    """Create the model with the weights that timm finds for it. Raises `ModelError`."""
    try:
        return timm.create_model(source.origin, pretrained=True, **kwargs)
    except (OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        if "weights_only" in str(error) or isinstance(error, pickle.UnpicklingError):
            raise ModelError(f"weights of model {name!r} refused: would execute code; {SAVE_HINT}") from error
        failed_step = "fetched" if isinstance(error, OSError) else "loaded"
        remedy = "use --checkpoint FILE" if source.config else "use --checkpoint FILE or --model local-dir:PATH"
        raise ModelError(f"weights of model {name!r} could not be {failed_step}: {short(error)}; {remedy}") from error


def build_sized(source: TimmSource, classes: int | None, input_size: Side) -> tuple[nn.Module, dict[str, Any]]:
    """A model with random weights for images of `input_size`, if its architecture depends on that.

    Also returns the arguments with which `timm.create_model` builds the same architecture without `source.config`.
    """
    config = source.config or {}
    model_kwargs: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    size: Any = list(input_size) if isinstance(input_size, ImageSize) else input_size
    if size is None and config.get("fixed_input_size") and "img_size" not in source.kwargs:
        size = list(config["input_size"][-2:])
    if config and config.get("input_size", (3,))[0] != 3:
        model_kwargs["in_chans"] = config["input_size"][0]
    try:
        model = create(source, model_kwargs if size is None else {**model_kwargs, "img_size": size})
        model_kwargs |= {} if size is None else {"img_size": size}
    except ModelError as error:
        # Most convolutional networks have no such argument: they take any size.
        if not (isinstance(error.__cause__, TypeError) and "img_size" in str(error)):
            raise
        model = create(source, model_kwargs)
    return model, {**source.kwargs, **model_kwargs, "num_classes": int(model.num_classes)}  # type: ignore[arg-type]


def create(source: TimmSource, kwargs: Mapping[str, Any]) -> nn.Module:
    """A timm model with random weights. Raises `ModelError` for arguments that its architecture does not accept."""
    config = None if source.config is None else dict(source.config)
    arguments = {**source.kwargs, **kwargs}
    fetching_arguments = [key for key in _FETCHING if key in arguments]
    if fetching_arguments:  # arguments are read from files, as those of factories are
        raise ModelError(
            f"model {source.name!r} refused: argument {fetching_arguments[0]!r} would read weights; leave it out"
        )
    try:
        return timm.create_model(source.name, pretrained_cfg=config, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"model {source.name!r} cannot be built: {short(error)}") from error
