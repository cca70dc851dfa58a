"""Load a dense model: a timm name, a hub repository, a local folder, or a Python callable of the user's.

    resnet50, resnet50.a1_in1k      any timm model
    hf-hub:OWNER/NAME               a timm repository on the Hugging Face hub, with its weights
    local-dir:PATH                  a folder with timm's config.json, and its weights where it holds some
    package.module:factory          a callable that returns an nn.Module; the current directory is on the import path
    PATH.onnx                       an ONNX file, with its weights

No pickle that could run code is ever opened.
"""

from __future__ import annotations

import difflib
import inspect
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import Tensor, nn

from pxcompress.errors import ModelError, NoClassifierError, short
from pxcompress.models.checkpoint import SAVE_HINT, Fit, best_fit, load_state, read_checkpoint
from pxcompress.models.factories import call_factory, find_factory
from pxcompress.models.inputs import config_of, preprocessing_of
from pxcompress.models.onnx_file import is_onnx, load_onnx
from pxcompress.models.rebuilding import check_rebuilds
from pxcompress.models.rewrite import rewrite_plain, unwrap
from pxcompress.models.suited import check_runs, check_suited, count_classes
from pxcompress.onnx_in import read_file
from pxcompress.state import best_device, device_of, evaluating
from pxcompress.types import ImageSize, Preprocessing

Weights = Literal["checkpoint", "pretrained", "factory", "untrained", "trained-here", "file", "module"]

_FORMS = "a timm name, hf-hub:OWNER/NAME, local-dir:PATH, package.module:factory or FILE.onnx"
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_PATH = re.compile(r"(?!local-dir:|hf-hub:)(.+)\.py:(.+)")
_FETCHING = ("pretrained", "checkpoint_path", "cache_dir")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".tar")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


