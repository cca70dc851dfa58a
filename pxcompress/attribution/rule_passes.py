"""Layers whose backward pass is an LRP rule, as functions of PyTorch's autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pxcompress.attribution.layers import Layer
from pxcompress.attribution.rules import Rule
from pxcompress.errors import ModelError


class _SavedOutput:
    """A layer's output for its backward pass, which stays right if the model changes the output in place later."""

    def __init__(self, z: Tensor) -> None:
        self.z = z.detach()
        self._version = self.z._version

    def keep(self) -> None:
        """Copy the output; to be called before an in-place change."""
        self.z = self.z.clone()
        self._version = self.z._version

    def get(self) -> Tensor:
        """The output as it was computed. Raises `ModelError` where it was changed without a copy."""
        if self.z._version != self._version:
            raise ModelError(
                "the model changes a view of a layer's output in place, so its relevance is lost; "
                "use the out-of-place operation in the model's forward"
            )
        return self.z


class _RuleFunction(torch.autograd.Function):
    """An autograd function: forward is the layer, backward is its LRP rule."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, layer: Layer, rule: Rule, saved_outputs: list[_SavedOutput]) -> Tensor:
        z = layer.forward(a, layer.weight, layer.bias)
        z = torch.ops.aten._unsafe_view(z, z.shape)  # a view made in here could not be changed in place by the model
        ctx.layer, ctx.rule, ctx.shape, ctx.output = layer, rule, a.shape, _SavedOutput(z)
        saved_outputs.append(ctx.output)
        if rule.needs_input:
            ctx.save_for_backward(a)
        return z

    @staticmethod
    def backward(ctx: Any, m: Tensor) -> tuple[Tensor, None, None, None]:
        a = ctx.saved_tensors[0] if ctx.rule.needs_input else None
        return ctx.rule.multiplier(ctx.layer, a, ctx.output.get(), m, ctx.shape), None, None, None


def apply_rule(a: Tensor, layer: Layer, rule: Rule) -> Tensor:
    """The layer's output, whose gradient towards `a` is the rule's multiplier."""
    saved_outputs: list[_SavedOutput] = []
    z = _RuleFunction.apply(a, layer, rule, saved_outputs)
    z._px_saved = saved_outputs[0]
    return z


def keep_before_change(value: Any) -> None:
    """Save a layer's output before it, or a view of it, is changed in place."""
    for tensor in (value, getattr(value, "_base", None)):
        if isinstance(saved_output := getattr(tensor, "_px_saved", None), _SavedOutput):
            saved_output.keep()
