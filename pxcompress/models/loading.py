"""Loads a dense model: a timm name, a hub repository, a local folder, an ONNX file, or a user's own function.

    resnet50, resnet50.a1_in1k      any timm model
    hf-hub:OWNER/NAME               a timm repository on the Hugging Face hub, with its weights
    local-dir:PATH                  a folder with timm's config.json, and its weights where it holds some
    package.module:factory          a callable that returns an nn.Module; the current directory is on the import path
    hf:FOLDER, hf:OWNER/NAME        a model of Hugging Face's transformers, with its weights
    PATH.onnx                       an ONNX file, with its weights

No pickle that could run code is ever opened.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pxcompress.errors import ModelError, NoClassifierError, short
from pxcompress.models.adapter import all_outputs, with_packed_inputs
from pxcompress.models.checkpoint import Fit, best_fit, load_state, read_checkpoint
from pxcompress.models.class_names import are_output_numbers, are_wordnet_ids, imagenet_classes, is_part
from pxcompress.models.factories import call_factory, find_factory
from pxcompress.models.hugging_face import build_hugging_face, gives_embeddings, is_hugging_face, load_hugging_face
from pxcompress.models.inputs import blank_inputs, check_takes, config_of, preprocessing_of
from pxcompress.models.onnx_file import AUTO, is_onnx, load_onnx, rebuild_onnx, sizes_of
from pxcompress.models.rebuilding import check_rebuilds
from pxcompress.models.rewrite import rewrite_plain, unwrap
from pxcompress.models.suited import check_runs, check_suited, count_classes
from pxcompress.models.timm_models import Side, TimmSource, build_sized, create, fetch_model, timm_source
from pxcompress.state import best_device, device_of, evaluating
from pxcompress.types import ImageSize, Input, Preprocessing

Weights = Literal["checkpoint", "pretrained", "factory", "untrained", "trained-here", "file", "module"]

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_PATH = re.compile(r"(?!local-dir:|hf-hub:|hf:)(.+)\.py:(.+)")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build the dense module again without its weights: JSON, no pickle.

    `name` is a timm name, "package.module:factory", "hf:FOLDER" or an ONNX file; `kwargs` are what the builder is
    given: of a model of Hugging Face's its whole configuration, so that the folder need not be there. For a module that
    the user passed `in_python`, `name` is its class, and `build` is impossible.
    """

    name: str
    kwargs: Mapping[str, object] = field(default_factory=dict)
    in_python: bool = False

    @property
    def is_file(self) -> bool:
        """Whether the model is an ONNX file, whose graph is the architecture."""
        return is_onnx(self.name)

    def build(self) -> nn.Module:
        """A new module on the CPU; its initial weights come from PyTorch's global generator. Raises `ModelError`."""
        if self.in_python:
            raise ModelError(
                f"the model was a {self.name} given in Python; give one like it: pxcompress.load(folder, model)"
            )
        if self.is_file:
            return rebuild_onnx(self.name, self.kwargs)
        if is_hugging_face(self.name):
            return build_hugging_face(self.kwargs)
        if _FACTORY.fullmatch(self.name):
            return call_factory(self.name, self.kwargs)
        return create(timm_source(self.name), self.kwargs)

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads."""
        record = {"name": self.name, "kwargs": dict(self.kwargs)} | ({"in_python": True} if self.in_python else {})
        return json.dumps(record, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """The architecture that `to_json` wrote; `ModelError` for other text."""
        try:
            record = json.loads(text)
            return cls(str(record["name"]), dict(record["kwargs"]), bool(record.get("in_python", False)))
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"not an architecture: {short(text)!r}; expected JSON with 'name' and 'kwargs'") from error


@dataclass(frozen=True, eq=False)
class LoadedModel:
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


_PENDING = Preprocessing(())
"""Placeholder until it is known how the model's inputs are made."""


