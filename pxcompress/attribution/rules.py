"""LRP rules for convolutions and linear layers, in gradient form.

A rule turns the multiplier m of a layer's output z into the multiplier of its input a, so that a * m is the relevance
of every element of a. The definitions are zennit's; `Epsilon`, `Gamma`, `ZPlus` and `AlphaBeta` are computed here with
fewer passes than zennit needs, the others by zennit's own hooks through `hook_multiplier`.

Sources: Bach et al. 2015 (epsilon, alpha-beta), Montavon et al. 2017 (z+, z-box, w^2), Lapuschkin et al. 2019 (flat),
Montavon et al. 2019 and Andeol et al. 2021 (gamma, also for negative inputs).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from zennit import rules as zennit_rules
from zennit.core import BasicHook

from pxcompress.attribution.layers import Layer
from pxcompress.errors import InputError, ModelError
from pxcompress.registry import option, search_option

STABILIZER = 1e-6
"""A small number that zennit adds to denominators, with their sign, against division by zero."""

_MANY_INPUTS = 64
"""Fewest inputs per output with which `AlphaBeta` may compute by differences of sums.

With fewer, the contributions of one sign may be so small a part of the sums that rounding loses them.
"""


class Rule:
    """An LRP rule with its parameters. Subclasses are frozen dataclasses; their fields are the parameters, in order."""

    name: ClassVar[str]
    needs_input: ClassVar[bool] = True

    def multiplier(self, layer: Layer, a: Tensor | None, z: Tensor, m: Tensor, shape: torch.Size) -> Tensor:
        """The multiplier of the layer's input; relevance is activation times multiplier.

        a: input, of `shape` (None where `needs_input` is false). z: output. m: multiplier of the output.
        """
        assert a is not None
        return hook_multiplier(self.hook(), layer, a, z, m)

    def hook(self) -> BasicHook:
        """The hook of zennit that defines this rule."""
        raise NotImplementedError

    def __str__(self) -> str:
        values = [getattr(self, field.name) for field in fields(cast(Any, self))]
        return f"{self.name}({';'.join(f'{value:g}' for value in values)})" if values else self.name


def _divide_stabilised(z: Tensor, epsilon: float) -> Tensor:
    """z / (z + epsilon * sign z), the factor of the epsilon rule, which is 0 at z = 0."""
    size = z.abs()
    return size.div_(size + epsilon) if epsilon else (z != 0).to(z)


def _check_positive(name: str, value: float, *, strictly: bool = False) -> None:
    if not (math.isfinite(value) and (value > 0 or (value == 0 and not strictly))):
        bound = "above 0" if strictly else "from 0 up"
        raise InputError(f"{name} is {value:g}; expected a finite number {bound}")


@dataclass(frozen=True)
class Epsilon(Rule):
    """m_a = W^T (m z / (z + epsilon sign z)): one ordinary backward pass. epsilon = 0 is LRP-0, gradient x input."""

    epsilon: float = search_option(option(STABILIZER, "added to denominators", low=STABILIZER, high=1.0, log=True))
    name: ClassVar[str] = "epsilon"
    needs_input: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive("epsilon of rule 'epsilon'", self.epsilon)

    def multiplier(self, layer: Layer, a: Tensor | None, z: Tensor, m: Tensor, shape: torch.Size) -> Tensor:
        """The multiplier of the input, by one transposed map."""
        return layer.transpose(_divide_stabilised(z, self.epsilon).mul_(m), layer.weight, shape)

    def hook(self) -> BasicHook:
        """The hook of zennit that defines this rule, Epsilon."""
        return zennit_rules.Epsilon(epsilon=self.epsilon)


@dataclass(frozen=True)
class Gamma(Rule):
    """Gamma rule: positive contributions get the weight 1 + gamma where z > 0, negative ones where z < 0.

    With |W| a second map, T = |W||a| + |b| and q = |z| / ((1 + gamma/2) |z| + gamma/2 T), zennit's five maps are

        m_a = (1 + gamma/2) W^T (q m) + sign(a) gamma/2 |W|^T (sign(z) q m),    sign(0) = 1 for a.
    """

    gamma: float = search_option(option(0.25, "share of the sign that counts more", low=0.01, high=10.0, log=True))
    name: ClassVar[str] = "gamma"

    def __post_init__(self) -> None:
        _check_positive("gamma of rule 'gamma'", self.gamma)

    def multiplier(self, layer: Layer, a: Tensor | None, z: Tensor, m: Tensor, shape: torch.Size) -> Tensor:
        """The multiplier of the input, by one forward and two transposed maps."""
        assert a is not None
        half, size, weight = self.gamma / 2, z.abs(), layer.weight.abs()
        total = layer.forward(a.abs(), weight, None if layer.bias is None else layer.bias.abs())
        share = size / total.mul_(half).add_(size, alpha=1 + half).add_(STABILIZER)
        share.mul_(m)
        signed = layer.transpose(share, layer.weight, shape).mul_(1 + half)
        absolute = layer.transpose(share.mul_(z.sign()), weight, shape).mul_(half)
        return signed.add_(absolute.mul_(_take_sign(a)))

    def hook(self) -> BasicHook:
        """The hook of zennit that defines this rule, Gamma."""
        return zennit_rules.Gamma(gamma=self.gamma)


def _stabilise(total: Tensor) -> Tensor:
    """A denominator `total`, with the stabiliser added; infinity where it is 0.

    Where no contribution has a rule's sign there is no relevance to share, but 1 / stabiliser would give inputs that
    are 0 multipliers of a million, which scores read.
    """
    return total.add(total.sign(), alpha=STABILIZER).masked_fill_(total == 0, math.inf)


def _halve_(twice: Tensor, total: Tensor) -> Tensor:
    """Turn `twice` into the denominator twice / 2 + stabiliser, in place, and return it.

    It becomes infinity where it is only rounding error next to `total`.
    """
    return twice.div_(2).masked_fill_(twice <= 1e-6 * total, math.inf).add_(STABILIZER)


def _take_sign(a: Tensor) -> Tensor:
    """The sign of `a`, +1 where a >= 0 and -1 elsewhere."""
    return (a >= 0).to(a).mul_(2).sub_(1)


@dataclass(frozen=True)
class AlphaBeta(Rule):
    """Alpha-beta rule: alpha times positive contributions' shares minus beta times negative ones', alpha - beta = 1."""

    alpha: float = 2.0
    beta: float = 1.0
    name: ClassVar[str] = "alphabeta"

    def __post_init__(self) -> None:
        _check_positive("alpha of rule 'alphabeta'", self.alpha)
        _check_positive("beta of rule 'alphabeta'", self.beta)
        if abs(self.alpha - self.beta - 1) > 1e-9:
            raise InputError(
                f"alpha {self.alpha:g} and beta {self.beta:g} of rule 'alphabeta': expected alpha - beta = 1, not "
                f"{self.alpha - self.beta:g}; for example alphabeta({self.beta + 1:g};{self.beta:g})"
            )

    def multiplier(self, layer: Layer, a: Tensor | None, z: Tensor, m: Tensor, shape: torch.Size) -> Tensor:
        """The multiplier of the input, by a forward and a transposed map for each sign of output and input.

        Where inputs have both signs, and are enough, one forward and two transposed maps of absolute values do.
        """
        assert a is not None
        relevance = m * z
        has_both_signs = bool((a < 0).any())
        if has_both_signs and layer.weight[0].numel() >= _MANY_INPUTS:
            return self._share_by_absolute_values(layer, a, z, relevance, shape)
        positive_weight, negative_weight = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
        inputs = (a.clamp(min=0), a.clamp(max=0)) if has_both_signs else (a, None)
        result, for_negative_inputs = self._share_one_sign(
            layer, (positive_weight, negative_weight, 0.0), inputs, relevance.mul(self.alpha), shape
        )
        if self.beta:
            minus = self._share_one_sign(
                layer, (negative_weight, positive_weight, 1.0), inputs, relevance.mul_(-self.beta), shape
            )
            result = result.add_(minus[0])
            for_negative_inputs = (
                None if for_negative_inputs is None or minus[1] is None else for_negative_inputs.add_(minus[1])
            )
        return result if for_negative_inputs is None else torch.where(a >= 0, result, for_negative_inputs)

    def _share_by_absolute_values(
        self, layer: Layer, a: Tensor, z: Tensor, relevance: Tensor, shape: torch.Size
    ) -> Tensor:
        """The multiplier by absolute values: with T = |W||a| + |b|, contributions are (T + z) / 2 and (z - T) / 2."""
        weight = layer.weight.abs()
        total = layer.forward(a.abs(), weight, None if layer.bias is None else layer.bias.abs())
        positive_share = self.alpha * relevance / _halve_(total + z, total)
        negative_share = self.beta * relevance / _halve_(total - z, total).neg_()
        signed = layer.transpose(positive_share - negative_share, layer.weight, shape)
        return signed.add_(
            layer.transpose(positive_share.add_(negative_share), weight, shape).mul_(_take_sign(a))
        ).div_(2)

    def _share_one_sign(
        self,
        layer: Layer,
        weights: tuple[Tensor, Tensor, float],
        inputs: tuple[Tensor, Tensor | None],
        relevance: Tensor,
        shape: torch.Size,
    ) -> tuple[Tensor, Tensor | None]:
        """Multipliers of the positive and of the negative inputs, from the contributions of one sign only.

        The latter are None where `inputs` has no negative ones. Overwrites `relevance`.
        """
        like, unlike, minus = weights
        bias = layer.bias
        if bias is not None:
            bias = bias.clamp(max=0) if minus else bias.clamp(min=0)
        total = layer.forward(inputs[0], like, bias)
        if inputs[1] is not None:
            total = total.add_(layer.forward(inputs[1], unlike))
        share = relevance.div_(_stabilise(total))
        for_negative_inputs = None if inputs[1] is None else layer.transpose(share, unlike, shape)
        return layer.transpose(share, like, shape), for_negative_inputs

    def hook(self) -> BasicHook:
        """The hook of zennit that defines this rule, AlphaBeta."""
        return zennit_rules.AlphaBeta(alpha=self.alpha, beta=self.alpha - 1, stabilizer=_stabilise)


@dataclass(frozen=True)
class ZPlus(Rule):
    """Relevance by positive contributions only: alpha-beta with alpha 1 and beta 0."""

    name: ClassVar[str] = "zplus"

    def multiplier(self, layer: Layer, a: Tensor | None, z: Tensor, m: Tensor, shape: torch.Size) -> Tensor:
        """The multiplier of the input, by a forward and a transposed map, or two of each for inputs of both signs."""
        return AlphaBeta(1.0, 0.0).multiplier(layer, a, z, m, shape)

    def hook(self) -> BasicHook:
        """The hook of zennit that defines this rule, ZPlus."""
        return zennit_rules.ZPlus(stabilizer=_stabilise)


@dataclass(frozen=True)
class WSquare(Rule):
    """Relevance by squared weights, whatever the input: for a first layer."""

    name: ClassVar[str] = "wsquare"

    def hook(self) -> BasicHook:
        """The hook of zennit that defines this rule, WSquare."""
        return zennit_rules.WSquare()


@dataclass(frozen=True)
class Flat(Rule):
    """Relevance spread evenly over the receptive field: for a first layer."""

    name: ClassVar[str] = "flat"

    def hook(self) -> BasicHook:
        """The hook of zennit that defines this rule, Flat."""
        return zennit_rules.Flat()


@dataclass(frozen=True)
class ZBox(Rule):
    """Rule for a first layer whose inputs lie between `low` and `high` (after normalisation; default: ImageNet's)."""

    low: float = -2.12
    high: float = 2.64
    name: ClassVar[str] = "zbox"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= 0 <= self.high):
            raise InputError(f"rule 'zbox' got low {self.low:g} and high {self.high:g}; expected low <= 0 <= high")

    def hook(self) -> BasicHook:
        """The hook of zennit that defines this rule, ZBox."""
        return zennit_rules.ZBox(low=self.low, high=self.high)


