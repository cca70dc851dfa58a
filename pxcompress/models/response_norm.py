"""Rewrites global response normalisation (ConvNeXt V2) with its mean over channels as a layer, so that channels can go.

A channel is divided by the mean over all channels, so one that is gone would change the divisor of the others twice: by
what it added, and by the number of channels. As a layer with the weights 1 / C the mean keeps the number of the dense
model, a removed channel is a removed input of it, and a repair can put back what that input was on average.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from pxcompress.state import evaluating

TOLERANCE = 1e-5
"""Largest accepted difference between a norm and its rewritten version, as a share of the outputs' scale."""

EPSILON = 1e-6
"""Number added to the mean, for norms without an attribute `eps`."""


class ExplicitResponseNorm(nn.Module):
    """x + bias + weight x G / (mean of G + eps), where G is each channel's L2 norm over its positions.

    `mean` is a linear layer over the channels of (n, height, width, C), or a convolution over those of (n, C, height,
    width).
    """

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, *, channels_last: bool) -> None:
        super().__init__()
        channels = weight.numel()
        self.eps, self.positions = eps, (1, 2) if channels_last else (2, 3)
        self.shape = (-1,) if channels_last else (-1, 1, 1)
        self.weight, self.bias = (nn.Parameter(value.detach().flatten().clone()) for value in (weight, bias))
        layer, size = (nn.Linear, ()) if channels_last else (nn.Conv2d, (1,))
        self.mean = skip_init(layer, channels, 1, *size, bias=False).to(weight).requires_grad_(requires_grad=False)
        nn.init.constant_(self.mean.weight, 1 / channels)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x, of shape (n, height, width, C) or (n, C, height, width)."""
        size = x.norm(p=2, dim=self.positions, keepdim=True)
        scaled_input = x * (size / (self.mean(size) + self.eps))
        return x + torch.addcmul(self.bias.view(self.shape), self.weight.view(self.shape), scaled_input)


def is_response_norm(module: nn.Module) -> bool:
    """Whether a module computes a global response norm, whatever it is called."""
    return explicit_response_norm(module) is not None


def explicit_response_norm(module: nn.Module) -> ExplicitResponseNorm | None:
    """A version of `module` with the mean as a layer; None if it is no global response norm."""
    parameters = list(module._parameters.values())
    if len(parameters) != 2 or module._modules or module._buffers or type(module).__module__.startswith("torch.nn"):
        return None
    weight, bias = parameters
    if weight is None or bias is None or weight.shape != bias.shape or weight.numel() < 2:
        return None
    eps = float(getattr(module, "eps", None) or EPSILON)
    for channels_last in (True, False):
        if _is_same(module, ExplicitResponseNorm(weight, bias, eps, channels_last=channels_last)):
            return ExplicitResponseNorm(weight, bias, eps, channels_last=channels_last)
    return None


def _is_same(module: nn.Module, explicit: ExplicitResponseNorm) -> bool:
    """Whether both modules compute the same, tried with non-zero weights, since a new norm's are zero."""
    draw, channels = torch.Generator().manual_seed(0), explicit.weight.numel()
    inputs = torch.randn(2, 3, 5, channels, generator=draw).to(explicit.weight)
    inputs = inputs if explicit.shape == (-1,) else inputs.movedim(-1, 1)
    try:
        twin = copy.deepcopy(module)
        with torch.no_grad(), evaluating(twin):
            for parameter, explicit_parameter in zip(twin.parameters(), explicit.parameters(), strict=False):
                explicit_parameter.copy_(torch.randn(channels, generator=draw))
                parameter.copy_(explicit_parameter.view_as(parameter))
            expected = twin(inputs)
    except Exception:  # noqa: BLE001  (a user's module may refuse to be copied, or want another input)
        return False
    if not isinstance(expected, Tensor) or expected.shape != inputs.shape:
        return False
    with torch.no_grad():
        return bool((explicit(inputs) - expected).abs().max() <= TOLERANCE * expected.abs().max())
