"""Reads weights that the user gives, never from a pickle that could run code, and loads them into a model.

A file may hold several sets of weights, each under a prefix of its own. One that covers the model is taken, averaged
weights (EMA, SWA) before raw ones, and what is left out is named.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pxcompress.errors import ModelError, describe, short, suggest_path

SAVE_HINT = "save a state_dict or safetensors"

_USUAL = ("", "state_dict", "model_state_dict", "model", "net", "module", "_orig_mod", "params", "weights")
"""Names that training scripts give to a set of weights or to a wrapper's only child, the most usual first."""
_AVERAGED = {"ema", "averaged", "average", "avg", "swa", "shadow"}
_BESIDE = _AVERAGED | {"criterion", "loss", "losses", "metric", "metrics", "optimizer", "scheduler", "teacher"}
"""First words of keys that do not belong to the model itself, such as "optimizer" in "optimizer.state"."""
_COUNTER = "num_batches_tracked"  # absent from files written before PyTorch 0.4.1, and harmless there
_PROFILER_BUFFERS = ("total_ops", "total_params")
"""Names of buffers that the profiler thop leaves in every module."""
_CLASS_NAMES = ("class_names", "classes", "class_to_idx", "idx_to_class", "label_names", "id2label", "label2id")
_DEPTH = 4


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a file: sets of weights by their place in it ("" for the file itself), and class names if it has
    any.
    """

    name: str
    sets: Mapping[str, Mapping[str, Tensor]]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Fit:
    """One set of weights from a file, renamed to the names in the model.

    `prefix` is what was removed from every key; `beside` are keys of the set that the model does not have; `own` are
    the model's tensors.
    """

    place: str
    prefix: str
    state: Mapping[str, Tensor]
    beside: tuple[str, ...]
    own: Mapping[str, Tensor]

    @cached_property
    def missing(self) -> list[str]:
        """Keys of the model that the set lacks."""
        return [key for key in self.own if key not in self.state and not key.endswith(_COUNTER)]

    @cached_property
    def same_shapes(self) -> bool:
        """Whether all tensors that it shares with the model have the model's shapes."""
        return all(value.shape == self.state[key].shape for key, value in self.own.items() if key in self.state)

    @property
    def averaged(self) -> bool:
        """Whether its name says that these weights are a moving average."""
        return bool(_words(f"{self.place}.{self.prefix}") & _AVERAGED)

    @property
    def label(self) -> str:
        """Name of the weights' place in the file, for messages."""
        return ".".join(filter(None, (self.place, self.prefix.rstrip(".")))) or "the file itself"

    @cached_property
    def rank(self) -> tuple[float, ...]:
        """How well the set fits, larger is better; the first entry is 1 if it has exactly the model's keys."""
        shared_keys = sum(key in self.state for key in self.own)
        names = [*self.place.split("."), *self.prefix.rstrip(".").split(".")]
        unusual_names = sum(name not in _USUAL for name in names)
        return (
            not self.missing and shared_keys == len(self.state),
            not self.missing,
            shared_keys if self.missing else 0,
            self.same_shapes,
            self.averaged,
            -unusual_names,
        )

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key between fits of equal `rank`: the usual name, the larger set, the shorter prefix."""
        first_word = self.place.split(".")[0]
        usual = _USUAL.index(first_word) if first_word in _USUAL else len(_USUAL)
        return (-usual, len(self.state), -len(self.prefix))


def read_checkpoint(path: Path) -> Checkpoint:
    """All tensors of a .safetensors file or of a PyTorch checkpoint, on the CPU.

    `ModelError` for a missing file, a file that is no checkpoint, and a pickle that would execute code.
    """
    if not path.is_file():
        kind = "is a folder; use --model local-dir:PATH" if path.is_dir() else "does not exist"
        raise ModelError(
            f"checkpoint {str(path)!r} {kind}; expected a .safetensors, .pth, .pt or .bin file{suggest_path(path)}"
        )
    content: Any
    try:
        content = _safe(path) if path.suffix == ".safetensors" else _unpickle(path)
    except pickle.UnpicklingError as error:
        _refuse(path, error)
    # Bytes that are no checkpoint make the readers fail in any way: KeyError, EOFError, RuntimeError, UnicodeError, ...
    except Exception as error:
        raise ModelError(
            f"{str(path)!r} is not a checkpoint, or not a whole one ({describe(error)}); copy it again, or {SAVE_HINT}"
        ) from error
    sets = dict(_sets(content, ()))
    if not sets:
        keys = [str(key) for key in content if key] if isinstance(content, Mapping) else [type(content).__name__]
        content_names = ", ".join(keys[:5]) or "nothing"
        raise ModelError(f"{str(path)!r} is not a checkpoint: it holds {content_names}, no weights; {SAVE_HINT}")
    return Checkpoint(str(path), sets, next(_named_classes(content, 0), ()))


def best_fit(checkpoint: Checkpoint, model: nn.Module) -> tuple[Fit, str]:
    """The best set of weights of `checkpoint` for `model`, and a note about the choice, "" if there was none.

    Raises `ModelError` where two sets fit equally well and differ.
    """
    model_state = model.state_dict()
    fits = sorted(_fits(checkpoint, model_state), key=lambda fit: (fit.rank, fit.order), reverse=True)
    best_of_fits, other_fits = fits[0], fits[1:]
    for other_fit in other_fits:
        unusual = best_of_fits.rank[-1] < 0 and not best_of_fits.averaged
        if (
            unusual
            and not best_of_fits.missing
            and other_fit.rank == best_of_fits.rank
            and not _equal(best_of_fits.state, other_fit.state)
        ):
            raise ModelError(
                f"checkpoint {checkpoint.name!r} holds several sets of weights that fit: {best_of_fits.label!r} and "
                f"{other_fit.label!r}; save the one that counts in a file of its own"
            )
    return best_of_fits, _describe_choice(checkpoint, best_of_fits, other_fits)


def load_state(model: nn.Module, state: Mapping[str, Tensor], heads: tuple[str, ...], label: str) -> None:
    """Load `state` into `model` in place. `heads` are its classifiers' names, `label` says what is loaded into what.

    `ModelError` says what differs: the class counts when it is only those, else how many keys and the first of them.
    """
    model_state = model.state_dict()
    _check_numbers(model_state, state, label)
    missing_keys = [key for key in model_state if key not in state and not key.endswith(_COUNTER)]
    unexpected_keys = sorted(key for key in state if key not in model_state)
    reshaped_keys = [key for key in model_state if key in state and model_state[key].shape != state[key].shape]
    if not (missing_keys or unexpected_keys or reshaped_keys):
        model.load_state_dict({**model_state, **state})
        return
    shapes = [f"{key} is {tuple(state[key].shape)}, not {tuple(model_state[key].shape)}" for key in reshaped_keys]
    differences = {"missing": missing_keys, "unexpected": unexpected_keys, "of another shape": shapes}
    parts = [f"{len(keys)} keys {kind} (first: {keys[0]})" for kind, keys in differences.items() if keys]
    classifiers = [f"{head}.{part}" for head in heads for part in ("weight", "bias")]
    head = next((key for key in classifiers if key in reshaped_keys), None)
    if head is not None:
        counts = f"it has {state[head].shape[0]} classes, expected {model_state[head].shape[0]} as in the data"
        only_classes_differ = not (missing_keys or unexpected_keys or set(reshaped_keys) - set(classifiers))
        parts = (
            [counts]
            if only_classes_differ
            else [*parts, *([counts] if len(state[head]) != len(model_state[head]) else [])]
        )
    hint = ": another architecture" if missing_keys and unexpected_keys else ""
    raise ModelError(f"{label} does not fit{hint}: {'; '.join(parts)}; give weights of this model trained on this data")


def _safe(path: Path) -> dict[str, Any]:
    """Tensors of a .safetensors file by name, and its metadata under the key ""."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = {key: _parse_names(value) for key, value in (file.metadata() or {}).items()}
    return {**safetensors.torch.load_file(path), "": metadata}


