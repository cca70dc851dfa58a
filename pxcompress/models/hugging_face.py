"""Loads models of Hugging Face's transformers, `--model hf:FOLDER` or `hf:OWNER/NAME`, by their config.json.

Weights come from safetensors only, and no code of a folder is ever run. What a model returns is named as tasks expect
it: "logits" of classifiers, "out" of segmentations, "embedding" of encoders.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pxcompress.errors import ModelError, short
from pxcompress.models.signature import MASK
from pxcompress.models.tokens import IDS, KINDS, Tokenizer

PREFIX = "hf:"

MOST_TOKENS = 512
"""Most tokens of a text, also for models that would take more."""

_HEADS = {
    "ForSequenceClassification": "logits",
    "ForImageClassification": "logits",
    "ForSemanticSegmentation": "out",
    "ForObjectDetection": "boxes",
}
"""Ending of a model class's name -> what it returns; other classes count as encoders."""

_BOX_OUTPUTS = ("logits", "pred_boxes", "enc_topk_logits")
"""Names of a detector's outputs, as far as it has them; the last one distinguishes RT-DETR from DETR."""

_VISION_TOWERS = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}
"""Type of a model for images and texts -> class of its image encoder alone."""

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""Files of which a folder with a tokenizer has at least one; without any, transformers invents an empty vocabulary."""

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's number of an interpolation -> its name."""


class ImageModel(nn.Module):
    """A transformers model for images: pixels (n, channels, height, width) to the output of its head.

    `pixel_mask` (n, height, width), if given, is 1 where there is image and 0 where there is padding.
    """

    def __init__(self, net: nn.Module, head: str) -> None:
        super().__init__()
        self.net, self.head = net, head

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Logits or embeddings (n, k), or a dict of maps or boxes by name."""
        masks = {} if pixel_mask is None else {"pixel_mask": pixel_mask}
        outputs = self.net(pixel_values=pixel_values, **masks)
        if self.head == "logits":
            return outputs.logits
        if self.head == "out":
            return {"out": outputs.logits}
        if self.head == "boxes":
            return {name: outputs[name] for name in _BOX_OUTPUTS if outputs.get(name) is not None}
        for name in ("image_embeds", "pooler_output"):
            if (value := outputs.get(name)) is not None:
                return value.flatten(1)
        return outputs.last_hidden_state[:, 0]


class TextModel(nn.Module):
    """A transformers model for texts: token ids, mask and token types (n, length) to logits, or to the mean over
    tokens.
    """

    def __init__(self, net: nn.Module, head: str, *, unit: bool = False) -> None:
        super().__init__()
        self.net, self.head, self.unit = net, head, unit

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits (n, classes), or embeddings (n, features), scaled to length 1 if the model's folder says so."""
        kinds = {} if token_type_ids is None else {KINDS: token_type_ids}
        outputs = self.net(input_ids=input_ids, attention_mask=attention_mask, **kinds)
        if self.head == "logits":
            return outputs.logits
        counts = attention_mask[..., None].to(outputs.last_hidden_state)
        mean = (outputs.last_hidden_state * counts).sum(1) / counts.sum(1)
        return normalize(mean, dim=1) if self.unit else mean


@dataclass(frozen=True, eq=False)
class HuggingFaceModel:
    """A loaded module with its `pretrained_cfg` or `tokenizer`, the arguments to build it again, and notes about it."""

    model: nn.Module
    kwargs: Mapping[str, object]
    has_weights: bool
    notes: tuple[str, ...] = ()


def is_hugging_face(name: str) -> bool:
    """Whether a model's name starts with the prefix for Hugging Face models."""
    return name.startswith(PREFIX)


def gives_embeddings(model: nn.Module) -> bool:
    """Whether `model` is an encoder from Hugging Face, which returns an embedding for every sample."""
    return isinstance(model, ImageModel | TextModel) and model.head == "embedding"


def load_hugging_face(name: str, classes: int | None, *, pretrained: bool) -> HuggingFaceModel:
    """Load a model from a folder or repository, on the CPU; with random weights if it has none and none are needed.

    `classes` is the number of classes for a classifier without weights. Raises `ModelError`.
    """
    place = name.removeprefix(PREFIX)
    config = _read_config(name, place)
    class_name = _class_name(name, config)
    has_weights = pretrained or not Path(place).is_dir() or any(Path(place).glob("*.safetensors"))
    if not has_weights and classes:
        config.num_labels = classes
    pooling = _read_pooling(place)
    kwargs = {"config": config.to_dict(), "class": class_name, "unit": pooling.unit}
    if has_weights:
        net = _fetch(name, place, class_name)
        kwargs["config"] = net.config.to_dict()
        model = _wrap(net, class_name, unit=pooling.unit)
    else:
        model = build_hugging_face(kwargs)
    notes = [] if _is_for_images(model) or model.head == "logits" else [pooling.description]
    if _is_for_images(model):
        model.pretrained_cfg = _read_image_config(place, model.net.config)
    else:
        model.tokenizer = _read_tokenizer(name, place, model.net)
        model.pretrained_cfg = {"label_names": _labels(model.net.config)}
    return HuggingFaceModel(model, kwargs, has_weights, tuple(notes))


