"""Makes a backward pass reach every layer that runs, since scores read a gradient at each of them.

Autograd leaves out three kinds of layers. What a layer reads may not depend on the input (queries, tables of
positions): it is tied to the input by a gradient of zero. Its results may reach the output through attention weights
alone, which are constants: such a layer is a gate, and gets the gradient through the softmax. Or they reach it by no
gradient at all (rounded, detached, unused): then relevance is given to them as if the whole output came from them,
in proportion to their squares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pxcompress.attribution.marks import mark_of, set_mark_
from pxcompress.attribution.transformer import carries_gradient, scale_gradient


class LayerCall(NamedTuple):
    """The `number`-th call of a layer in one forward pass, counted from 0."""

    name: str
    number: int


class Reach:
    """Ensures that a backward pass from the output of `run` reaches every layer, also those without a gradient."""

    def __init__(self) -> None:
        self.gates: frozenset[LayerCall] = frozenset()
        self.lost: frozenset[LayerCall] = frozenset()  # the last calls on ways that no gradient comes back on
        self.outputs: dict[LayerCall, Tensor] = {}  # of all calls where all are asked for, else of the lost ones
        self._all = False
        self._source: Tensor | None = None
        self._numbers: Counter[str] = Counter()

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """A context with hooks at all convolutions and linear layers, which run before hooks that others register."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if isinstance(module, (_ConvNd, nn.Linear)):
                    stack.callback(module.register_forward_pre_hook(partial(self._before_call, name)).remove)
                    stack.callback(module.register_forward_hook(partial(self._after_call, name)).remove)
            yield

    def run(self, forward: Callable[[], Any], source: Any, *, all_outputs: bool = False) -> Any:
        """The output of `forward` for the input `source`, with links that let a backward pass reach every layer."""
        self._numbers.clear()
        self.outputs.clear()
        self._source, self._all = source, all_outputs
        try:
            out = forward()
            lost_outputs = [self.outputs[call] for call in sorted(self.lost) if call in self.outputs]
            return _LostRelevance.apply(out, *lost_outputs) if lost_outputs and carries_gradient(out) else out
        finally:
            self._source = None
            if not all_outputs:
                self.outputs.clear()

    def find_gates(self, out: Tensor) -> bool:
        """Whether some calls of the pass that made `out` have no gradient.

        From then on they are treated as gates: layers whose results reach the output through attention weights alone.
        """
        self.gates = frozenset(self._list_unreached(out, list(self.outputs)))
        return bool(self.gates)

    def find_lost(self, out: Tensor) -> None:
        """Find the calls that still have no gradient when gates let it pass, and store them in `lost`.

        Of calls that lead to each other only the last one is stored, since a gradient there reaches those before it.
        """
        calls_without_gradient = self._list_unreached(out, list(self.outputs))
        lost_calls = []
        while calls_without_gradient:
            last_call = calls_without_gradient.pop()
            lost_calls.append(last_call)
            calls_without_gradient = self._list_unreached(self.outputs[last_call], calls_without_gradient)
        self.lost = frozenset(lost_calls)

    def _list_unreached(self, out: Tensor, calls: Sequence[LayerCall]) -> list[LayerCall]:
        """The `calls` that a backward pass from `out` does not reach, in executed order."""
        outputs = [self.outputs[call] for call in calls]
        if not calls or not carries_gradient(out):
            return list(calls)
        start = torch.ones_like(out)
        gradients = torch.autograd.grad(out, outputs, start, allow_unused=True, retain_graph=True)
        return [call for call, gradient in zip(calls, gradients, strict=True) if gradient is None]

    def _before_call(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        call = LayerCall(name, self._numbers[name])
        if (
            not carries_gradient(self._source)
            or not torch.is_grad_enabled()
            or not args
            or not isinstance(args[0], Tensor)
        ):
            return None
        value, is_gate = args[0], call in self.gates
        if carries_gradient(value) and (not is_gate or mark_of(value).gate):
            return None
        mark = mark_of(value)._replace(gate=is_gate)
        value = scale_gradient(value, 0.0) if carries_gradient(value) else _ZeroGradientLink.apply(value, self._source)
        set_mark_(value, mark)
        return (value, *args[1:])

    def _after_call(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = LayerCall(name, self._numbers[name])
        self._numbers[name] += 1
        if carries_gradient(output) and (self._all or call in self.lost):
            self.outputs[call] = output


class _ZeroGradientLink(torch.autograd.Function):
    """Returns `value` unchanged, but makes it depend on `source` with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, m: Tensor) -> tuple[None, Tensor]:
        (source,) = ctx.saved_tensors
        return None, torch.zeros_like(source)


class _LostRelevance(torch.autograd.Function):
    """Returns `out` (n, ...) unchanged.

    Backward, other tensors a get its relevance R = sum out m as well, by a R / |a|^2. Sample by sample where the first
    axis of a tensor is that of the samples, else over all of them.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, *lost_outputs: Tensor) -> Tensor:
        ctx.save_for_backward(out, *lost_outputs)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, m: Tensor) -> tuple[Tensor, ...]:
        out, *lost_outputs = ctx.saved_tensors
        relevance = (out * m).flatten(1).sum(1)
        gradients = []
        for value in lost_outputs:
            samples = len(relevance) if len(value) % len(relevance) == 0 else 1
            rows = value.reshape(samples, -1)
            shares = relevance if samples == len(relevance) else relevance.mean().reshape(1)
            gradient = rows * (shares / rows.square().sum(1).clamp_min(1e-12))[:, None]
            gradients.append(gradient.reshape(value.shape).to(value.dtype))
        return m, *gradients
