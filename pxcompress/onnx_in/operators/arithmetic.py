"""Operators that compute element by element, such as arithmetic and activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pxcompress.onnx_in.operators.table import DTYPES, OPERATORS, Operator, Settings, Unsupported, operator, to_number


def _plain(function: Operator) -> Operator:
    """Turn a function of tensors into an operator without attributes."""

    def run(node: Settings, *inputs: Any) -> Any:
        return function(*inputs)

    return run


def _pow(base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent.to(base.dtype) if exponent.dim() else to_number(exponent)).to(base.dtype)


def _fold_inputs(function: Operator) -> Operator:
    """Turn a function of two tensors into an operator on any number of inputs, combined one by one."""

    def run(node: Settings, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return run


PLAIN: dict[str, Operator] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Pow": _pow,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Sqrt": torch.sqrt,
    "Exp": torch.exp,
    "Log": torch.log,
    "Erf": torch.erf,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Atan": torch.atan,
    "Reciprocal": torch.reciprocal,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Sign": torch.sign,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Relu": torch.relu,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
    "Not": torch.logical_not,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Where": torch.where,
    "IsNaN": torch.isnan,
    "MatMul": torch.matmul,
}
for _name, _function in PLAIN.items():
    operator(_name)(_plain(_function))
FOLDED: dict[str, Operator] = {"Min": torch.minimum, "Max": torch.maximum, "Sum": torch.add}
for _name, _function in FOLDED.items():
    operator(_name)(_fold_inputs(_function))


@operator("Identity")
def _identity(node: Settings, x: Tensor) -> Tensor:
    return x


@operator("Dropout")
def _dropout(node: Settings, x: Tensor, ratio: Any = None, training: Any = None) -> Tensor:
    if node.outputs > 1 or (training is not None and bool(training)):
        raise Unsupported("Dropout with a mask, or in training mode")
    return x


@operator("Mean")
def _mean(node: Settings, *inputs: Tensor) -> Tensor:
    return OPERATORS["Sum"](node, *inputs) / len(inputs)


@operator("PRelu")
def _prelu(node: Settings, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@operator("Div")
def _div(node: Settings, x: Tensor, y: Tensor) -> Tensor:
    whole = not x.dtype.is_floating_point and not y.dtype.is_floating_point
    return torch.div(x, y, rounding_mode="trunc") if whole else torch.div(x, y)


@operator("Mod")
def _mod(node: Settings, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if node.get("fmod") else torch.remainder(x, y)


@operator("Clip")
def _clip(node: Settings, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    low = to_number(low) if low is not None else node.get("min")
    high = to_number(high) if high is not None else node.get("max")
    if (low, high) == (0, 6):
        return F.relu6(x)
    if low is None and high is None:
        return x
    return F.relu(x) if low == 0 and high is None else x.clamp(low, high)


@operator("LeakyRelu")
def _leaky_relu(node: Settings, x: Tensor) -> Tensor:
    return F.leaky_relu(x, node.get("alpha", 0.01))


@operator("Elu")
def _elu(node: Settings, x: Tensor) -> Tensor:
    return F.elu(x, node.get("alpha", 1.0))


@operator("Celu")
def _celu(node: Settings, x: Tensor) -> Tensor:
    return F.celu(x, node.get("alpha", 1.0))


@operator("Selu")
def _selu(node: Settings, x: Tensor) -> Tensor:
    alpha, gamma = node.get("alpha", 1.6732632423543772), node.get("gamma", 1.0507009873554805)
    return gamma * F.elu(x, alpha)


@operator("ThresholdedRelu")
def _thresholded_relu(node: Settings, x: Tensor) -> Tensor:
    return F.threshold(x, node.get("alpha", 1.0), 0.0)


@operator("HardSigmoid")
def _hard_sigmoid(node: Settings, x: Tensor) -> Tensor:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return (x * alpha + beta).clamp(0, 1)


@operator("Gelu")
def _gelu(node: Settings, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=node.get("approximate", "none"))


@operator("Swish")
def _swish(node: Settings, x: Tensor) -> Tensor:
    return x * torch.sigmoid(node.get("alpha", 1.0) * x)


def _along_axis(function: Operator) -> Operator:
    """Turn a function of a tensor and an axis, such as softmax, into an operator.

    Before opset 13 it flattened later axes.
    """

    def run(node: Settings, x: Tensor) -> Tensor:
        if node.opset >= 13:
            return function(x, node.get("axis", -1))
        axis = node.get("axis", 1) % max(x.dim(), 1)
        return function(x, -1) if axis == x.dim() - 1 else function(x.flatten(axis), -1).reshape(x.shape)

    return run


operator("Softmax")(_along_axis(torch.softmax))
operator("LogSoftmax")(_along_axis(torch.log_softmax))


@operator("Cast")
def _cast(node: Settings, x: Tensor) -> Tensor:
    dtype = DTYPES.get(node["to"])
    if dtype is None:
        raise Unsupported(f"a cast to data type {node['to']}")
    return x.to(dtype)


@operator("CastLike")
def _cast_like(node: Settings, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@operator("CumSum")
def _cumsum(node: Settings, x: Tensor, axis: Any) -> Tensor:
    if node.get("exclusive") or node.get("reverse"):
        raise Unsupported("a CumSum that is exclusive or reverse")
    return x.cumsum(int(to_number(axis) if isinstance(axis, Tensor) else _only(axis)))


def _only(values: Sequence[int] | int) -> int:
    """The single number in a list; a plain number is returned as it is."""
    return values if isinstance(values, int) else values[0]


@operator("Einsum")
def _einsum(node: Settings, *inputs: Tensor) -> Tensor:
    return torch.einsum(node["equation"], *inputs)
