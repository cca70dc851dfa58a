"""How a module is called: with one float tensor, or with several inputs by name or position, packed into one tensor.

Every stage hands on one tensor (n, ...). Several inputs of fixed shapes lie in it one behind the other, (n, numbers);
those of texts, whose length is open, on top of each other, (n, inputs, length). Whole numbers travel as float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from pxcompress.errors import InputError
from pxcompress.types import Input

WHOLE_NUMBER_LIMIT = 2**24
"""Whole numbers must be below this, since they are packed as float32, which is exact up to here."""

MASK = "attention_mask"
"""Name of the input that is 1 at real positions of a text, and 0 at padding."""

PACKING = "inputs"
"""Key in an ONNX file's metadata for how inputs are packed."""

Logits = Callable[[Any], Tensor]
"""A user's function from a module's outputs to the numbers that decide: (n, classes), or (n,)."""

Divergence = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
"""A user's function from a model's and the dense model's outputs, by name, to their distance for every sample, (n,)."""


def restore_rows(spec: Input, rows: Tensor) -> Tensor:
    """An input from its packed rows (n, size); whole numbers are rounded and clamped to their range."""
    shape = rows.shape[1:] if None in spec.shape else spec.shape
    value = rows.reshape(rows.shape[0], *shape)  # type: ignore[arg-type]  # len() would be a constant in a file
    if not spec.dtype.is_floating_point:
        value = value.detach().clamp(spec.low, spec.high).round()
    return value.to(spec.dtype)


def perturbed_rows(spec: Input, rows: Tensor, draw: torch.Generator) -> Tensor:
    """Random changes of packed `rows` that keep the type and range of numbers; an attention mask stays."""
    if spec.dtype.is_floating_point:
        return nearer_zero(rows, draw)
    if spec.name == MASK:
        return rows
    others = spec.low + torch.rand(rows.shape, generator=draw) * (spec.high - spec.low)
    return torch.where(torch.rand(rows.shape, generator=draw) < 0.5, others.to(rows), rows)


@dataclass(frozen=True)
class Signature:
    """How a module is called, and which of its outputs count. Without `inputs` it takes one float tensor.

    `divergence` measures the distance from the dense model's outputs; None means squared error.
    """

    inputs: tuple[Input, ...] = ()
    logits: Logits | None = None
    divergence: Divergence | None = None

    @property
    def is_open(self) -> bool:
        """Whether the inputs are texts, with one common length that may vary."""
        return any(None in each.shape for each in self.inputs)

    def pack(self, inputs: Any) -> Tensor:
        """Inputs packed in one tensor (n, ...). Raises `InputError` if they do not match the signature."""
        values = name_inputs(inputs)
        if not self.inputs and isinstance(inputs, Tensor):
            return values[0]
        expected = {each.name: (each.shape, each.dtype) for each in self.inputs}
        received = {name: (tuple(value.shape[1:]), value.dtype) for name, value in values.items()}
        if received != expected:
            raise InputError(
                f"a batch has inputs {_list_shapes(received)}; expected {_list_shapes(expected)}, as the example"
            )
        floats = [each.dtype for each in self.inputs if each.dtype.is_floating_point]
        dtype = torch.float64 if torch.float64 in floats else torch.float32
        return torch.cat([values[each.name].reshape(samples_in(values), -1).to(dtype) for each in self.inputs], 1)

    def parts(self, packed: Tensor) -> Sequence[Tensor]:
        """Packed inputs cut into the rows of each input, (n, size) each."""
        if self.is_open:
            return packed.unbind(1)
        return packed.split([prod(size or 1 for size in each.shape) for each in self.inputs], 1)

    def unpack(self, packed: Tensor) -> dict[str | int, Tensor]:
        """The inputs in `packed`, by name or position; texts are cut to the longest of them."""
        packed = self._trim(packed)
        return {each.name: restore_rows(each, part) for each, part in zip(self.inputs, self.parts(packed), strict=True)}

    def find_counted(self, packed: Tensor) -> Tensor | None:
        """Mask (n, length) of the real positions of texts in `packed`, once unpacked.

        None if there is no attention mask.
        """
        place = self._mask_place
        return None if place is None else self._trim(packed)[:, place] > 0.5

    def unit_weights(self, packed: Tensor) -> Tensor:
        """Ones (n, length) for the positions of texts, whose gradients flow into the packed attention mask."""
        mask = self._trim(packed)[:, self._mask_place or 0]
        return 1 + mask - mask.detach()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `parts`: rows of all inputs in one packed tensor."""
        return torch.stack(list(parts), 1) if self.is_open else torch.cat(list(parts), 1)

    def call(self, forward: Callable[..., Any], packed: Tensor) -> Any:
        """Call `forward` with the inputs in `packed`, and return its result."""
        if not self.inputs:
            return forward(packed)
        values = self.unpack(packed)
        places = [value for name, value in values.items() if isinstance(name, int)]
        return forward(*places, **{name: value for name, value in values.items() if isinstance(name, str)})

    def blank(self, shape: Sequence[int], samples: int = 1) -> Tensor:
        """Packed inputs (samples, *shape) without content: zeros, and ones for texts and masks."""
        packed = (torch.ones if self.is_open else torch.zeros)(samples, *shape)
        if self.inputs and not self.is_open:
            for each, part in zip(self.inputs, self.parts(packed), strict=True):
                part.fill_(float("mask" in str(each.name)))
        return packed

    @property
    def _mask_place(self) -> int | None:
        names = [each.name for each in self.inputs]
        return names.index(MASK) if self.is_open and MASK in names else None

    def _trim(self, packed: Tensor) -> Tensor:
        """Packed texts without the positions at the end that are padding in all of them."""
        place = self._mask_place
        if place is None:
            return packed
        positions = (packed[:, place].detach() > 0.5).any(0).nonzero()
        return packed[:, :, : int(positions.max()) + 1] if len(positions) else packed

    def to_json(self) -> str:
        """The inputs as JSON, which `inputs_from_json` reads."""
        return json.dumps(
            [
                {"name": each.name, "shape": each.shape, "dtype": str(each.dtype).removeprefix("torch.")}
                | ({} if each.dtype.is_floating_point else {"low": each.low, "high": each.high})
                for each in self.inputs
            ]
        )


def inputs_from_json(text: str) -> tuple[Input, ...]:
    """The inputs in JSON written by `Signature.to_json`. Raises `ValueError`, `KeyError` or `TypeError`."""
    return tuple(
        Input(
            row["name"],
            tuple(row["shape"]),
            _dtype(row["dtype"]),
            row.get("low", -torch.inf),
            row.get("high", torch.inf),
        )
        for row in json.loads(text)
    )


def read_signature(metadata: Mapping[str, str]) -> Signature:
    """How an ONNX file's inputs are packed, from its metadata; without `inputs` if it has only one."""
    return Signature(inputs_from_json(metadata.get(PACKING, "[]")))