def build_hugging_face(kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a module with random weights from the `kwargs` of a `HuggingFaceModel`. Raises `ModelError`."""
    transformers = _library()
    try:
        config_values = dict(kwargs["config"])
        config = transformers.AutoConfig.for_model(config_values.pop("model_type"), **config_values)
        cls = find_class(kwargs["class"])
        net = cls(config, **without_pooler(cls))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"model of class {kwargs.get('class')!r} cannot be built: {short(error)}") from error
    return _wrap(net.eval(), kwargs["class"], unit=bool(kwargs["unit"]))


def _wrap(net: nn.Module, class_name: str, *, unit: bool) -> Any:
    head = next((head for end, head in _HEADS.items() if class_name.endswith(end)), "embedding")
    if net.main_input_name == "pixel_values":
        return ImageModel(net, head)
    if net.main_input_name != IDS:
        raise ModelError(f"{class_name} takes {net.main_input_name}; expected a model of images or texts")
    return TextModel(net, head, unit=unit)


def _is_for_images(model: nn.Module) -> bool:
    return isinstance(model, ImageModel)


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "models of Hugging Face need the package transformers: pip install 'pxcompress[hf]'"
        ) from error
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _read_config(name: str, place: str) -> Any:
    """The model's configuration, of a class that transformers has. Raises `ModelError`."""
    transformers = _library()
    try:
        config_values, _ = transformers.PretrainedConfig.get_config_dict(place)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {name!r}: no config.json could be read ({short(error)}); expected hf:FOLDER or hf:OWNER/NAME"
        ) from error
    kind = config_values.get("model_type")
    if kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        if config_values.get("auto_map"):
            raise ModelError(
                f"model {name!r} refused: its config.json needs code of its own ({kind!r}), and no code of a folder is "
                "run; import it yourself, and give package.module:factory"
            )
        raise ModelError(f"model {name!r} has the type {kind!r}, which transformers does not know; update it")
    try:
        return transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"model {name!r}: config.json is no configuration of {kind!r}: {short(error)}") from error


def _class_name(name: str, config: Any) -> str:
    """Name of the transformers class to use: the one with the head, else the encoder alone. Raises `ModelError`."""
    transformers = _library()
    declared = next(iter(config.architectures or ()), "")
    if config.model_type in _VISION_TOWERS:
        return _VISION_TOWERS[config.model_type]
    if declared.endswith(tuple(_HEADS)) or "VisionModel" in declared:
        if not hasattr(transformers, declared):
            raise ModelError(f"model {name!r} is a {declared}, which transformers does not have; update it")
        return declared
    try:
        return str(transformers.MODEL_MAPPING[type(config)].__name__)
    except (KeyError, AttributeError) as error:
        raise ModelError(f"model {name!r} of type {config.model_type!r} has no encoder in transformers") from error