@dataclass(frozen=True)
class Norm(Rule):
    """The epsilon rule with zennit's fixed stabiliser, for normalising layers."""

    name: ClassVar[str] = "norm"
    needs_input: ClassVar[bool] = False

    def multiplier(self, layer: Layer, a: Tensor | None, z: Tensor, m: Tensor, shape: torch.Size) -> Tensor:
        """The multiplier of the input, by one transposed map."""
        return Epsilon().multiplier(layer, a, z, m, shape)

    def hook(self) -> BasicHook:
        """The hook of zennit that defines this rule, Norm."""
        return zennit_rules.Norm()


@dataclass(frozen=True)
class Pass(Rule):
    """Passes relevance on element by element, as zennit's Pass does; input and output need the same shape."""

    name: ClassVar[str] = "pass"

    def multiplier(self, layer: Layer, a: Tensor | None, z: Tensor, m: Tensor, shape: torch.Size) -> Tensor:
        """The multiplier of the input, m z / a, stabilised.

        Raises `ModelError` where input and output differ in shape.
        """
        assert a is not None
        if z.shape != shape:
            raise ModelError(
                f"rule 'pass' met a layer from {tuple(shape[1:])} to {tuple(z.shape[1:])}; it needs equal shapes: "
                "use another rule for this part"
            )
        return _divide(m * z, a)