def _parse_names(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _check_numbers(model_state: Mapping[str, Tensor], state: Mapping[str, Tensor], label: str) -> None:
    """Raise `ModelError` for tensors without values, and for whole numbers (int8) where the model has floats."""
    for key in [key for key in model_state if key in state]:
        if state[key].is_meta or (model_state[key].is_floating_point() and not state[key].is_floating_point()):
            content = "no values (it is on the meta device)" if state[key].is_meta else f"type {state[key].dtype}"
            raise ModelError(f"{label}: {key} has {content}; expected floating-point weights: save the float model's")


def _unpickle(path: Path) -> Any:
    # timm's training script keeps its arguments, an argparse.Namespace, in every checkpoint.
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True)


def _sets(content: Any, place: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Mappings that contain tensors, at any depth, with the place of each."""
    if not isinstance(content, Mapping) or len(place) > _DEPTH:
        return
    # torch.optim.swa_utils.AveragedModel counts its updates in a tensor of its own.
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor) and key != "n_averaged"}
    if tensors:
        yield ".".join(place), tensors
    for key, value in content.items():
        yield from _sets(value, (*place, str(key)))


def _named_classes(content: Any, depth: int) -> Iterator[tuple[str, ...]]:
    """Class names in the order of the outputs, wherever in a file they are stored."""
    content = vars(content) if isinstance(content, argparse.Namespace) else content
    if not isinstance(content, Mapping) or depth > _DEPTH:
        return
    for key, value in content.items():
        if str(key).lower() in _CLASS_NAMES and (names := _in_order(value)):
            yield names
        yield from _named_classes(value, depth + 1)


def _in_order(value: Any) -> tuple[str, ...]:
    """Names from a list, a map name -> number or a map number -> name; empty for anything else."""
    if isinstance(value, Mapping):
        try:
            pairs = [(int(key), each) if isinstance(each, str) else (int(each), key) for key, each in value.items()]
        except (TypeError, ValueError):
            return ()
        numbers = sorted(number for number, _ in pairs)
        value = [name for _, name in sorted(pairs)] if numbers == list(range(len(pairs))) else ()
    is_list_of_names = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return tuple(value) if is_list_of_names and len(set(value)) == len(value) else ()


def _fits(checkpoint: Checkpoint, model_state: Mapping[str, Tensor]) -> Iterator[Fit]:
    """Every set of weights, under each prefix whose removal leaves keys of the model."""
    for place, tensors in checkpoint.sets.items():
        prefixes: Counter[str] = Counter()
        for key in tensors:
            parts = key.split(".")
            suffixes = (".".join(parts[start:]) for start in range(len(parts)))
            prefixes.update(key.removesuffix(suffix) for suffix in suffixes if suffix in model_state)
        for prefix in prefixes or [""]:
            extra_keys = [key for key in tensors if not key.startswith(prefix)]
            if not prefix:
                extra_keys = [key for key in tensors if key not in model_state and _words(key.split(".")[0]) & _BESIDE]
            extra_keys += [key for key in tensors if key.startswith(prefix) and key.endswith(_PROFILER_BUFFERS)]
            extra_key_set = set(extra_keys)
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key not in extra_key_set}
            yield Fit(place, prefix, state, tuple(extra_keys), model_state)


def _describe_choice(checkpoint: Checkpoint, best: Fit, other_fits: Sequence[Fit]) -> str:
    """One line on which weights were taken and which were left out; "" if there was no choice."""
    complete_fits = [other_fit for other_fit in other_fits if not other_fit.missing and other_fit.label != best.label]
    equal_labels = dict.fromkeys(
        other_fit.label for other_fit in complete_fits if other_fit.same_shapes == best.same_shapes
    )
    other_shaped_labels = dict.fromkeys(
        other_fit.label for other_fit in complete_fits if other_fit.label not in equal_labels
    )
    incomplete_averages = [
        other_fit
        for other_fit in other_fits
        if other_fit.averaged and other_fit.missing and len(other_fit.missing) < len(other_fit.own)
    ]
    parts = [f"{', '.join(map(repr, equal_labels))} fits as well and is not used"] if equal_labels else []
    parts += [f"{label!r} has other shapes and is not used" for label in other_shaped_labels]
    if extra_keys := [
        key
        for key in best.beside
        if not any(key.startswith(f"{label}.") for label in (*equal_labels, *other_shaped_labels))
    ]:
        tensors = "1 tensor beside it is" if len(extra_keys) == 1 else f"{len(extra_keys)} tensors beside it are"
        parts.append(f"{tensors} left out, such as {extra_keys[0]!r}")
    if incomplete_averages and not best.averaged:
        parts.append(
            f"the averaged {incomplete_averages[0].label!r} lacks {len(incomplete_averages[0].missing)} of the "
            "model's tensors"
        )
    kind = ", averaged" if best.averaged else ""
    if not parts and not best.averaged:
        return ""
    return "; ".join([f"checkpoint {checkpoint.name!r}: weights are {best.label!r}{kind}", *parts])


def _equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _refuse(path: Path, error: pickle.UnpicklingError) -> NoReturn:
    """Raise `ModelError`, which says whether the file contains code or is no checkpoint at all."""
    blocked_global = re.search(r"GLOBAL (\S+)|reduce for unrecognized function (\S.*)", str(error))
    if blocked_global:
        culprit = short(next(group for group in blocked_global.groups() if group))
        raise ModelError(f"{str(path)!r} refused: would execute code ({culprit}); {SAVE_HINT}") from error
    raise ModelError(f"{str(path)!r} is not a checkpoint: not a PyTorch file; {SAVE_HINT}") from error