Side = int | ImageSize | None
"""Size of an image in pixels: the side of a square, or height and width; None for the model's own."""


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build the dense module again without its weights: JSON, no pickle.

    `name` is a timm name, "package.module:factory" or an ONNX file; `kwargs` are what the builder is given. Of a module
    that was given `in_python` it is the class, which nothing here can build.
    """

    name: str
    kwargs: Mapping[str, object] = field(default_factory=dict)
    in_python: bool = False

    @property
    def is_file(self) -> bool:
        """Whether it is an ONNX file, whose graph is the architecture."""
        return is_onnx(self.name)

    def build(self) -> nn.Module:
        """A new module on the CPU; its initial weights come from PyTorch's global generator. Raises `ModelError`."""
        if self.in_python:
            raise ModelError(
                f"the model was a {self.name} given in Python; give one like it: pxcompress.load(folder, model)"
            )
        if self.is_file:
            return read_file(self.name)
        if _FACTORY.fullmatch(self.name):
            return call_factory(self.name, self.kwargs)
        return _create(_timm_source(self.name), self.kwargs)

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """The architecture that `to_json` wrote; `ModelError` for other text."""
        try:
            record = json.loads(text)
            return cls(str(record["name"]), dict(record["kwargs"]), bool(record.get("in_python", False)))
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"not an architecture: {short(text)!r}; expected JSON with 'name' and 'kwargs'") from error


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in eval mode, how to build it again, and where its weights come from.

    `weights` "untrained" means random: the caller trains a baseline. `class_names` is empty where nothing names them.
    `notes` say which weights of a checkpoint were taken, where it holds several.
    """

    model: nn.Module
    architecture: Architecture
    preprocessing: Preprocessing
    weights: Weights
    classes: int
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """Where a timm name leads: an architecture, and what a folder or repository says about it.

    `origin` is what timm is asked for the weights.
    """

    name: str
    origin: str
    config: Mapping[str, Any] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    holds_weights: bool = False


def load_model(  # noqa: PLR0913  (one door for all models)
    name: str,
    *,
    classes: int | None,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    input_size: int | ImageSize | tuple[int, ...] | None = None,
    device: torch.device | str | None = None,
    classifier: bool = True,
) -> Loaded:
    """The model `name`, ready to be scored: eval mode, on `device` (default: the best there is), in plain layers.

    Weights: `checkpoint` if given; else the model's own when `pretrained` is set or `name` is a folder or repository
    that holds some; else random ones, drawn from PyTorch's global generator (`state.seeded` makes them repeatable).
    With `pretrained` a factory's weights are taken as it made them.
    `classes` is the data's class count, None for the model's own; without `classifier` it is how many outputs a builder
    is asked for, and the model may return anything. `input_size` is in pixels (a side, or height and width), or
    the shape of an input that is no image.
    Raises `ModelError` when the model cannot be found, built or run, or does not have `classes` classes.
    """
    side = input_size if isinstance(input_size, int | ImageSize) else None
    if isinstance(side, int) and side < 1:
        raise ModelError(f"input size is {side}; expected a positive number of pixels")
    if path := _PATH.fullmatch(name):
        module = path[1].strip("./").replace("/", ".")
        raise ModelError(
            f"model {name!r} names a file; expected a module: --model {module}:{path[2]}, from the folder where "
            f"`import {module}` works"
        )
    if is_onnx(name):
        module, notes = load_onnx(name, checkpoint, input_size)
        loaded = Loaded(module, Architecture(name), preprocessing_of(module), "file", 0, (), notes)
    else:
        loaded = _load_built(name, classes, checkpoint, pretrained, input_size)
    model = loaded.model.to(device or best_device()).eval()
    if not classifier:
        check_runs(model, loaded.preprocessing, name)
        return replace(loaded, model=model, class_names=())
    count = count_classes(model, loaded.preprocessing, name)
    if not classifier_names(model, torch.zeros(1, *loaded.preprocessing.input_size, device=device_of(model))):
        raise NoClassifierError(
            f"model {name!r} has no classifier, only features; give --task embedding, or a classifier"
        )
    if classes is not None and count != classes:
        raise ModelError(
            f"model {name!r} has {count} classes, the data has {classes}; let the model have {classes}, or give "
            "--task embedding or --task agreement"
        )
    labels = loaded.class_names or config_of(model).get("label_names") or ()
    names = tuple(str(label) for label in labels) if len(labels) == count else ()
    return replace(loaded, model=model, classes=count, class_names=names)


def _load_built(
    name: str,
    classes: int | None,
    checkpoint: Path | None,
    pretrained: bool,
    input_size: int | ImageSize | tuple[int, ...] | None,
) -> Loaded:
    """A model that is built, in plain layers, and what its weights file calls its classes; they are not counted yet."""
    side = input_size if isinstance(input_size, int | ImageSize) else None
    weights_file = None if checkpoint is None else read_checkpoint(checkpoint)
    source = None if _FACTORY.fullmatch(name) else _timm_source(name)
    with_own_weights = weights_file is None and (pretrained or (source is not None and source.holds_weights))
    model, architecture = _build(name, source, classes, side, with_own_weights)
    notes: tuple[str, ...] = ()
    if weights_file is not None:
        fit, choice = best_fit(weights_file, model)
        if classes is None and (width := _head_width(model, fit)) is not None:
            model, architecture = _build(name, source, width, side, with_own_weights)
        label = f"checkpoint {str(checkpoint)!r} of model {name!r}"
        shape = None if isinstance(input_size, int | ImageSize) else input_size
        example = None if shape is None else torch.zeros(1, *shape)
        load_state(model, fit.state, classifier_names(model, example), label)
        notes = (choice,) if choice else ()
    check_suited(model)
    preprocessing = preprocessing_of(model, input_size)
    if source is None:
        check_rebuilds(model, architecture, preprocessing.input_size)
    zeros = torch.zeros(1, *preprocessing.input_size)
    model = rewrite_plain(unwrap(model), lambda twin: twin(zeros))
    labels = tuple((weights_file and weights_file.class_names) or ())
    weights = _weights(weights_file, source, with_own_weights)
    return Loaded(model, architecture, preprocessing, weights, 0, labels, notes)


def _weights(file: Any, source: _Source | None, has_own_weights: bool) -> Weights:
    """Where the weights come from."""
    if file is not None:
        return "checkpoint"
    if not has_own_weights:
        return "untrained"
    return "factory" if source is None else "pretrained"


def classifier_names(model: nn.Module, example: Tensor | None = None) -> tuple[str, ...]:
    """Names of the layers whose outputs are the class scores, and therefore stay whole.

    timm models name theirs (several for a distilled DeiT). For any other module it is the Linear or convolution that
    runs last on `example` (default: zeros of the model's input size). Empty for a model without a classifier.
    """
    names = {module: name for name, module in model.named_modules()}
    get_classifier = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return _last_executed(model, example)
    declared_names = config_of(model).get("classifier") or ()
    declared_names = (declared_names,) if isinstance(declared_names, str) else declared_names
    heads = [module for module, name in names.items() if name in declared_names]
    if not heads:
        classifier = get_classifier()
        heads = list(classifier) if isinstance(classifier, tuple | list) else [classifier]
    layers = [[layer for layer in head.modules() if isinstance(layer, _LAYERS)] for head in heads]
    return tuple(names[head_layers[-1]] for head_layers in layers if head_layers)


def _head_width(model: nn.Module, fit: Fit) -> int | None:
    """Classes of the classifier in a checkpoint; None where it has none of the model's."""
    keys = (f"{head}.weight" for head in classifier_names(model))
    widths = (fit.state[key].shape[0] for key in keys if key in fit.state)
    return next(widths, None)


def _build(
    name: str, source: _Source | None, classes: int | None, input_size: Side, with_own_weights: bool
) -> tuple[nn.Module, Architecture]:
    """The module and how to build it again; a timm model has its own weights and head if `own`, else random ones."""
    if source is None:
        architecture = _factory_architecture(name, classes, input_size)
        return architecture.build(), architecture
    model, kwargs = _sized(source, None if with_own_weights else classes, input_size)
    if with_own_weights and classes not in (None, kwargs["num_classes"]):
        raise ModelError(
            f"weights of model {name!r} have {kwargs['num_classes']} classes, the data has {classes}; "
            f"give --checkpoint with weights trained on this data, or data with those classes"
        )
    return (_fetched(name, source, kwargs) if with_own_weights else model), Architecture(source.name, kwargs)


def _fetched(name: str, source: _Source, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model with the weights that timm finds for it."""
    try:
        return timm.create_model(source.origin, pretrained=True, **kwargs)
    except (OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        if "weights_only" in str(error) or isinstance(error, pickle.UnpicklingError):
            raise ModelError(f"weights of model {name!r} refused: would execute code; {SAVE_HINT}") from error
        failed_step = "fetched" if isinstance(error, OSError) else "loaded"
        remedy = "use --checkpoint FILE" if source.config else "use --checkpoint FILE or --model local-dir:PATH"
        raise ModelError(f"weights of model {name!r} could not be {failed_step}: {short(error)}; {remedy}") from error


def _sized(source: _Source, classes: int | None, input_size: Side) -> tuple[nn.Module, dict[str, Any]]:
    """An empty model and the arguments that build it again without the folder's configuration."""
    config = source.config or {}
    model_kwargs: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    size: Any = list(input_size) if isinstance(input_size, ImageSize) else input_size
    if size is None and config.get("fixed_input_size") and "img_size" not in source.kwargs:
        size = list(config["input_size"][-2:])
    if config and config.get("input_size", (3,))[0] != 3:
        model_kwargs["in_chans"] = config["input_size"][0]
    try:
        model = _create(source, model_kwargs if size is None else {**model_kwargs, "img_size": size})
        model_kwargs |= {} if size is None else {"img_size": size}
    except ModelError as error:
        # Most convolutional networks have no such argument: they take any size.
        if not (isinstance(error.__cause__, TypeError) and "img_size" in str(error)):
            raise
        model = _create(source, model_kwargs)
    return model, {**source.kwargs, **model_kwargs, "num_classes": int(model.num_classes)}  # type: ignore[arg-type]


def _create(source: _Source, kwargs: Mapping[str, Any]) -> nn.Module:
    """An empty timm model; `ModelError` for arguments that its architecture does not take."""
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


def _timm_source(name: str) -> _Source:
    """What `name` means to timm; `ModelError` for a name it does not know."""
    kind, colon, location = name.partition(":")
    if colon and kind in ("local-dir", "hf-hub", "hf_hub") and location:
        return _config_source(name, kind, location)
    if colon or "/" in name:
        raise ModelError(f"model {name!r} is none of: {_FORMS}")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close_names = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close_names)}?" if close_names else f"expected {_FORMS}"
        raise ModelError(f"unknown model {name!r}; {hint}")
    weight_names = get_arch_pretrained_cfgs(architecture)
    if tag and name not in weight_names:
        raise ModelError(f"unknown weights {tag!r} of model {architecture!r}; known: {', '.join(sorted(weight_names))}")
    return _Source(name, origin=name)