def load_model(  # noqa: PLR0913  (one door for all models)
    name: str,
    *,
    classes: int | None,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    input_size: int | ImageSize | tuple[int, ...] | None = None,
    device: torch.device | str | None = None,
    classifier: bool = True,
    inputs: tuple[Input, ...] = (),
    data_classes: Sequence[str] = (),
    layout: str = AUTO,
    noun: str = "",
) -> LoadedModel:
    """Load the model `name` for scoring: in eval mode, on `device` (default: the best available), in plain layers.

    Weights: `checkpoint` if given; else the model's own when `pretrained` is set or `name` is a folder or repository
    that holds some; else random ones, drawn from PyTorch's global generator (`state.seeded` makes them repeatable).
    With `pretrained` a factory's weights are taken as it made them.
    `classes` is the data's class count, None for the model's own. If `classifier` is false the model may return
    anything, and `classes` is only passed on to the function that builds it. `input_size` is in pixels (a side, or
    height and width), or the shape of an input that is no image; `inputs` are several that the data have, packed in
    that shape; `noun` says what samples are, such as "images"; `layout` where an ONNX file has the channels of images.
    If `data_classes`, the data's class names, are a part of those that the weights name, the model keeps all classes.
    Raises `ModelError` when the model cannot be found, built or run, or does not have `classes` classes.
    """
    if isinstance(input_size, int) and input_size < 1:
        raise ModelError(f"input size is {input_size}; expected a positive number of pixels")
    _check_names_no_script(name)
    request = _Request(name, classes, checkpoint, pretrained, input_size, inputs, data_classes)
    if layout != AUTO and not is_onnx(name):
        raise ModelError(f"layout {layout!r} is given, but model {name!r} is no ONNX file; leave it out")
    loaded = _load_file(request, layout) if is_onnx(name) else _load_built(request)
    check_takes(loaded.preprocessing, name, noun)
    model = loaded.model.to(device or best_device()).eval()
    if not classifier:
        check_runs(model, loaded.preprocessing, name)
        return replace(loaded, model=model, class_names=())
    count, names = _class_names(replace(loaded, model=model), name, classes, data_classes)
    return replace(loaded, model=model, classes=count, class_names=names)


def _class_names(
    loaded: LoadedModel, name: str, classes: int | None, data_classes: Sequence[str]
) -> tuple[int, tuple[str, ...]]:
    """Number and names of a classifier's classes. Raises `ModelError` if the data have other classes."""
    model, preprocessing = loaded.model, loaded.preprocessing
    count = count_classes(model, preprocessing, name)
    if gives_embeddings(model) or not classifier_names(model, blank_inputs(preprocessing).to(device_of(model))):
        raise NoClassifierError(
            f"model {name!r} has no classifier, only features; give --task embedding, or a classifier"
        )
    labels = loaded.class_names or config_of(model).get("label_names") or imagenet_classes(count, data_classes)
    names = tuple(str(label) for label in labels) if len(labels) == count else ()
    fits = is_part(data_classes, names) if names else are_output_numbers(data_classes, count)
    if classes is not None and count != classes and not fits:
        raise ModelError(
            f"model {name!r} has {count} classes, the data has {classes}; let the model have {classes}, or give "
            "--task embedding or --task agreement"
        )
    return count, names


def _check_names_no_script(name: str) -> None:
    """Raise `ModelError` for "folder/nets.py:factory", with advice on how to name the module instead."""
    if path := _PATH.fullmatch(name):
        module = path[1].strip("./").replace("/", ".")
        raise ModelError(
            f"model {name!r} names a file; expected a module: --model {module}:{path[2]}, from the folder where "
            f"`import {module}` works"
        )


@dataclass(frozen=True)
class _Request:
    """What the user asks for; the fields are arguments of `load_model`."""

    name: str
    classes: int | None
    checkpoint: Path | None
    pretrained: bool
    input_size: int | ImageSize | tuple[int, ...] | None
    inputs: tuple[Input, ...]
    data_classes: Sequence[str]

    @property
    def side(self) -> Side:
        """`input_size` if it is the size of an image, else None."""
        return self.input_size if isinstance(self.input_size, int | ImageSize) else None


def _load_file(request: _Request, layout: str) -> LoadedModel:
    """Load an ONNX file; `layout` says where its images have their channels."""
    module, notes = load_onnx(request.name, request.checkpoint, request.input_size, request.inputs, layout)
    kwargs = {"layout": "" if layout == AUTO else layout, "sizes": sizes_of(module)}
    architecture = Architecture(request.name, {key: value for key, value in kwargs.items() if value})
    preprocessing = preprocessing_of(module, None if request.side else request.input_size, request.inputs)
    return LoadedModel(module, architecture, preprocessing, "file", 0, (), notes)


