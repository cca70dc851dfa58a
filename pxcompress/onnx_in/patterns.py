"""Finds activations and norms that exporters write as several nodes, and slices that together cut up a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import onnx_ir as ir
import torch.nn.functional as F
from torch import Tensor

from pxcompress.onnx_in.opening import only_reader, opset_of, readers, settings_of
from pxcompress.onnx_in.operators.table import to_ints
from pxcompress.onnx_in.trial import Trials


@dataclass(frozen=True)
class Pattern:
    """Nodes that together compute one function of `x`; a step for it is added at the place of the node `at`.

    `kind` is the name of the function, or of the layer that is made from `weight` and `bias`.
    """

    kind: str
    nodes: tuple[ir.Node, ...]
    at: ir.Node
    x: ir.Value
    outputs: tuple[ir.Value, ...]
    function: Callable[[Tensor], Tensor] | None = None
    weight: tuple[ir.Value, Tensor] | None = None
    bias: Tensor | None = None
    number: float = 0.0

    @property
    def closed(self) -> bool:
        """Whether no node outside of the pattern reads a value from inside it."""
        inside, made = set(self.nodes), set(self.outputs)
        values = [value for node in self.nodes for value in node.outputs if value not in made]
        return not any(value.is_graph_output() or set(readers(value)) - inside for value in values)


class Finder:
    """Finds the patterns in a graph, one node at a time."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self.opset = opset_of(trials.model)
        self.order = {node: place for place, node in enumerate(trials.model.graph)}

    def find(self, node: ir.Node) -> Pattern | None:
        """The pattern for which `node` is the first or characteristic one; None if there is none."""
        find = {
            "Erf": self._gelu,
            "Sigmoid": self._silu,
            "HardSigmoid": self._hard_swish_of_sigmoid,
            "Clip": self._hard_swish,
            "ReduceMean": self._layer_norm,
            "MatMul": self._linear,
        }.get(node.op_type)
        pattern = find(node) if find else None
        return pattern if pattern is not None and pattern.closed else None

    def _number(self, value: ir.Value | None) -> float | None:
        """The value of a constant with a single number; None for anything else."""
        tensor = self.trials.constant(value)
        return float(tensor.reshape(-1)[0]) if tensor is not None and tensor.numel() == 1 else None

    def _beside(self, node: ir.Node | None, kind: str, number: float) -> ir.Value | None:
        """The other operand of `node`, if it is of this `kind` with `number` as a constant operand; else None."""
        if node is None or node.op_type != kind:
            return None
        for place in (1, 0) if kind in ("Mul", "Add") else (1,):
            operand = self._number(node.inputs[place])
            if operand is not None and abs(operand - number) <= 1e-3 * max(abs(number), 1e-3):
                return node.inputs[1 - place]
        return None

    def _gelu(self, node: ir.Node) -> Pattern | None:
        """The pattern of GELU, x * (erf(x / sqrt 2) + 1) * 0.5, with the factors in any order; None for others."""
        scaled = node.inputs[0].producer() if node.inputs[0] is not None else None
        x = self._beside(scaled, "Div", sqrt(2))
        x = x if x is not None else self._beside(scaled, "Mul", sqrt(0.5))
        plus = only_reader(node.outputs[0])
        if x is None or scaled is None or plus is None or self._beside(plus, "Add", 1.0) is None:
            return None
        nodes, missing = [scaled, node, plus], {"x", "half"}
        while missing:
            after = only_reader(nodes[-1].outputs[0])
            if after is None or after.op_type != "Mul":
                return None
            other = next((value for value in after.inputs if value is not nodes[-1].outputs[0]), None)
            factors, inner = self._gelu_factor(other, x)
            if not factors or not factors <= missing:
                return None
            missing -= factors
            nodes[3:3] = inner
            nodes.append(after)
        return Pattern("Gelu", tuple(nodes), nodes[-1], x, (nodes[-1].outputs[0],), F.gelu)

    def _gelu_factor(self, value: ir.Value | None, x: ir.Value) -> tuple[set[str], list[ir.Node]]:
        """Which factors of GELU a value contains ("x", "half", ...), and the nodes that multiply them."""
        if value is x:
            return {"x"}, []
        if self._number(value) == 0.5:
            return {"half"}, []
        joined = value.producer() if value is not None else None
        if joined is not None and self._beside(joined, "Mul", 0.5) is x:
            return {"x", "half"}, [joined]
        return set(), []

    def _silu(self, node: ir.Node) -> Pattern | None:
        x, after = node.inputs[0], only_reader(node.outputs[0])
        if x is None or after is None or after.op_type != "Mul" or x not in after.inputs:
            return None
        return Pattern("Silu", (node, after), after, x, (after.outputs[0],), F.silu)

    def _hard_swish_of_sigmoid(self, node: ir.Node) -> Pattern | None:
        settings, x, after = settings_of(node, self.opset), node.inputs[0], only_reader(node.outputs[0])
        usual = abs(settings.get("alpha", 0.2) - 1 / 6) < 1e-6 and settings.get("beta", 0.5) == 0.5
        if x is None or not usual or after is None or after.op_type != "Mul" or x not in after.inputs:
            return None
        return Pattern("Hardswish", (node, after), after, x, (after.outputs[0],), F.hardswish)

    def _hard_swish(self, node: ir.Node) -> Pattern | None:
        """The pattern of hard swish, x * clip(x + 3, 0, 6) / 6, or of hard sigmoid, which is the same without x."""
        plus = node.inputs[0].producer() if node.inputs[0] is not None else None
        x = self._beside(plus, "Add", 3.0)
        if x is None or plus is None or self._bounds(node) != (0, 6):
            return None
        nodes, missing = [plus, node], {"x", "sixth"}
        while missing:
            after = only_reader(nodes[-1].outputs[0])
            if after is None:
                break
            if "x" in missing and after.op_type == "Mul" and x in after.inputs:
                missing -= {"x"}
            elif "sixth" in missing and self._is_sixth(after):
                missing -= {"sixth"}
            else:
                break
            nodes.append(after)
        if "sixth" in missing:
            return None
        function = F.hardsigmoid if missing else F.hardswish
        return Pattern(function.__name__.title(), tuple(nodes), nodes[-1], x, (nodes[-1].outputs[0],), function)

    def _is_sixth(self, node: ir.Node) -> bool:
        return self._beside(node, "Div", 6.0) is not None or self._beside(node, "Mul", 1 / 6) is not None

    def _bounds(self, node: ir.Node) -> tuple[float | None, float | None]:
        """Lower and upper bound of a Clip node."""
        if len(node.inputs) == 1:
            settings = settings_of(node, self.opset)
            return settings.get("min"), settings.get("max")
        low, high = (*node.inputs[1:], None)[:2]
        return self._number(low), self._number(high)

    def _layer_norm(self, node: ir.Node) -> Pattern | None:
        """The pattern of a LayerNorm over the last axis: (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight +
        bias.
        """
        x = node.inputs[0]
        if x is None or self.trials.shape(node.outputs[0]) != (*self.trials.shape(x)[:-1], 1):
            return None
        subs = readers(node.outputs[0])
        if not subs or any(sub.op_type != "Sub" or sub.inputs[0] is not x for sub in subs):
            return None
        chain = self._variance_chain([sub.outputs[0] for sub in subs])
        if chain is None:
            return None
        nodes, eps = chain
        width, affine = self.trials.shape(x)[-1], {}
        nodes = [node, *subs, *nodes]
        for kind in ("Mul", "Add"):
            after = only_reader(nodes[-1].outputs[0])
            constants = self._wide_constants(after, width) if after is not None and after.op_type == kind else []
            if after is None or len(constants) != 1:
                break
            affine[kind] = constants[0]
            nodes.append(after)
        bias = affine["Add"][1] if "Add" in affine else None
        last = nodes[-1]
        return Pattern("layernorm", tuple(nodes), last, x, (last.outputs[0],), None, affine.get("Mul"), bias, eps)

    def _variance_chain(self, centred: Sequence[ir.Value]) -> tuple[list[ir.Node], float] | None:
        """The nodes from centred values to their division by the standard deviation, and eps.

        None if there are none.
        """
        users = [user for value in centred for user in readers(value)]
        squares = [user for user in users if self._is_square(user, centred)]
        division = [user for user in users if user.op_type == "Div" and user.inputs[0] in centred]
        if not squares or len(division) != 1:
            return None
        chain = [squares[0]]
        for kind in ("ReduceMean", "Add", "Sqrt"):
            after = only_reader(chain[-1].outputs[0])
            if after is None or after.op_type != kind:
                return None
            chain.append(after)
        if only_reader(chain[-1].outputs[0]) is not division[0]:
            return None
        shape = self.trials.shape(centred[0])
        if self.trials.shape(chain[1].outputs[0]) != (*shape[:-1], 1):
            return None
        eps = next((number for value in chain[2].inputs if (number := self._number(value)) is not None), None)
        return None if eps is None else ([*chain, division[0]], eps)

    def _is_square(self, node: ir.Node, centred: Sequence[ir.Value]) -> bool:
        if node.op_type == "Pow":
            return self._number(node.inputs[1]) == 2
        return node.op_type == "Mul" and all(value in centred for value in node.inputs)

    def _wide_constants(self, node: ir.Node, width: int) -> list[tuple[ir.Value, Tensor]]:
        """The constants with `width` numbers that a node reads."""
        pairs = [(value, self.trials.constant(value)) for value in node.inputs if value is not None]
        return [(value, tensor) for value, tensor in pairs if tensor is not None and tensor.numel() == width]

    def _linear(self, node: ir.Node) -> Pattern | None:
        """The pattern of a linear layer: a MatMul with a constant, and the Add of its bias; None for others."""
        x, after = node.inputs[0], only_reader(node.outputs[0])
        weight = self.trials.constant(node.inputs[1])
        if x is None or weight is None or weight.dim() != 2 or after is None or after.op_type != "Add":
            return None
        width = weight.shape[1]
        biases = [tensor for _, tensor in self._wide_constants(after, width) if tensor.shape[-1] == width]
        if len(biases) != 1 or self.trials.shape(after.outputs[0]) != self.trials.shape(node.outputs[0]):
            return None
        named = node.inputs[1]
        assert named is not None
        return Pattern(
            "matmul", (node, after), after, x, (after.outputs[0],), None, (named, weight), biases[0].reshape(-1)
        )

    def equal_slices(self, value: ir.Value, used: set[ir.Node]) -> tuple[int, tuple[ir.Node, ...]] | None:
        """The axis along which slices cut a value into equal parts, and these slices in order; None if there are none.

        Slices in `used` do not count.
        """
        spans: dict[int, list[tuple[int, int, ir.Node]]] = {}
        for cut in readers(value):
            reads_it = cut.op_type == "Slice" and cut.inputs[0] is value  # not as one of its bounds
            span = self._span(cut, value) if reads_it and cut not in used else None
            if span is not None:
                spans.setdefault(span[0], []).append((*span[1:], cut))
        for axis, parts in spans.items():
            parts.sort(key=lambda part: part[0])
            width, size = parts[0][1] - parts[0][0], self.trials.shape(value)[axis]
            bounds = [(start, end) for start, end, _ in parts]
            whole = bounds == [(start, start + width) for start in range(0, size, max(width, 1))]
            if axis and len(parts) > 1 and whole:
                return axis, tuple(cut for _, _, cut in parts)
        return None

    def _span(self, cut: ir.Node, value: ir.Value) -> tuple[int, int, int] | None:
        """Axis, start and end of a slice along one axis with step 1; None for other slices."""
        settings = settings_of(cut, self.opset)
        bounds = [self.trials.constant(each) for each in cut.inputs[1:]]
        if any(each is None for each in bounds):
            return None
        listed = [to_ints(each) for each in bounds] + [[]] * (4 - len(bounds))
        starts, ends = listed[0] or settings.get("starts", []), listed[1] or settings.get("ends", [])
        axes = listed[2] or settings.get("axes") or list(range(len(starts)))
        if len(axes) != 1 or (listed[3] or [1]) != [1]:
            return None
        axis, size = axes[0] % len(self.trials.shape(value)), self.trials.shape(value)[axes[0]]
        if size != self.trials.shape(value, 1)[axes[0]]:
            return None
        start, end = (min(place + size if place < 0 else place, size) for place in (starts[0], ends[0]))
        return axis, start, end
