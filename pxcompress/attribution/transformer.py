"""Rules for what stands between linear layers: norms, smooth activations, products. One table by function name.

Each handler stands in for one torch function while a model runs forward: same output, and a gradient that is a
relevance rule (AttnLRP, Achtibat et al. 2024). The engine calls them through a `TorchFunctionMode`, so a model's own
code, modules and functional calls alike, needs no change. Functions that are linear or piecewise linear without a bias
(`PLAIN_FUNCTIONS`) keep their gradient, which is their rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Handler = Callable[..., Any]

PLAIN_FUNCTIONS = frozenset(
    """
    add __radd__ sub __rsub__ rsub neg add_ sub_ sum mean cumsum addmm abs clone contiguous to float double half
    bfloat16 type_as detach requires_grad_ __get__ cat concat concatenate stack hstack vstack reshape reshape_as view
    view_as flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to broadcast_tensors repeat
    repeat_interleave tile permute transpose swapaxes movedim moveaxis t roll flip rot90 narrow select split
    split_with_sizes chunk tensor_split unbind unfold fold __getitem__ index_select gather take_along_dim diagonal
    tril triu masked_fill masked_select where scatter pad constant_pad_nd pixel_shuffle pixel_unshuffle
    channel_shuffle interpolate grid_sample relu relu_ leaky_relu leaky_relu_ prelu rrelu threshold clamp_min max amax
    maximum max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d lp_pool2d dropout dropout1d dropout2d dropout3d
    alpha_dropout
    """.split()  # noqa: SIM905 - a line per name would be a hundred lines
)
"""Functions whose ordinary gradient is a valid LRP rule: it shares relevance in proportion to contributions."""


def carries_gradient(value: Any) -> bool:
    """Whether `value` is a tensor that requires a gradient, so that relevance can flow into it."""
    return isinstance(value, Tensor) and value.requires_grad


# --- activations: the identity rule -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activation:
    """An elementwise function f for the identity rule: f(0), and the slope of f at 0."""

    at_zero: float
    slope: float


ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": Activation(0.0, 0.5),
    "silu": Activation(0.0, 0.5),
    "mish": Activation(0.0, 0.6),
    "hardswish": Activation(0.0, 0.5),
    "elu": Activation(0.0, 1.0),
    "celu": Activation(0.0, 1.0),
    "selu": Activation(0.0, 1.0507009873554805),
    "tanh": Activation(0.0, 1.0),
    "softsign": Activation(0.0, 1.0),
    "hardtanh": Activation(0.0, 0.0),
    "relu6": Activation(0.0, 0.0),
    "square": Activation(0.0, 0.0),
    "pow": Activation(0.0, 0.0),
    "sigmoid": Activation(0.5, 0.25),
    "hardsigmoid": Activation(0.5, 1 / 6),
    "softplus": Activation(math.log(2), 0.5),
}

SELF_GATED = frozenset(
    f"{name}{suffix}"
    for name in ("QuickGELU", "QuickGELUActivation", "NewGELUActivation", "Swish", "Mish", "HardSwish", "HardMish")
    for suffix in ("", "Me")
)
"""Class names of modules that compute x * gate(x) step by step; they get the identity rule as one activation."""


class _Identity(torch.autograd.Function):
    """The identity rule as an autograd function, m_x = m (f(x) - f(0)) / x.

    The relevance of f(0) stays there, as of a bias.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], activation: Activation) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.activation = function, activation
        return function(x)

    @staticmethod
    def backward(ctx: Any, m: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        at_zero = ctx.activation.at_zero
        ratio = ctx.function(x).sub(at_zero).div_(x)
        # Next to 0 the difference to f(0) is rounding, and 0 / 0 is not a number: the limit is the slope.
        ratio = ratio.masked_fill_(x.abs() <= (1e-3 if at_zero else 0.0), ctx.activation.slope)
        return ratio.mul_(m), None, None


def identity_rule(x: Tensor, function: Callable[[Tensor], Tensor], activation: Activation) -> Tensor:
    """function(x), elementwise, whose gradient is the identity rule: relevance passes unchanged."""
    return _Identity.apply(x, function, activation) if carries_gradient(x) else function(x)


def _activation(name: str) -> Handler:
    def handler(func: Handler, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not carries_gradient(x) or any(carries_gradient(arg) for arg in args):
            return func(x, *args, **kwargs)
        if "inplace" in kwargs:
            kwargs = {**kwargs, "inplace": False}
        return identity_rule(x, lambda value: func(value, *args, **kwargs), ACTIVATIONS[name])

    return handler


# --- products: an equal share to each factor --------------------------------------------------------------------------


class _Scale(torch.autograd.Function):
    """An autograd function that returns its input, and multiplies the gradient by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, m: Tensor) -> tuple[Tensor, None]:
        return m * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied by `factor`."""
    return _Scale.apply(x, factor)


def product(func: Handler, a: Any, b: Any, **kwargs: Any) -> Any:
    """A product of two tensors; where gradients flow into both, each gets half of the relevance."""
    if carries_gradient(a) and carries_gradient(b):
        a, b = scale_gradient(a, 0.5), scale_gradient(b, 0.5)
    return func(a, b, **kwargs)


def _base_plus_product(func: Handler, base: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Any:
    if carries_gradient(a) and carries_gradient(b):
        a, b = scale_gradient(a, 0.5), scale_gradient(b, 0.5)
    return func(base, a, b, **kwargs)


def _einsum(func: Handler, equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    factors = sum(carries_gradient(operand) for operand in operands)
    return func(
        equation, *(scale_gradient(x, 1 / factors) if factors > 1 and carries_gradient(x) else x for x in operands)
    )


def _glu(func: Handler, x: Tensor, dim: int = -1) -> Tensor:
    signal, gate = x.chunk(2, dim)
    return product(torch.mul, signal, identity_rule(gate, torch.sigmoid, ACTIVATIONS["sigmoid"]))


def _quotient(func: Handler, a: Any, b: Any, **kwargs: Any) -> Any:
    """A quotient whose divisor counts as a constant, so relevance flows into the numerator only."""
    return func(a, b.detach() if carries_gradient(b) else b, **kwargs)


# --- norms: gradient stopped through the scale ------------------------------------------------------------------------


def _statistic(func: Handler, *args: Any, **kwargs: Any) -> Any:
    """A root, norm or deviation whose result counts as a constant, since such values only scale others."""
    result = func(*args, **kwargs)
    if isinstance(result, Tensor):
        return result.detach()
    return (result[0].detach(), *result[1:])


class _LayerNorm(torch.autograd.Function):
    """LayerNorm whose deviation counts as a constant, so that it is linear: m_x = centre(m weight / std)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, _, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(rstd)
        ctx.weight, ctx.dims = weight, tuple(range(-len(shape), 0))
        return y

    @staticmethod
    def backward(ctx: Any, m: Tensor) -> tuple[Tensor | None, ...]:
        (rstd,) = ctx.saved_tensors
        m = m * rstd if ctx.weight is None else (m * ctx.weight).mul_(rstd)
        return m - m.mean(ctx.dims, keepdim=True), None, None, None, None


def _layer_norm(
    func: Handler, x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if not carries_gradient(x):
        return func(x, shape, weight, bias, eps)
    return _LayerNorm.apply(x if weight is None else x.to(weight.dtype), list(shape), weight, bias, eps)


def _rms_norm(func: Handler, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    square = x.detach().square().mean(dims, keepdim=True)
    y = x * (square + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return y if weight is None else y * weight


def _group_norm(
    func: Handler, x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    grouped = x.reshape(x.shape[0], groups, -1)
    grouped = grouped - grouped.mean(-1, keepdim=True)
    y = (grouped * (grouped.detach().square().mean(-1, keepdim=True) + eps).rsqrt()).reshape_as(x)
    channels = (1, -1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


def _instance_norm(func: Handler, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    arguments = dict(zip(names, args, strict=False)) | kwargs
    if not arguments.get("use_input_stats", True):
        return func(x, **arguments)
    return _group_norm(func, x, x.shape[1], arguments.get("weight"), arguments.get("bias"), arguments.get("eps", 1e-5))


def _normalize(func: Handler, x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    return x / x.detach().norm(p, dim, keepdim=True).clamp_min(eps)


OPERATORS = {"__imul__": "mul", "__itruediv__": "div", "__ipow__": "pow"}
"""In-place operators by method name, and the function that each applies."""


def _in_place(handler: Handler, function: Handler) -> Handler:
    """The handler of a `function` that writes its result into its first argument, made from the handler of the
    function.
    """

    def change_in_place(func: Handler, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.copy_(handler(function, x.clone(), *args, **kwargs))

    return change_in_place


def handlers() -> dict[str, Handler]:
    """Function name -> the handler that gives it a rule; a handler is called with the function and its arguments."""
    table: dict[str, Handler] = {name: _activation(name) for name in ACTIVATIONS}
    table |= dict.fromkeys(("mul", "multiply", "__rmul__", "matmul", "bmm", "mm", "__rmatmul__"), product)
    table |= dict.fromkeys(("div", "true_divide", "divide", "__rdiv__", "__rtruediv__"), _quotient)
    table |= dict.fromkeys(("sqrt", "rsqrt", "std", "var", "norm", "vector_norm", "std_mean", "var_mean"), _statistic)
    table |= {"einsum": _einsum, "baddbmm": _base_plus_product, "addcmul": _base_plus_product, "glu": _glu}
    table |= {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm}
    table |= {"instance_norm": _instance_norm, "normalize": _normalize}
    changing = {f"{name}_": name for name in table if hasattr(torch.Tensor, f"{name}_")} | OPERATORS
    return table | {
        name: _in_place(table[name_of_original], getattr(torch, name_of_original))
        for name, name_of_original in changing.items()
    }