RULES: Mapping[str, type[Rule]] = {
    rule.name: rule for rule in (Epsilon, Gamma, ZPlus, AlphaBeta, WSquare, Flat, ZBox, Norm, Pass)
}
"""Rule name -> class, for all LRP rules that the text of a composite may name."""

_HOMOGENEOUS = (
    zennit_rules.Epsilon,
    zennit_rules.Gamma,
    zennit_rules.ZPlus,
    zennit_rules.AlphaBeta,
    zennit_rules.Norm,
)
"""Hooks of zennit whose modified inputs are the input a itself, or its positive or negative part."""


class _Parametrised(nn.Module):
    """A `Layer` in the form of the module that zennit's hooks expect."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)

    def forward(self, a: Tensor) -> Tensor:
        return self.layer.forward(a, self.weight, self.bias)


def hook_multiplier(hook: BasicHook, layer: Layer, a: Tensor, z: Tensor, m: Tensor) -> Tensor:
    """The multiplier of the input by any hook of zennit: the hook is fed the relevance m z, and its result is divided
    by a.

    Where every modified input is a on one branch of its sign and 0 on the other, the division is exact, also at a = 0:
    the hook's own reducer is given the derivatives of its inputs in place of the inputs (a >= 0 takes the positive
    branch). For the other hooks (z-box, w^2, flat) relevance is divided by a; an input of 0 cannot hold any.
    """
    hook.stored_tensors["input"] = (a,)
    exact = isinstance(hook, _HOMOGENEOUS)
    if exact:
        branch, reduce = _take_sign(a), hook.reducer
        slopes = [modify(branch) * branch for modify in hook.input_modifiers]
        hook.reducer = lambda inputs, gradients: reduce(slopes, gradients)
    (result,) = hook.backward(_Parametrised(layer), (a,), (m * z,))
    return result if exact else _divide(result, a)


def _divide(relevance: Tensor, a: Tensor) -> Tensor:
    """relevance / a: the multiplier m with a m = relevance; 0 where a is 0."""
    return relevance / a.masked_fill(a.abs() < 1e-12, math.inf)
