"""The operators of a model that cost time, each as a small ONNX graph of its own, at any width.

Convolutions, dense layers and attention, with the activation that follows; shapes are read from one pass of the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from pxcompress.graph.dependencies import CONVOLUTIONS, PRODUCERS
from pxcompress.state import device_of, evaluating
from pxcompress.types import Group

OPSET = 20
ACTIVATIONS: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU: ("Relu",),
    nn.ReLU6: ("Clip",),
    nn.GELU: ("Gelu",),
    nn.SiLU: ("Sigmoid", "Mul"),
    nn.Hardswish: ("HardSwish",),
    nn.Sigmoid: ("Sigmoid",),
}
"""ONNX operators that make up an activation module; "Mul" multiplies by the activation's input."""

_TRANSPARENT = (nn.modules.batchnorm._BatchNorm, nn.Identity, nn.Dropout)


@dataclass(frozen=True)
class Operator:
    """One operator of a model: a convolution, linear layer or attention, with its widths.

    `rows` are the positions of its input (for a convolution one or two sizes). `inputs` and `outputs` are channels, or
    for attention heads, whose width is `kernel`. `positions` are those of the output of one sample; each has `outputs`
    elements. A "copy" belongs to no model: it does next to nothing, `kernel` times in a row.
    """

    kind: str
    rows: tuple[int, ...]
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    activation: tuple[str, ...] = ()
    positions: int = 0

    @property
    def depthwise(self) -> bool:
        """Whether it is a depthwise convolution, whose input and output always have the same width."""
        return self.kind == "conv" and self.groups == self.inputs == self.outputs > 1

    def weights(self, inputs: int, outputs: int) -> int:
        """Number of elements of the weight at these numbers of inputs and outputs."""
        if self.kind == "attention":
            return 0
        return (1 if self.depthwise else inputs // self.groups) * outputs * math.prod(self.kernel)

    def at(self, inputs: int, outputs: int) -> Operator:
        """The same operator with other numbers of inputs and outputs."""
        return replace(self, inputs=inputs, outputs=outputs, groups=inputs if self.depthwise else self.groups)

    def graph(self, batch: int) -> bytes:
        """The bytes of an ONNX model of this operator alone: input "x", one output, random weights, `batch` samples."""
        body = _BODIES[self.kind](self)
        graph = helper.make_graph(
            [node for node, _ in body.nodes],
            "operator",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.input_shape(batch))],
            [helper.make_tensor_value_info(body.output, TensorProto.FLOAT, None)],
            [weight for _, weights in body.nodes for weight in weights],
        )
        opset = helper.make_opsetid("", OPSET)
        return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())

    def input_shape(self, batch: int) -> tuple[int, ...]:
        """Shape of the input "x" for `batch` samples."""
        shapes = {
            "conv": (batch, self.inputs, *self.rows),
            "linear": (batch, *self.rows, self.inputs),
            "attention": (batch, self.inputs, *self.rows, *self.kernel),
            "copy": (batch, self.inputs, *self.rows),
        }
        return shapes[self.kind]


def find_operators(model: nn.Module, groups: Sequence[Group], example: Tensor) -> dict[str, Operator]:
    """Module name -> operator, for everything in `model` that multiplies, in execution order; one pass of `example`.

    Attention is listed under the names of the groups of heads. A module called twice counts as its last call.
    """
    operators_by_name: dict[str, Operator] = {}
    order: list[tuple[str, nn.Module]] = []
    heads = {group.name: group for group in groups if group.kind == "head"}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def read(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            order.append((name, module))
            if isinstance(module, PRODUCERS) and isinstance(output, Tensor):
                operators_by_name[name] = _read_operator(module, args[0], output)
            elif name in heads:
                operators_by_name[name] = _read_attention(heads[name], args[0])

        return read

    with evaluating(model), torch.no_grad():
        for name, module in model.named_modules():
            if not list(module.children()) or name in heads:
                module.register_forward_hook(hook(name))
        model(example[:1].to(device_of(model)))
    for (name, _), following in zip(order, _find_following(order), strict=True):
        if name in operators_by_name and following:
            operators_by_name[name] = replace(operators_by_name[name], activation=following)
    return operators_by_name


def _find_following(order: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, ...]]:
    """For every call in order, the ONNX operators of the activation right behind it.

    Norms between, which get folded, are skipped.
    """
    next_activation: tuple[str, ...] = ()
    result = []
    for _, module in reversed(order):
        result.append(next_activation)
        activation = next((names for kind, names in ACTIVATIONS.items() if isinstance(module, kind)), None)
        if activation is None and hasattr(module, "act"):  # timm's norms that hold an activation
            activation = next((names for kind, names in ACTIVATIONS.items() if isinstance(module.act, kind)), None)
        if activation is not None:
            next_activation = activation
        elif not isinstance(module, _TRANSPARENT):
            next_activation = ()
    return result[::-1]


