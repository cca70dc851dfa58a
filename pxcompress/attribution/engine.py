"""Attributions at the price of a gradient: a folded copy of a model, whose backward pass is relevance propagation.

Every rule is a modified gradient m, with relevance a * m at every tensor a. Residual sums, concatenation, pooling and
reshaping then need no rule: autograd shares relevance in proportion to contributions. A softmax that the model ends in
is left out: relevance starts at logits. Every layer that runs has a gradient (see `reach`).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pxcompress.attribution import transformer
from pxcompress.attribution.attention import ATTENTION, multi_head_attention
from pxcompress.attribution.canonize import fold_batchnorm
from pxcompress.attribution.composites import Composite, Part, split_by_depth
from pxcompress.attribution.layers import LINEAR_FUNCTIONS, as_layer, bind
from pxcompress.attribution.marks import JUMPS, SOFTMAXES, Call, changes_in_place, prepare_call, results_in, set_mark_
from pxcompress.attribution.plrp import RelevancePruning
from pxcompress.attribution.reach import Reach
from pxcompress.attribution.rule_passes import apply_rule, keep_before_change
from pxcompress.attribution.rules import Epsilon, Rule
from pxcompress.attribution.twin import (
    check_same,
    classifier_names,
    copy_for_attribution,
    default_example,
    give_identity_rules_,
)
from pxcompress.errors import ModelError
from pxcompress.state import device_of, gradients


@dataclass(frozen=True)
class RuledLayer:
    """A layer and its rule, for listings: `name` is the module that holds the weight, `part` its part of the net."""

    name: str
    kind: str
    part: Part
    rule: Rule


@dataclass(frozen=True)
class UnruledFunction:
    """A torch function without an LRP rule, through which relevance flows by its ordinary gradient.

    `module` and `kind` are the name and class of the module it runs in, `function` is its name.
    """

    module: str
    kind: str
    function: str
    calls: int


@dataclass(frozen=True)
class Flow:
    """Relevance that enters and leaves one executed layer or function, over a batch, as shares of the output's.

    What biases (and a stabiliser) absorbed is `relevance_out - relevance_in`. `size` is the sum of the sizes of the
    relevances of the output. A function without a rule has no `rule` and no `relevance_in`.
    """

    name: str
    kind: str
    rule: Rule | None
    relevance_in: float | None
    relevance_out: float
    size: float


@dataclass(frozen=True, eq=False)
class AttributedModel:
    """A copy of a model whose gradients follow LRP rules, its layers in executed order, and functions without a rule.

    With `out = attributed.model(x)`, `x.requires_grad` and a start relevance `start` of the shape of `out`,
    `torch.autograd.grad(out, tensors, start)` are the multipliers m of `tensors`. Forward hooks run under the rules
    too: they may keep tensors, but arithmetic with them belongs behind `detach`.
    """

    model: nn.Module
    layers: tuple[RuledLayer, ...]
    unruled: tuple[UnruledFunction, ...]
    _rules: _Rules

    def flow(self, x: Tensor, start: Callable[[Tensor], Tensor]) -> tuple[Flow, ...]:
        """Relevance in and out of every layer, and through every function without a rule, in executed order.

        `start` maps the output to its multipliers; the starting relevance, sum of start(out) * out, must not be 0.
        """
        with gradients():
            with self._rules.tracing(self.model) as trace:
                out = self.model(x.detach().clone().requires_grad_())
            multipliers = start(out.detach())
            total = float((multipliers * out.detach()).sum())
            tensors = [tensor for row in trace for tensor in (row.a, row.z) if tensor is not None]
            flows = torch.autograd.grad(out, tensors, multipliers, allow_unused=True)
        relevance = {
            id(tensor): torch.zeros(()) if m is None else tensor.detach() * m
            for tensor, m in zip(tensors, flows, strict=True)
        }
        rows = []
        for row in trace:
            r_in, r_out = None if row.a is None else relevance[id(row.a)], relevance[id(row.z)]
            into = None if r_in is None else float(r_in.sum()) / total
            size = float(r_out.abs().sum()) / abs(total)
            rows.append(Flow(row.name, row.kind, row.rule, into, float(r_out.sum()) / total, size))
        return tuple(rows)


class _TracedCall(NamedTuple):
    """One executed layer (with its rule and input), or one executed function without a rule, and its output."""

    name: str
    kind: str
    rule: Rule | None
    a: Tensor | None
    z: Tensor


@contextmanager
def attributed(
    model: nn.Module, composite: Composite | None, example: Tensor | None, pruning: RelevancePruning | None = None
) -> Iterator[AttributedModel]:
    """A context with a copy of `model` whose gradients follow the rules of `composite`; None keeps ordinary gradients.

    With `pruning` every layer but the first passes on only the relevances that it leaves (PLRP). The copy is in eval
    mode, without parameter gradients or in-place activations, with BatchNorm folded where there are rules, and every
    module has the name it had. `example` is an input of shape (n, ...), of which one sample is used to see which layers
    run in which order; None stands for zeros of the size that a timm model names itself. Raises `ModelError` for a
    model that has no layer with a rule or cannot be copied, and for a copy that computes something else.
    """
    twin = copy_for_attribution(model)
    example = (default_example(model) if example is None else example.detach()[:1]).to(device_of(model))
    with torch.no_grad():
        expected = twin(example)
    unfolded_names: tuple[str, ...] = ()
    if composite is not None:
        unfolded_names = fold_batchnorm(twin, example)
        give_identity_rules_(twin)
    mode = _Rules(twin, composite, pruning)
    with mode.reach.attached(twin):
        with gradients():
            layers = mode.prepare(twin, example, expected)
        forward = twin.forward

        def forward_with_rules(*args: Any, **kwargs: Any) -> Any:
            return mode.run(partial(forward, *args, **kwargs), next(iter((*args, *kwargs.values()))))

        object.__setattr__(twin, "forward", forward_with_rules)
        try:
            yield AttributedModel(twin, layers, _list_unruled(twin, mode.unruled, unfolded_names), mode)
        finally:
            object.__setattr__(twin, "forward", forward)


def _list_unruled(
    twin: nn.Module, counts: Mapping[tuple[str, str], int], unfolded_names: tuple[str, ...]
) -> tuple[UnruledFunction, ...]:
    rows = [
        UnruledFunction(module, _get_kind(twin, module), function, calls)
        for (module, function), calls in counts.items()
    ]
    return (
        *rows,
        *(UnruledFunction(name, _get_kind(twin, name), "batch_norm, not folded", 1) for name in unfolded_names),
    )


def _get_kind(twin: nn.Module, name: str) -> str:
    return type(twin.get_submodule(name)).__name__


class _Rules(TorchFunctionMode):
    """A mode in which torch functions get the gradients of their LRP rules when the forward pass calls them."""

    def __init__(self, twin: nn.Module, composite: Composite | None, pruning: RelevancePruning | None) -> None:
        super().__init__()
        self._composite = composite
        self._pruning = pruning
        self._samples = 0  # inputs of this forward pass
        self._sample_axis = 0  # of the layers that run now
        self._handlers = transformer.handlers() | dict(ATTENTION[composite.softmax]) if composite else {}
        self.reach = Reach()
        self._softmaxes = 0  # calls in this forward pass
        self._undone: frozenset[int] = frozenset()  # softmax calls that the model ends in
        self._inside: set[int] = set()  # softmax calls whose result is used within the model
        self._names = {id(weight): name.rpartition(".")[0] for name, weight in twin.named_parameters()}
        self._rules: dict[str, Rule] = {}
        self._kinds: dict[str, str] = {}  # layers in the order of their first call: key -> function
        self._shown: dict[str, str] = {}  # key -> name of the module that ran it, for computed weights
        self._computed = 0  # calls with a weight that is no parameter, in this forward pass
        self._module: list[str] | None = None  # names of the modules that are running, while watching
        self._trace: list[_TracedCall] | None = None
        self.unruled: Counter[tuple[str, str]] = Counter()

    def run(self, forward: Callable[[], Any], source: Any, *, all_outputs: bool = False) -> Any:
        """Run one forward pass, `forward`, on the input `source` under the rules."""
        self._computed, self._softmaxes, self._samples = 0, 0, len(source)
        with self:
            return self.reach.run(forward, source, all_outputs=all_outputs)

    def prepare(self, twin: nn.Module, example: Tensor, expected: Any) -> tuple[RuledLayer, ...]:
        """Run the copy once, and give each layer a rule. Raises `ModelError` if its output is not `expected`."""
        output = self._run_watched(twin, example)
        check_same(expected, output, type(twin).__name__)
        if not transformer.carries_gradient(output):
            raise ModelError(
                f"what {type(twin).__name__} returns does not follow its input by gradients; give a model that returns "
                "logits, not classes"
            )
        self._undone = results_in(output) - self._inside
        gates = self.reach.find_gates(output)
        if gates or self._undone:
            self.unruled.clear()
            output = self._run_watched(twin, example)
        if gates:
            self.reach.find_lost(output)
        self.reach.outputs.clear()
        return self._bind_rules(twin) if self._composite is not None else ()

    def _run_watched(self, twin: nn.Module, example: Tensor) -> Any:
        """The output of a pass that records which layers run, and which functions have no rule."""
        source = example.clone().requires_grad_()
        with self._watch_calls(twin):
            return self.run(partial(twin, source), source, all_outputs=True)

    def _bind_rules(self, twin: nn.Module) -> tuple[RuledLayer, ...]:
        """Give every layer that ran its rule by depth, and list them. Raises `ModelError`."""
        assert self._composite is not None
        if not self._kinds:
            raise ModelError(
                f"{type(twin).__name__} runs no convolution or linear layer on its input, so there is no relevance to "
                "propagate; give a model that has one"
            )
        last_layer = list(self._kinds)[-1]
        heads = classifier_names(twin)
        parts = split_by_depth([key == last_layer or key in heads for key in self._kinds])
        layers: list[RuledLayer] = []
        for (key, kind), part in zip(self._kinds.items(), parts, strict=True):
            choice = self._composite.choice(part)
            rule = choice.linear if kind == "linear" else choice.convolution
            self._rules[key] = self._pruning.rule(rule) if self._pruning and layers else rule
            layers.append(RuledLayer(self._shown.get(key, key), kind, part, self._rules[key]))
        return tuple(layers)

    @contextmanager
    def tracing(self, twin: nn.Module) -> Iterator[list[_TracedCall]]:
        """A context that yields a list, which a forward pass in the context fills with its calls of ruled functions."""
        unruled = self.unruled.copy()
        self._trace = []
        try:
            with self._watch_calls(twin):
                yield self._trace
        finally:
            self._trace, self.unruled = None, unruled

    @contextmanager
    def _watch_calls(self, twin: nn.Module) -> Iterator[None]:
        """A context in which the name of the module that runs is known, and functions without a rule are recorded."""
        self._module = [""]
        with ExitStack() as stack:
            for name, module in twin.named_modules():
                stack.callback(module.register_forward_pre_hook(partial(self._enter, name)).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            stack.callback(setattr, self, "_module", None)
            yield

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        assert self._module is not None
        self._module.append(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self._module is not None
        self._module.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = kwargs.get("inplace") or changes_in_place(name)
        if in_place and args:
            keep_before_change(args[0])
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:  # a model's own no_grad: its layers count nevertheless
            return None
        if name == "multi_head_attention_forward" and self._composite is not None:
            return self._run_attention(func, args, kwargs)
        constant = self._composite is not None and self._composite.softmax == "cp"
        call = prepare_call(name, args, kwargs, constant=constant, in_place=bool(in_place))
        result = self._undo(name, call)
        result = self._call(func, name, call) if result is None else result
        return self._mark_result(name, call, result)

    def _undo(self, name: str, call: Call) -> Tensor | None:
        """The input of a softmax that ends the model, or of its log, to use as its result; None for other calls."""
        ends = name in SOFTMAXES and self._softmaxes in self._undone
        ends |= name == "log" and bool(call.mark.results & self._undone)
        return call.args[0].view_as(call.args[0]) if ends and call.args else None

    def _mark_result(self, name: str, call: Call, result: Any) -> Any:
        """`result` with the mark that says which softmaxes it comes from."""
        mark = call.mark
        if name in JUMPS and isinstance(result, Tensor):
            result = result.detach()
        if name in SOFTMAXES:
            mark = mark._replace(softmaxes=mark.softmaxes + 1, results=frozenset((self._softmaxes,)))
            self._softmaxes += 1
        if set_mark_(result, mark):
            self._inside |= results_in((call.args, call.kwargs)) - mark.results
        return result

    def _call(self, func: Callable[..., Any], name: str, call: Call) -> Any:
        args, kwargs = call.args, call.kwargs
        if self._composite is None or call.open:
            return func(*args, **kwargs)
        if name in LINEAR_FUNCTIONS:
            return self._run_layer(func, name, args, kwargs)
        if name in self._handlers:
            return self._handlers[name](func, *args, **kwargs)
        result = func(*args, **kwargs)
        if self._module is not None and transformer.carries_gradient(result) and not _is_plain(name, args):
            self.unruled[self._module[-1], name] += 1
            if self._trace is not None:
                self._trace.append(_TracedCall(self._module[-1], name, None, None, result))
                return result.clone()
        return result

    def _run_attention(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        bound.apply_defaults()
        values = bound.arguments
        extras = (values["bias_k"], values["bias_v"], values["static_k"], values["static_v"])
        if values["add_zero_attn"] or any(extra is not None for extra in extras) or values["query"].dim() != 3:
            if self._module is not None:
                self.unruled[self._module[-1], "multi_head_attention_forward"] += 1
            return func(*args, **kwargs)
        self._sample_axis = 1  # tokens first
        try:
            with self:
                return multi_head_attention(**values)
        finally:
            self._sample_axis = 0

    def _run_layer(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        values = bind(name, args, kwargs)
        a, weight = values["input"], values["weight"]
        key = self._make_key(name, weight)
        if not transformer.carries_gradient(a) or weight.dim() < 2:
            return func(*args, **kwargs)
        if self._module is not None:
            self._kinds.setdefault(key, name)
            if "#" in key:
                self._shown[key] = self._module[-1]
            if transformer.carries_gradient(weight):
                self.unruled[self._module[-1], f"{name}, weight made from the input"] += 1
        rule = self._rules.get(key)
        if rule is None:
            if self._module is None:
                raise ModelError(
                    f"layer {key!r} did not run on the example input; give an example that runs every layer"
                )
            rule = Epsilon(0.0)
        a, layer = as_layer(name, values)
        layer = replace(layer, samples=self._samples, sample_axis=self._sample_axis)
        if self._trace is not None:
            a = transformer.scale_gradient(a, 1.0)
        z = apply_rule(a, layer, rule)
        if self._trace is not None:
            self._trace.append(_TracedCall(self._shown.get(key, key), name, rule, a, z))
            return z.clone()
        return z

    def _make_key(self, function: str, weight: Tensor) -> str:
        """The name of the module that owns the weight or what it is a view of; a numbered name for computed weights."""
        for tensor in (weight, weight._base):
            if tensor is not None and id(tensor) in self._names:
                return self._names[id(tensor)]
        self._computed += 1
        return f"{function}#{self._computed}"


def _is_plain(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a function's ordinary gradient is its LRP rule, as of sums, and of BatchNorm with fixed statistics."""
    return name in transformer.PLAIN_FUNCTIONS or (name == "batch_norm" and len(args) > 1 and args[1] is not None)
