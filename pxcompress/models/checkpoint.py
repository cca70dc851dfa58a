"""Read weights that the user gives, without ever opening a pickle that could run code, and put them into a model."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor, nn

from pxcompress.errors import ModelError, short

SAVE_HINT = "save a state_dict or safetensors"

_NESTINGS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
_COUNTER = "num_batches_tracked"  # absent from files written before PyTorch 0.4.1, and harmless there


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a PyTorch checkpoint, by key, on the CPU.

    Usual nestings ("state_dict", "model", "model_ema", ...) are unwrapped, averaged weights first. `ModelError` for a
    missing file, a file that is no checkpoint, and a pickle that would execute code.
    """
    if not path.is_file():
        kind = "is a folder; use --model local-dir:PATH" if path.is_dir() else "does not exist"
        raise ModelError(f"checkpoint {str(path)!r} {kind}; expected a .safetensors, .pth, .pt or .bin file")
    content: Any
    try:
        content = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except pickle.UnpicklingError as error:
        _refuse(path, error)
    # Bytes that are no checkpoint make the readers fail in any way: KeyError, EOFError, RuntimeError, UnicodeError, ...
    except Exception as error:
        raise ModelError(f"{str(path)!r} is not a checkpoint: {short(repr(error))}; {SAVE_HINT}") from error
    content = _unwrapped(content)
    # torch.optim.swa_utils.AveragedModel counts its updates in a tensor of its own.
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor) and key != "n_averaged"}
    if not state:
        held = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise ModelError(f"{str(path)!r} is not a checkpoint: it holds {held}, no weights; {SAVE_HINT}")
    return state


def fitted(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`state` without the prefix that a wrapper put before every key, when no key fits as it is."""
    own, keys = set(model.state_dict()), dict(state)
    for prefix in _PREFIXES * 2:
        if not own & set(keys) and all(key.startswith(prefix) for key in keys):
            keys = {key.removeprefix(prefix): value for key, value in keys.items()}
    return keys


def load_state(model: nn.Module, state: Mapping[str, Tensor], heads: tuple[str, ...], label: str) -> None:
    """Load `state` into `model` in place. `heads` are its classifiers' names, `label` says what is loaded into what.

    `ModelError` says what differs: the class counts when it is only those, else how many keys and the first of them.
    """
    own = model.state_dict()
    _check_numbers(own, state, label)
    missing = [key for key in own if key not in state and not key.endswith(_COUNTER)]
    unexpected = sorted(key for key in state if key not in own)
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    if not (missing or unexpected or reshaped):
        model.load_state_dict({**own, **state})
        return
    shapes = [f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}" for key in reshaped]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    parts = [f"{len(keys)} keys {kind} (first: {keys[0]})" for kind, keys in found.items() if keys]
    classifiers = [f"{head}.{part}" for head in heads for part in ("weight", "bias")]
    head = next((key for key in classifiers if key in reshaped), None)
    if head is not None:
        counts = f"it has {state[head].shape[0]} classes, expected {own[head].shape[0]} as in the data"
        alone = not (missing or unexpected or set(reshaped) - set(classifiers))
        parts = [counts] if alone else [*parts, *([counts] if len(state[head]) != len(own[head]) else [])]
    other = ": another architecture" if missing and unexpected else ""
    raise ModelError(
        f"{label} does not fit{other}: {'; '.join(parts)}; give weights of this model trained on this data"
    )


def _check_numbers(own: Mapping[str, Tensor], state: Mapping[str, Tensor], label: str) -> None:
    """Refuse tensors without values, and whole numbers (int8) where the model has others."""
    for key in [key for key in own if key in state]:
        if state[key].is_meta or (own[key].is_floating_point() and not state[key].is_floating_point()):
            held = "no values (it is on the meta device)" if state[key].is_meta else f"type {state[key].dtype}"
            raise ModelError(f"{label}: {key} has {held}; expected floating-point weights: save the float model's")


def _unpickled(path: Path) -> Any:
    # timm's training script keeps its arguments, an argparse.Namespace, in every checkpoint.
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrapped(content: Any) -> Mapping[Any, Any]:
    """The innermost mapping that nestings lead to; empty for content that is no mapping."""
    if not isinstance(content, Mapping):
        return {}
    inner = (content[key] for key in _NESTINGS if isinstance(content.get(key), Mapping))
    nested = next(inner, None)
    return content if nested is None else _unwrapped(nested)


def _refuse(path: Path, error: pickle.UnpicklingError) -> NoReturn:
    """Say whether the unpickler met code or mere rubbish."""
    blocked = re.search(r"GLOBAL (\S+)|reduce for unrecognized function (\S.*)", str(error))
    if blocked:
        culprit = short(next(group for group in blocked.groups() if group))
        raise ModelError(f"{str(path)!r} refused: would execute code ({culprit}); {SAVE_HINT}") from error
    raise ModelError(f"{str(path)!r} is not a checkpoint: not a PyTorch file; {SAVE_HINT}") from error