def _read_operator(module: nn.Module, inputs: Tensor, output: Tensor) -> Operator:
    if isinstance(module, CONVOLUTIONS):
        padding = module.padding if not isinstance(module.padding, str) else _resolve_same_padding(module)
        return Operator(
            "conv",
            tuple(inputs.shape[2:]),
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            tuple(padding),
            module.dilation,
            module.groups,
            positions=output[0, 0].numel(),
        )
    assert isinstance(module, nn.Linear)
    rows = _count_windows(inputs) + tuple(inputs.shape[1:-1])
    return Operator("linear", rows, module.in_features, module.out_features, positions=math.prod(rows))


def _resolve_same_padding(module: Any) -> tuple[int, ...]:
    """Padding of a convolution in numbers, where the module has it as a word."""
    sizes = zip(module.kernel_size, module.dilation, strict=True)
    return tuple(dilation * (kernel - 1) // 2 if module.padding == "same" else 0 for kernel, dilation in sizes)


def _read_attention(group: Group, inputs: Tensor) -> Operator:
    width = group.members[0].index.shape[1]
    rows = (*_count_windows(inputs), math.prod(inputs.shape[1:-1]))
    return Operator("attention", rows, group.units, group.units, (width,), positions=math.prod(rows) * width)


def _count_windows(inputs: Tensor) -> tuple[int, ...]:
    """Number of windows that one sample is cut into, which run as a batch; empty if there is just one."""
    return () if len(inputs) == 1 else (len(inputs),)


@dataclass(frozen=True)
class _GraphNodes:
    """Nodes of an ONNX graph, each with its weights, and the name of the graph's output."""

    nodes: tuple[tuple[Any, tuple[Any, ...]], ...]
    output: str


def _make_conv(operator: Operator) -> _GraphNodes:
    weight = _make_weight("w", operator.outputs, operator.inputs // operator.groups, *operator.kernel)
    node = helper.make_node(
        "Conv",
        ["x", "w", "b"],
        ["y0"],
        strides=operator.stride,
        pads=[*operator.padding, *operator.padding],
        dilations=operator.dilation,
        group=operator.groups,
    )
    return _find_activations([(node, (weight, _make_weight("b", operator.outputs)))], operator)


def _make_linear(operator: Operator) -> _GraphNodes:
    product = (helper.make_node("MatMul", ["x", "w"], ["p"]), (_make_weight("w", operator.inputs, operator.outputs),))
    total = (helper.make_node("Add", ["p", "b"], ["y0"]), (_make_weight("b", operator.outputs),))
    return _find_activations([product, total], operator)


def _make_products(operator: Operator) -> _GraphNodes:
    *axes, tokens, width = range(len(operator.input_shape(1)))
    nodes = (
        helper.make_node("Transpose", ["x"], ["t"], perm=[*axes, width, tokens]),
        helper.make_node("MatMul", ["x", "t"], ["a"]),
        helper.make_node("Softmax", ["a"], ["s"], axis=-1),
        helper.make_node("MatMul", ["s", "x"], ["y0"]),
    )
    return _find_activations([(node, ()) for node in nodes], operator)


def _make_copies(operator: Operator) -> _GraphNodes:
    """A chain of depthwise 1 x 1 convolutions, as many as the operator's kernel says."""
    names = ["x", *(f"y{place}" for place in range(operator.kernel[0]))]
    nodes = [
        helper.make_node("Conv", [source, "w"], [target], group=operator.inputs)
        for source, target in itertools.pairwise(names)
    ]
    weights = (_make_weight("w", operator.inputs, 1, 1, 1),)
    return _GraphNodes(((nodes[0], weights), *((node, ()) for node in nodes[1:])), names[-1])


def _find_activations(nodes: list[tuple[Any, tuple[Any, ...]]], operator: Operator) -> _GraphNodes:
    name = "y0"
    for place, kind in enumerate(operator.activation, 1):
        sources = [name, "y0"] if kind == "Mul" else [name]
        name = f"y{place}"
        nodes.append((helper.make_node(kind, sources, [name]), ()))
    return _GraphNodes(tuple(nodes), name)


def _make_weight(name: str, *shape: int) -> onnx.TensorProto:
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) / np.sqrt(np.prod(shape[1:]) or 1)
    return numpy_helper.from_array(values.astype(np.float32), name)


_BODIES: Mapping[str, Callable[[Operator], _GraphNodes]] = {
    "conv": _make_conv,
    "linear": _make_linear,
    "attention": _make_products,
    "copy": _make_copies,
}