def find_class(class_name: str) -> Any:
    """A model class of transformers, by name; any other object of it is refused. Raises `ModelError`."""
    transformers = _library()
    cls = getattr(transformers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ModelError(f"{class_name!r} is no class of models of transformers; update it")
    return cls


def without_pooler(cls: Any) -> dict[str, bool]:
    """Arguments that build a text encoder without a pooler, which would be unused: tokens are averaged here."""
    texts = cls.main_input_name == IDS and not cls.__name__.endswith(tuple(_HEADS))
    takes = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    return {"add_pooling_layer": False} if texts and takes else {}


def _fetch(name: str, place: str, class_name: str) -> Any:
    """The transformers model with all its weights. Raises `ModelError`."""
    cls = find_class(class_name)
    try:
        net, info = cls.from_pretrained(
            place,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **without_pooler(cls),
        )
    except Exception as error:  # the library raises what its many loaders raise
        raise ModelError(
            f"weights of model {name!r} could not be loaded: {short(error)}; expected model.safetensors beside "
            "config.json (no pickle is read)"
        ) from error
    wrong = sorted(map(str, [*info.get("missing_keys", ()), *info.get("mismatched_keys", ())]))
    if wrong:
        raise ModelError(
            f"weights of model {name!r} lack {len(wrong)} tensors of {class_name}, such as {wrong[0]}; give a folder "
            "with the whole model"
        )
    return net.eval()


@dataclass(frozen=True)
class _Pooling:
    """How a sentence encoder turns tokens into one vector; `unit` says that it is scaled to length 1."""

    unit: bool
    description: str


def _read_pooling(place: str) -> _Pooling:
    """The pooling in a sentence encoder's modules.json. Raises `ModelError` for anything other than the mean."""
    modules = _read_json(Path(place) / "modules.json") or ()
    for module in modules:
        if str(module.get("type", "")).endswith("Pooling"):
            modes = _read_json(Path(place) / module.get("path", "") / "config.json") or {}
            modes_on = [key for key, value in modes.items() if key.startswith("pooling_mode_") and value is True]
            if modes_on and modes_on != ["pooling_mode_mean_tokens"]:
                raise ModelError(
                    f"model 'hf:{place}' pools by {modes_on[0].removeprefix('pooling_mode_')}; expected the mean over "
                    "tokens: give package.module:factory"
                )
    unit = any(str(module.get("type", "")).endswith("Normalize") for module in modules)
    return _Pooling(unit, f"the embedding is the mean over tokens{', of length 1' if unit else ''}")


def _read_json(path: Path) -> Any:
    """The content of a JSON file; None if there is no such file. Raises `ModelError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else None
    except ValueError as error:
        raise ModelError(f"{str(path)!r} is no JSON ({short(error)}); mend it, or fetch the folder again") from error


def _labels(config: Any) -> tuple[str, ...]:
    """Names of the classes; empty if the configuration only numbers them."""
    names = [str(config.id2label[number]) for number in sorted(config.id2label or {})]
    return () if all(name.startswith("LABEL_") for name in names) else tuple(names)


def _read_image_config(place: str, config: Any) -> dict[str, Any]:
    """Size, mean, std and resizing of the images that the model takes, by timm's names for them."""
    image_config = _read_json(Path(place) / "preprocessor_config.json") or {}
    size, crop = image_config.get("size") or {}, image_config.get("crop_size") or {}
    sizes = {"height": size, "width": size} if isinstance(size, int) else dict(size)
    shown = crop if image_config.get("do_center_crop") and crop else sizes
    shown = {"height": shown, "width": shown} if isinstance(shown, int) else shown
    native = getattr(config, "image_size", None) or sizes.get("shortest_edge") or 224
    height, width = (
        ((native, native) if isinstance(native, int) else native)
        if "height" not in shown
        else (shown["height"], shown["width"])
    )
    shorter = sizes.get("shortest_edge", height)
    channels = getattr(config, "num_channels", 3)
    scaled = image_config.get("do_normalize", bool(image_config))
    return {
        "input_size": (channels, height, width),
        "mean": tuple(image_config["image_mean"]) if scaled and "image_mean" in image_config else (0.5,) * channels,
        "std": tuple(image_config["image_std"]) if scaled and "image_std" in image_config else (0.5,) * channels,
        "interpolation": _INTERPOLATIONS.get(image_config.get("resample", 2), "bilinear"),
        "crop_pct": min(1.0, height / shorter),
        "crop_mode": "squash" if "height" in sizes and shown is sizes else "center",
        "label_names": _labels(config),
    }


def _read_tokenizer(name: str, place: str, net: Any) -> Tokenizer:
    """The tokenizer of the folder, cut to the length that the model takes. Raises `ModelError` if there is none."""
    transformers = _library()
    folder = Path(place)
    if folder.is_dir() and not any((folder / file).is_file() for file in _VOCABULARIES):
        raise ModelError(f"model {name!r} has no tokenizer; expected tokenizer.json beside config.json")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        content = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # the library raises what its many readers raise
        raise ModelError(
            f"model {name!r} has no tokenizer that can be read ({short(error)}); expected tokenizer.json beside "
            "config.json"
        ) from error
    config = net.config
    positions = getattr(config, "max_position_embeddings", None) or MOST_TOKENS
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):  # which count from behind padding
        positions -= (config.pad_token_id or 0) + 1
    declared = (_read_json(Path(place) / "sentence_bert_config.json") or {}).get("max_seq_length") or MOST_TOKENS
    longest = min(MOST_TOKENS, positions, declared, int(tokenizer.model_max_length))
    takes = inspect.signature(type(net).forward).parameters
    kinds = KINDS in takes and (getattr(config, "type_vocab_size", 0) or 0) > 1
    names = (IDS, MASK, KINDS) if kinds else (IDS, MASK)
    return Tokenizer(content, names, longest, net.get_input_embeddings().num_embeddings)