def _config_source(name: str, kind: str, place: str) -> _Source:
    """What the config.json of a folder or hub repository says."""
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
        _timm_source(str(architecture)),
        origin=f"local-dir:{folder}" if local else name,
        config=config,
        kwargs=dict(kwargs or {}),
        holds_weights=not local or any(file.suffix in _WEIGHT_SUFFIXES for file in folder.iterdir()),
    )


def _factory_architecture(name: str, classes: int | None, input_size: Side) -> Architecture:
    """A user's callable, given the class count and the input size where it takes them."""
    factory = find_factory(name)
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        parameters = {}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    kwargs: dict[str, object] = {}
    if classes is not None and ("num_classes" in parameters or takes_any):
        kwargs["num_classes"] = classes
    if isinstance(input_size, int) and "img_size" in parameters:
        kwargs["img_size"] = input_size
    return Architecture(name, kwargs)


def _last_executed(model: nn.Module, example: Tensor | None) -> tuple[str, ...]:
    if example is None:
        example = torch.zeros(1, *preprocessing_of(model).input_size, device=device_of(model))
    executed_names: list[str] = []
    with evaluating(model), torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, _LAYERS):
                module.register_forward_hook(lambda *_, name=name: executed_names.append(name))
        model(example)
    return tuple(executed_names[-1:])
