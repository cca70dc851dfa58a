"""Folds constants per channel that are multiplied or added behind a layer into its weights, in the graph itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from pxcompress.onnx_in.opening import only_reader, opset_of, settings_of
from pxcompress.onnx_in.trial import Trials

AS_FACTOR: dict[str, Callable[[Tensor], Tensor]] = {"Mul": lambda value: value, "Div": lambda value: 1 / value}
AS_SUMMAND: dict[str, Callable[[Tensor], Tensor]] = {"Add": lambda value: value, "Sub": lambda value: -value}


@dataclass(frozen=True)
class _Layer:
    """A node with weights, the axis of the weights for its outputs, and the Add of its bias if that is a separate
    node.
    """

    node: ir.Node
    bias: ir.Node | None = None


def fold_scales_(model: ir.Model, trials: Trials) -> bool:
    """Fold constant factors and summands into the layers in front of them, in place; returns whether there were any."""
    nodes = [node for node in model.graph if node.op_type in {*AS_FACTOR, *AS_SUMMAND}]
    folded = [_fold_one_(model, node, trials) for node in nodes]
    return any(folded)


def _fold_one_(model: ir.Model, node: ir.Node, trials: Trials) -> bool:
    operands = _operands(node, trials)
    if operands is None:
        return False
    x, value = operands
    shape = trials.shape(x)
    axis = find_varying_axis(value, shape)
    if axis is None or trials.shape(node.outputs[0]) != shape:
        return False
    layer = _layer_above(x, axis, trials)
    if layer is None or (node.op_type in AS_SUMMAND and layer.node.op_type == "MatMul" and layer.bias is None):
        return False  # the Add behind a MatMul is its bias
    flat = value.double().reshape(-1)
    factor = AS_FACTOR[node.op_type](flat) if node.op_type in AS_FACTOR else None
    summand = AS_SUMMAND[node.op_type](flat) if node.op_type in AS_SUMMAND else None
    if not _absorb_(model, trials, layer, (factor, summand)):
        return False
    node.outputs[0].replace_all_uses_with(x, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    return True


def _operands(node: ir.Node, trials: Trials) -> tuple[ir.Value, Tensor] | None:
    """The computed operand and the constant operand of a node; None unless it has one of each."""
    first, second = node.inputs
    if first is None or second is None:
        return None
    values = trials.constant(first), trials.constant(second)
    if (values[0] is None) == (values[1] is None):
        return None
    x, value = (first, values[1]) if values[0] is None else (second, values[0])
    if value is None or not value.is_floating_point() or (node.op_type in ("Div", "Sub") and x is not first):
        return None
    return x, value


def find_varying_axis(value: Tensor, shape: Sequence[int]) -> int | None:
    """The only axis of `shape` along which a constant varies; None if there is none, or several."""
    if value.dim() > len(shape):
        return None
    sizes = [1] * (len(shape) - value.dim()) + list(value.shape)
    axes = [axis for axis, size in enumerate(sizes) if size != 1]
    return axes[0] if len(axes) == 1 and sizes[axes[0]] == shape[axes[0]] else None


def _layer_above(x: ir.Value, axis: int, trials: Trials) -> _Layer | None:
    """The layer whose outputs are along `axis` of `x`, across transposes and the Add of a bias; None without one."""
    while (node := x.producer()) is not None and only_reader(x) is not None:
        rank = len(trials.shape(x))
        if node.op_type == "Transpose":
            axis, x = list(node.attributes["perm"].value)[axis], node.inputs[0]  # type: ignore[assignment]
            continue
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            fits = axis == 1 and trials.constant(node.inputs[1]) is not None
            return _Layer(node) if fits else None
        if node.op_type == "MatMul":
            return _Layer(node) if _is_linear(node, trials) and axis == rank - 1 else None
        return _match_biased(node, axis, trials) if node.op_type == "Add" and axis == rank - 1 else None
    return None


def _match_biased(node: ir.Node, axis: int, trials: Trials) -> _Layer | None:
    """The MatMul in front of an Add that is its bias; None if the Add is something else."""
    operands = _operands(node, trials)
    if operands is None or find_varying_axis(operands[1], trials.shape(node.outputs[0])) != axis:
        return None
    above = operands[0].producer()
    if above is None or above.op_type != "MatMul" or not _is_linear(above, trials):
        return None
    return _Layer(above, node) if only_reader(operands[0]) is node else None


def _is_linear(node: ir.Node, trials: Trials) -> bool:
    """Whether a MatMul multiplies by a constant matrix."""
    weight = trials.constant(node.inputs[1])
    return weight is not None and weight.dim() == 2


def _absorb_(model: ir.Model, trials: Trials, layer: _Layer, change: tuple[Tensor | None, Tensor | None]) -> bool:
    """Multiply a layer's outputs by `change[0]`, or add `change[1]`, by changing its weights.

    False if it cannot be done.
    """
    factor, summand = change
    node = layer.node
    weight = trials.constant(node.inputs[1])
    assert weight is not None
    if node.op_type == "MatMul":
        if factor is not None:
            set_input(model, node, 1, (weight.double() * factor).float(), trials)
        if layer.bias is not None:
            place = 0 if trials.constant(layer.bias.inputs[0]) is not None else 1
            bias = trials.constant(layer.bias.inputs[place])
            assert bias is not None
            set_input(model, layer.bias, place, _change(bias.double().reshape(-1), change).reshape(bias.shape), trials)
        return True
    settings = settings_of(node, opset_of(model))
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    bias = trials.constant(bias_value)
    if (bias_value is not None and bias is None) or settings.get("beta", 1.0) != 1 or settings.get("alpha", 1.0) != 1:
        return False
    if factor is not None:
        wide = _weight_factor(node, factor, weight.dim(), settings.get("group", 1), bool(settings.get("transB")))
        set_input(
            model,
            node,
            1,
            (weight.double().reshape(wide.shape[0], -1, *weight.shape[1:]) * wide).float().reshape(weight.shape),
            trials,
        )
    if bias is not None or summand is not None:
        width = len(factor if factor is not None else summand)  # type: ignore[arg-type]
        own = torch.zeros(1) if bias is None else bias
        set_input(model, node, 2, _change(own.double().reshape(-1).expand(width), change), trials)
    return True


def _change(bias: Tensor, change: tuple[Tensor | None, Tensor | None]) -> Tensor:
    factor, summand = change
    return (bias if factor is None else bias * factor).add(0 if summand is None else summand).float()


def _weight_factor(node: ir.Node, factor: Tensor, rank: int, groups: int, turned: bool) -> Tensor:
    """Factors for a layer's outputs, shaped to multiply its weight, whose first axis is split into groups.

    `turned` says that the outputs lie on the weight's first axis (a transposed matrix).
    """
    if node.op_type == "ConvTranspose":  # (inputs, outputs of a group, ...), inputs by groups
        return factor.reshape(groups, 1, -1, *[1] * (rank - 2))
    if node.op_type == "Conv" or turned:
        return factor.reshape(1, -1, *[1] * (rank - 1))
    return factor.reshape(1, 1, -1)


def set_input(model: ir.Model, node: ir.Node, place: int, value: Tensor, trials: Trials | None = None) -> None:
    """Replace the constant input number `place` of a node; other nodes that read the old constant keep it."""
    before = node.inputs[place] if place < len(node.inputs) else None
    own = before.name if before is not None and before.is_initializer() else None
    base = own or f"{node.name or node.outputs[0].name}.{place}"
    name, count = base, 1
    while name in model.graph.initializers:
        name, count = f"{base}.{count}", count + 1
    array = np.ascontiguousarray(value.detach().cpu().numpy())
    made = ir.Value(name=name, const_value=ir.tensor(array.copy(), name=name))
    assert made.const_value is not None
    made.dtype, made.shape = made.const_value.dtype, ir.Shape(list(value.shape))
    model.graph.register_initializer(made)
    if trials is not None:
        trials.learn(made, value)
    if place >= len(node.inputs):
        node.resize_inputs(place + 1)
    node.replace_input_with(place, made)
    if before is not None and own and not list(before.uses()) and not before.is_graph_output():
        model.graph.initializers.pop(own, None)
        if made.name != own and own not in model.graph.initializers:
            model.graph.initializers.pop(name)
            made.name = own
            model.graph.register_initializer(made)