def _load_built(request: _Request) -> LoadedModel:
    """Build a model with its weights, in plain layers (see `rewrite_plain`); its classes are not counted yet."""
    name = request.name
    if is_hugging_face(name):
        return _load_hugging_face(request)
    weights_file = None if request.checkpoint is None else read_checkpoint(request.checkpoint)
    source = None if _FACTORY.fullmatch(name) else timm_source(name)
    labels = tuple((weights_file and weights_file.class_names) or ())
    if is_part(request.data_classes, labels):
        request = replace(request, classes=len(labels))
    elif source is not None and are_wordnet_ids(request.data_classes):
        request = replace(request, classes=None)  # as many as the weights have
    with_own_weights = weights_file is None and (request.pretrained or (source is not None and source.holds_weights))
    model, architecture = _build(name, source, request.classes, request.side, with_own_weights)
    notes: tuple[str, ...] = ()
    if weights_file is not None:
        fit, choice = best_fit(weights_file, model)
        if request.classes is None and (width := _head_width(model, fit)) is not None:
            model, architecture = _build(name, source, width, request.side, with_own_weights)
        label = f"checkpoint {str(request.checkpoint)!r} of model {name!r}"
        example = blank_inputs(preprocessing_of(model, request.input_size, request.inputs))
        view = with_packed_inputs(model, request.inputs, example.shape[1:]) if request.inputs else model
        load_state(model, fit.state, classifier_names(view, example), label)
        notes = (choice,) if choice else ()
    weights = _weights(weights_file, source, with_own_weights)
    return _make_request_plain(LoadedModel(model, architecture, _PENDING, weights, 0, labels, notes), request)


def _load_hugging_face(request: _Request) -> LoadedModel:
    """Load a model from Hugging Face, with a result like that of `_load_built`. Raises `ModelError`."""
    if request.checkpoint is not None:
        raise ModelError(f"checkpoint {str(request.checkpoint)!r} is given, but {request.name!r} holds its own weights")
    opened = load_hugging_face(request.name, request.classes, pretrained=request.pretrained)
    weights: Weights = "pretrained" if opened.has_weights else "untrained"
    architecture = Architecture(request.name, opened.kwargs)
    return _make_request_plain(LoadedModel(opened.model, architecture, _PENDING, weights, 0, (), opened.notes), request)


def _make_request_plain(loaded: LoadedModel, request: _Request) -> LoadedModel:
    """`loaded` rewritten in plain layers that take one tensor, with its preprocessing. Raises `ModelError`."""
    model = loaded.model
    check_suited(model)
    preprocessing = preprocessing_of(model, request.input_size, request.inputs)
    if _FACTORY.fullmatch(loaded.architecture.name) and not preprocessing.inputs:
        check_rebuilds(model, loaded.architecture, preprocessing.input_size)
    model = make_plain(model, preprocessing)
    return replace(loaded, model=model, preprocessing=preprocessing)


def make_plain(model: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    """`model` with every layer in a form from which units can be removed, see `rewrite_plain`.

    It takes one tensor (n, ...) in which its inputs are packed.

    Raises `ModelError`.
    """
    blank = blank_inputs(preprocessing)
    model = unwrap(model)
    if preprocessing.inputs:
        model = with_packed_inputs(model, preprocessing.inputs, preprocessing.input_size)
    return rewrite_plain(model, lambda twin: all_outputs(twin, blank))


def _weights(file: Any, source: TimmSource | None, has_own_weights: bool) -> Weights:
    """A word for where the weights come from, such as "checkpoint" or "pretrained"."""
    if file is not None:
        return "checkpoint"
    if not has_own_weights:
        return "untrained"
    return "factory" if source is None else "pretrained"


def classifier_names(model: nn.Module, example: Tensor | None = None) -> tuple[str, ...]:
    """Names of the layers that compute the class scores, whose outputs must therefore stay.

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
    """Number of classes of the classifier in a checkpoint; None if it has no classifier of the model."""
    keys = (f"{head}.weight" for head in classifier_names(model))
    widths = (fit.state[key].shape[0] for key in keys if key in fit.state)
    return next(widths, None)


def _build(
    name: str, source: TimmSource | None, classes: int | None, input_size: Side, with_own_weights: bool
) -> tuple[nn.Module, Architecture]:
    """The module, and how to build it again; a timm model has random weights unless `with_own_weights`."""
    if source is None:
        architecture = _factory_architecture(name, classes, input_size)
        return architecture.build(), architecture
    model, kwargs = build_sized(source, None if with_own_weights else classes, input_size)
    if with_own_weights and classes not in (None, kwargs["num_classes"]):
        raise ModelError(
            f"weights of model {name!r} have {kwargs['num_classes']} classes, the data has {classes}; "
            f"give --checkpoint with weights trained on this data, or data with those classes"
        )
    return (fetch_model(name, source, kwargs) if with_own_weights else model), Architecture(source.name, kwargs)


def _factory_architecture(name: str, classes: int | None, input_size: Side) -> Architecture:
    """The architecture for a user's function, which gets the class count and input size if it accepts them."""
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
        example = blank_inputs(preprocessing_of(model)).to(device_of(model))
    executed_names: list[str] = []
    with evaluating(model), torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, _LAYERS):
                module.register_forward_hook(lambda *_, name=name: executed_names.append(name))
        model(example)
    return tuple(executed_names[-1:])