def _dtype(name: str) -> torch.dtype:
    value = getattr(torch, name, None)
    if not isinstance(value, torch.dtype):
        raise ValueError(f"{name!r} is no type of numbers")
    return value


def nearer_zero(value: Tensor, draw: torch.Generator) -> Tensor:
    """Every number moved towards zero by up to a half of it, at random; if all are zero, random numbers."""
    if not value.any():
        return torch.randn(value.shape, generator=draw).to(value)
    return value * (1 - torch.rand(value.shape, generator=draw).to(value) / 2)


def bound_inputs(inputs: Sequence[Input], values: Mapping[str | int, Sequence[Tensor]]) -> tuple[Input, ...]:
    """The inputs with the range of whole numbers found in `values`. Raises `InputError` for too large numbers."""
    result = []
    for each in inputs:
        if not each.dtype.is_floating_point:
            low = min(float(value.min()) for value in values[each.name] if value.numel())
            high = max(float(value.max()) for value in values[each.name] if value.numel())
            if max(-low, high) >= WHOLE_NUMBER_LIMIT:
                raise InputError(
                    f"input {each.name!r} has whole numbers from {low:.0f} to {high:.0f}; expected less than 2^24"
                )
            each = replace(each, low=low, high=high)
        result.append(each)
    return tuple(result)


def name_inputs(inputs: Any) -> dict[str | int, Tensor]:
    """Inputs by name or position. Raises `InputError` unless they are tensors with the same number of samples."""
    listed = inputs if isinstance(inputs, tuple | list) else [inputs]
    values = dict(inputs) if isinstance(inputs, Mapping) else dict(enumerate(listed))
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.dim() or len(value) != samples_in(values):
            description = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InputError(
                f"input {name!r} is {description}; expected a tensor (n, ...), or a tuple or dict of such with one n"
            )
    return {name: _ordinary(value) for name, value in values.items()}


def samples_in(values: Mapping[str | int, Tensor]) -> int:
    """Number of samples in a batch of several inputs."""
    return len(next(iter(values.values())))


def _ordinary(value: Tensor) -> Tensor:
    """`value` as a plain tensor, without subclass or autograd graph, and not from inference mode."""
    value = value.as_subclass(Tensor).detach()
    return value.clone() if value.is_inference() else value


def _list_shapes(shapes: Mapping[str | int, tuple[tuple[int | None, ...], torch.dtype]]) -> str:
    return ", ".join(f"{name}: (n, {str(shape)[1:]} {dtype}" for name, (shape, dtype) in shapes.items()) or "one tensor"
