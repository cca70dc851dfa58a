"""Convolutions and linear layers as they are executed: one record for all of them, read from the function call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pxcompress.errors import ModelError

LINEAR_FUNCTIONS = frozenset(
    ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
)
"""Names of the torch functions that apply a weight to an input: linear ones and convolutions."""

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS: Mapping[str, Any] = {
    "bias": None,
    "stride": 1,
    "padding": 0,
    "output_padding": 0,
    "groups": 1,
    "dilation": 1,
}


@dataclass(frozen=True, eq=False)
class Layer:
    """One executed linear map z = W a + b: its weight, bias and arguments. Its inputs and outputs are not stored.

    `convolution` holds stride, padding, dilation, output_padding (tuples), groups and transposed as
    `torch.ops.aten.convolution` takes them; None for a linear layer. `sides` is padding before it, as `F.pad` takes it,
    where both sides of an axis differ. `samples` inputs of the model are along axis `sample_axis` of the layer's input,
    each with the same number of consecutive rows (windows of an image); 0: a row is a sample.
    """

    weight: Tensor
    bias: Tensor | None
    convolution: Mapping[str, Any] | None = None
    sides: tuple[int, ...] = ()
    samples: int = 0
    sample_axis: int = 0

    def by_sample(self, a: Tensor) -> Tensor:
        """An input-shaped tensor as a matrix with a row for every sample.

        Raises `ModelError` if the rows are not divided evenly among the samples.
        """
        rows = a.movedim(self.sample_axis, 0)
        samples = self.samples or len(rows)
        if len(rows) % samples:
            raise ModelError(
                f"a layer's input of shape {tuple(a.shape)} cannot be told apart into {samples} samples, which pruned "
                "relevance needs; use plain LRP for this model"
            )
        return rows.reshape(samples, -1)

    def from_samples(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `by_sample`: a matrix with a row for every sample as an input of `shape`."""
        size = list(shape)
        moved_shape = [size.pop(self.sample_axis), *size]
        return rows.reshape(moved_shape).movedim(0, self.sample_axis)

    def forward(self, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply the layer's linear map to `a`, with another weight and bias; without `bias` none is added."""
        if self.convolution is None:
            return F.linear(a, weight, bias)
        a = F.pad(a, self.sides) if self.sides else a
        return torch.ops.aten.convolution(a, weight, bias, **self.convolution)

    def transpose(self, m: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """weight^T m: the gradient at an input of `shape`, as in an ordinary backward pass."""
        if self.convolution is None:
            return m @ weight
        like_input = F.pad(m.new_empty(1).expand(shape), self.sides) if self.sides else m.new_empty(1).expand(shape)
        result = torch.ops.aten.convolution_backward(
            m, like_input, weight, None, **self.convolution, output_mask=(True, False, False)
        )[0]
        return F.pad(result, [-side for side in self.sides]) if self.sides else result


def bind(function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of one of `LINEAR_FUNCTIONS` by name, with defaults filled in."""
    names = _TRANSPOSED_ARGUMENTS if "transpose" in function else _ARGUMENTS
    return {**_DEFAULTS, **dict(zip(names, args, strict=False)), **kwargs}


def as_layer(function: str, values: Mapping[str, Any]) -> tuple[Tensor, Layer]:
    """The input and the `Layer` of a call with arguments bound by name, in the precision that autocast would use."""
    a, weight, bias = values["input"], values["weight"].detach(), values["bias"]
    bias = None if bias is None else bias.detach()
    if torch.is_autocast_enabled(a.device.type):
        dtype = torch.get_autocast_dtype(a.device.type)
        a, weight, bias = a.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if function == "linear":
        return a, Layer(weight, bias)
    axes = weight.dim() - 2
    options: dict[str, Any] = {
        key: _repeat_per_axis(values[key], axes) for key in ("stride", "dilation", "output_padding")
    }
    padding, sides = _split_padding(values["padding"], weight.shape[2:], options["dilation"])
    options |= {"padding": padding, "groups": values["groups"], "transposed": "transpose" in function}
    return a, Layer(weight, bias, options, sides)


def _repeat_per_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * axes if len(numbers) == 1 else numbers


def _split_padding(
    padding: int | tuple[int, ...] | str, kernel: torch.Size, dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Symmetric padding for every axis; for "same" with an even kernel, uneven padding for `F.pad` in its place."""
    none = (0,) * len(kernel)
    if not isinstance(padding, str):
        return _repeat_per_axis(padding, len(kernel)), ()
    if padding == "valid":
        return none, ()
    totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return tuple(total // 2 for total in totals), ()
    return none, tuple(side for total in reversed(totals) for side in (total // 2, total - total // 2))
