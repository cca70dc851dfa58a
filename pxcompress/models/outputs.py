"""Takes the outputs of any module apart into tensors with names, and compares such outputs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_leaves_with_path

from pxcompress.errors import ModelError

NUMBERS = (bool, int, float, complex, np.ndarray, np.generic)
WORDS = (type(None), str, bytes, torch.dtype, torch.device, torch.layout)


def leaves(outputs: Any) -> list[Tensor]:
    """All tensors in `outputs`, however nested, in order; numbers are turned into tensors.

    Raises `ModelError` for an object of an unknown class, since what it holds could change unnoticed.
    """
    return [tensor for leaf in tree_leaves(outputs) for tensor in _tensors(leaf)]


def is_real(value: Tensor) -> bool:
    """Whether a tensor contains floating-point numbers."""
    return value.is_floating_point()


def by_name(outputs: Any, only: str = "output") -> dict[str, Tensor]:
    """All tensors of nested outputs by name, in order, as in an ONNX file; single numbers are left out.

    A single tensor is called `only`; others by their keys, joined by dots ("out", "features.0"), those of a plain tuple
    or list "output_0", "output_1". Raises as `leaves` does.
    """
    if isinstance(outputs, Tensor):
        return {only: outputs} if outputs.dim() else {}
    tensor_by_name: dict[str, Tensor] = {}
    for path, leaf in tree_leaves_with_path(outputs):
        name = ".".join(_key(key) for key in path) or only
        tensors = [tensor for tensor in _tensors(leaf) if tensor.dim()]
        for place, tensor in enumerate(tensors):
            tensor_by_name[_free(name if len(tensors) == 1 else f"{name}.{place}", tensor_by_name)] = tensor
    return tensor_by_name


def _key(key: Any) -> str:
    """The name of one step into nested outputs: a key, an attribute, or the position in a sequence."""
    place = getattr(key, "idx", None)
    return f"{place}" if place is not None else str(getattr(key, "key", getattr(key, "name", key)))


def _free(name: str, tensor_by_name: Mapping[str, Tensor]) -> str:
    name = f"output_{name}" if name[0].isdigit() else name
    return name if name not in tensor_by_name else f"{name}_{len(tensor_by_name)}"


def max_difference(outputs: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Largest absolute difference between floating-point outputs at the same position."""
    pairs = [pair for pair in zip(outputs.values(), reference.values(), strict=True) if is_real(pair[0])]
    differences = [
        (value.double() - reference_value.double()).abs().max() for value, reference_value in pairs if value.numel()
    ]
    return float(torch.stack(differences).max()) if differences else 0.0


def floats(outputs: Any) -> list[Tensor]:
    """The tensors in `outputs` that can have gradients; complex ones as pairs of real numbers."""
    return [
        torch.view_as_real(value) if value.is_complex() else value
        for value in leaves(outputs)
        if value.is_floating_point() or value.is_complex()
    ]


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference between `actual` and `expected`, as a share of each tensor's scale.

    For whole numbers and booleans it is the share that differs. Infinite if shapes or types differ, NaN if there is a
    NaN.
    """
    if kinds(actual) != kinds(expected):
        return math.inf
    parts = [_difference(*pair) for pair in zip(actual, expected, strict=True) if pair[0].numel()]
    return float(torch.stack(parts).max()) if parts else 0.0


def kinds(values: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor."""
    return [(value.shape, value.dtype) for value in values]


def _difference(actual: Tensor, expected: Tensor) -> Tensor:
    is_same = actual == expected  # infinities too
    if not (expected.is_floating_point() or expected.is_complex()):
        return (~is_same).double().mean().cpu()
    size = expected.abs()
    scale = torch.where(size.isfinite(), size, 0).max().clamp_min(1e-12)
    return (torch.where(is_same, 0, (actual - expected).abs()).max() / scale).double().cpu()


def _tensors(leaf: Any) -> Iterator[Tensor]:
    """The tensors in one leaf of nested outputs."""
    if isinstance(leaf, Tensor):
        yield from _to_strided(leaf)
    elif isinstance(leaf, NUMBERS) and getattr(leaf, "dtype", np.dtype(bool)).kind in "biufc":
        yield torch.as_tensor(leaf)
    elif not isinstance(leaf, WORDS):
        for part in _parts(leaf):
            yield from leaves(part)


def _to_strided(value: Tensor) -> Iterator[Tensor]:
    if value.is_nested:
        yield from value.unbind()
    elif value.is_quantized:
        yield value.dequantize()
    else:
        yield value if value.layout == torch.strided else value.to_dense()


def _parts(leaf: Any) -> Sequence[Any]:
    """The values in a collection or record. Raises `ModelError`."""
    if isinstance(leaf, Mapping):
        return list(leaf.values())
    if isinstance(leaf, list | tuple | deque):
        return list(leaf)
    if is_dataclass(leaf) and not isinstance(leaf, type):
        return [getattr(leaf, field.name, None) for field in fields(leaf)]
    if isinstance(leaf, SimpleNamespace):
        return list(vars(leaf).values())
    raise ModelError(
        f"the module returns a {type(leaf).__name__}, which cannot be looked into; "
        "expected tensors, alone or in tuples, lists, dicts or dataclasses"
    )
