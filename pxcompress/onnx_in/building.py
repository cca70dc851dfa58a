"""Builds a module from a graph: weighted operators become layers, known patterns one function, others calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from pxcompress.onnx_in.calls import BOUND, Call, Chunk, Padding, Select, heads_of, spatial_sizes, swap_heads
from pxcompress.onnx_in.folding import find_varying_axis
from pxcompress.onnx_in.making import (
    CONVOLUTIONS,
    fill_,
    make_batch_norm,
    make_convolution,
    make_layer_norm,
    make_transposed,
)
from pxcompress.onnx_in.module import OnnxModule, Step
from pxcompress.onnx_in.opening import RECURRENT, only_reader, opset_of, settings_of
from pxcompress.onnx_in.operators import OPERATORS
from pxcompress.onnx_in.operators.layers import window
from pxcompress.onnx_in.operators.table import Settings, to_ints
from pxcompress.onnx_in.origins import Origin, digest, source_of
from pxcompress.onnx_in.patterns import Finder, Pattern
from pxcompress.onnx_in.recurrent import Recurrent
from pxcompress.onnx_in.regroup import Regroup, find_regroup
from pxcompress.onnx_in.trial import Trials


class Builder:
    """Builds the `OnnxModule` of a graph, with the shapes and constants of its two trial runs."""

    def __init__(self, trials: Trials, path: Path) -> None:
        self.trials, self.opset = trials, opset_of(trials.model)
        self.graph = trials.model.graph
        self.module = OnnxModule(source_of(trials, path))
        self.reserved = set(dir(self.module))
        self.names: set[str] = set()
        self.inner: set[ir.Node] = set()
        self.patterns: dict[ir.Node, Pattern] = {}
        self.chunks: dict[ir.Node, tuple[int, tuple[ir.Node, ...]]] = {}

    def build(self) -> OnnxModule:
        """Build the module and return it in eval mode."""
        self._find_patterns()
        for node in self.graph:
            if node in self.patterns:
                self._add_pattern(self.patterns[node])
            elif node in self.chunks:
                self._add_chunk(node)
            elif node not in self.inner and any(self.trials.constant(value) is None for value in node.outputs):
                self._add_node(node)
        self.module.input_names = [value.name for value in self.graph.inputs if value.name and value.uses()]
        self.module.made = [name for value in self.graph.outputs if (name := self._name_of(value))]
        self._leave_softmax()
        self.module.remove_unused()
        return self.module.eval()

    def _find_patterns(self) -> None:
        finder = Finder(self.trials)
        for node in self.graph:
            pattern = finder.find(node)
            if pattern is None or set(pattern.nodes) & (self.inner | set(self.patterns)):
                continue
            self.inner |= set(pattern.nodes) - {pattern.at}
            self.patterns[pattern.at] = pattern
        for value in [value for node in self.graph for value in node.outputs]:
            if (chunk := finder.equal_slices(value, self.inner)) is not None:
                first = min(chunk[1], key=lambda cut: finder.order[cut])
                self.inner |= set(chunk[1]) - {first}
                self.chunks[first] = chunk

    def _leave_softmax(self) -> None:
        """Leave out a final softmax over (n, classes), so that the module returns logits; the file keeps it."""
        for place, name in enumerate(self.module.made):
            step = next((step for step in self.module.steps if name in step.outputs), None)
            read = any(name in other.inputs for other in self.module.steps)
            if step is None or step.operator != "Softmax" or step.inputs[0] is None or read:
                continue
            if len(self.module.source.shapes[name]) == 2:
                self.module.made[place] = step.inputs[0]
                self.module.tails[place] = step

    # Names, steps and layers

    def _constant(self, node: ir.Node, place: int) -> Tensor | None:
        return self.trials.constant(node.inputs[place]) if place < len(node.inputs) else None

    def _get_operand(self, node: ir.Node, place: int) -> bool:
        return place < len(node.inputs) and node.inputs[place] is not None

    def _name_of(self, value: ir.Value | None) -> str | None:
        """The name of a value; if it is a constant, the module stores it under this name."""
        if value is None or not value.name:
            return None
        if (tensor := self.trials.constant(value)) is not None:
            self.module.store_constant(value.name, tensor)
        return value.name

    def _add(
        self, kind: str, run: str | Callable[..., Any], inputs: Sequence[ir.Value | None], node: ir.Node, **to: Any
    ) -> None:
        """Add a step that computes the outputs of `node` (or `outputs` in `to`) from `inputs`."""
        outputs = [value.name or "" for value in to.get("outputs", node.outputs)]
        self.module.steps.append(Step(kind, run, [self._name_of(x) for x in inputs], outputs, node.name or ""))

    def _add_layer(self, layer: nn.Module, weight: ir.Value | None, origin: Origin) -> str:
        """Add a layer to the module, with parents as its name says; returns the name."""
        name = self._layer_name(origin.nodes[0], weight)
        *front, last = name.split(".")
        parent: nn.Module = self.module
        for part in front:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, layer.eval())
        self.module.origins[name] = replace(origin, read=digest(layer))
        return name

    def _layer_name(self, node: ir.Node, weight: ir.Value | None) -> str:
        """A layer's name: from its weight if that is named as PyTorch does ("x.weight"), else from the node."""
        own = weight.name or "" if weight is not None else ""
        text = re.sub(r"\.weight(\.\d+)?$", "", own) if re.fullmatch(r"[\w.]+\.weight(\.\d+)?", own) else ""
        if not text and node.name:
            text = re.sub(rf"[/.]{node.op_type}(_\d+)?$", "", node.name.strip("/")).replace("/", ".")
        text = re.sub(r"[^\w.]", "_", text or f"{node.op_type.lower()}_{len(self.names)}")
        parts = [f"{part}0" if part in self.reserved else part for part in text.split(".") if part]
        base = name = ".".join(parts) or "layer"
        count = 1
        while any(
            name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in self.names
        ):
            name, count = f"{base}_{count}", count + 1
        self.names.add(name)
        return name

    # Patterns

    def _add_pattern(self, pattern: Pattern) -> None:
        if pattern.function is not None:
            self._add(pattern.kind, pattern.function, [pattern.x], pattern.at, outputs=pattern.outputs)
        elif pattern.kind == "layernorm":
            weight = None if pattern.weight is None else pattern.weight[1]
            shape = self.trials.shape(pattern.x)[-1:]
            layer = make_layer_norm(shape, weight, pattern.bias, pattern.number)
            origin = Origin("layernorm", pattern.nodes)
            name = self._add_layer(layer, None if pattern.weight is None else pattern.weight[0], origin)
            self._add("LayerNorm", name, [pattern.x], pattern.at, outputs=pattern.outputs)
        else:
            assert pattern.weight is not None
            named, matrix = pattern.weight
            self._add_linear(pattern.x, (matrix.T, pattern.bias), named, Origin("matmul", pattern.nodes))

    def _add_chunk(self, node: ir.Node) -> None:
        axis, cuts = self.chunks[node]
        outputs = [cut.outputs[0] for cut in cuts]
        self._add("Chunk", Chunk(len(cuts), axis), node.inputs[:1], node, outputs=outputs)

    # Single operators

    def _add_node(self, node: ir.Node) -> None:
        settings = settings_of(node, self.opset)
        make = getattr(self, f"_on_{node.op_type.lower()}", None)
        if make is None or not make(node, settings):
            self._add_call(node, settings)

    def _add_call(self, node: ir.Node, settings: Settings) -> None:
        """Add a step for an operator that has no pattern, as the table of operators defines it."""
        kind = node.op_type
        if kind in RECURRENT:
            weights = [self.trials.constant(value) for value in node.inputs]
            name = self._add_layer(Recurrent(kind, settings, weights), node.inputs[1], Origin("recurrent", (node,)))
            self._add(kind, name, [node.inputs[0], *node.inputs[5:7]], node)
            return
        bound: dict[int, Any] = {}
        for place in BOUND.get(kind, ()):
            if (tensor := self._constant(node, place)) is not None:
                bound[place] = tensor if tensor.is_floating_point() or kind == "Clip" else to_ints(tensor)
        if kind == "Resize" and 3 in bound:
            bound[3] = spatial_sizes(bound[3], [run.shapes[node.inputs[0]] for run in self.trials.runs])  # type: ignore[index]
        inputs = [None if place in bound else value for place, value in enumerate(node.inputs)]
        while inputs and inputs[-1] is None:
            inputs.pop()
        self._add(kind, Call(OPERATORS[kind], settings, bound, len(node.inputs)), inputs, node)

    def _on_reshape(self, node: ir.Node, settings: Settings) -> bool:
        x, out = node.inputs[0], node.outputs[0]
        assert x is not None
        shape = self.trials.shape
        rule = find_regroup(shape(x), shape(out), (shape(x, 1), shape(out, 1)))
        if rule is not None:
            self._add("Regroup", rule, [x], node)
        return rule is not None

    _on_flatten = _on_reshape

    def _on_conv(self, node: ir.Node, settings: Settings) -> bool:
        weight, bias, x = self._constant(node, 1), self._constant(node, 2), node.inputs[0]
        if weight is None or (bias is None and self._get_operand(node, 2)) or x is None:
            return False
        rank, size, other = weight.dim() - 2, self.trials.shape(x)[2:], self.trials.shape(x, 1)[2:]
        pads = window(settings, size, weight.shape[2:])[2]
        padded = pads[:rank] != pads[rank:] or pads != window(settings, other, weight.shape[2:])[2]
        layer = make_convolution(settings, weight, bias, padded=padded, size=size)
        name = self._add_layer(layer, node.inputs[1], Origin("conv", (node,)))
        if not padded:
            self._add("Conv", name, [x], node)
            return True
        between = f"{node.outputs[0].name}:padded"
        kernel = tuple(weight.shape[2:])
        self.module.steps.append(Step("Pad", Padding(settings, kernel), [self._name_of(x)], [between], node.name or ""))
        self.module.steps.append(Step("Conv", name, [between], [node.outputs[0].name or ""], node.name or ""))
        return True

    def _on_convtranspose(self, node: ir.Node, settings: Settings) -> bool:
        weight, bias = self._constant(node, 1), self._constant(node, 2)
        if weight is None or (bias is None and self._get_operand(node, 2)):
            return False
        layer = make_transposed(settings, weight, bias)
        if layer is not None:
            self._add("Conv", self._add_layer(layer, node.inputs[1], Origin("conv", (node,))), node.inputs[:1], node)
        return layer is not None

    def _on_gemm(self, node: ir.Node, settings: Settings) -> bool:
        weight, bias, x = self._constant(node, 1), self._constant(node, 2), node.inputs[0]
        if weight is None or settings.get("transA") or x is None or len(self.trials.shape(x)) != 2:
            return False
        weight, alpha = weight if settings.get("transB") else weight.T, settings.get("alpha", 1.0)
        if self._get_operand(node, 2):
            if bias is None or bias.numel() not in (1, len(weight)):
                return False
            bias = bias.reshape(-1).expand(len(weight)) * settings.get("beta", 1.0)
        self._add_linear(x, (weight if alpha == 1.0 else alpha * weight, bias), node.inputs[1], Origin("gemm", (node,)))
        return True

    def _on_matmul(self, node: ir.Node, settings: Settings) -> bool:
        weight, x = self._constant(node, 1), node.inputs[0]
        if weight is None or weight.dim() != 2 or not weight.is_floating_point() or x is None:
            return False
        self._add_linear(x, (weight.T, None), node.inputs[1], Origin("matmul", (node,)))
        return True

    def _add_linear(
        self, x: ir.Value, weights: tuple[Tensor, Tensor | None], named: ir.Value | None, origin: Origin
    ) -> None:
        """Add a linear layer; one that reads an image flattened channels last is made to read channels first."""
        weight, bias = weights
        first, last = origin.nodes[0], origin.nodes[-1]
        image = self._flattened_image(x)
        if image is not None:
            channels, height, width = self.trials.shape(image)[1:]
            places = torch.arange(weight.shape[1]).reshape(height, width, channels).permute(2, 0, 1).reshape(-1)
            weight = weight[:, places]
            origin = replace(origin, unflattened=(channels, height, width), flat=x.name or "")
        layer = fill_(skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias is not None), weight, bias)
        name, out = self._add_layer(layer, named, origin), last.outputs[0].name or ""
        if image is None:
            self._add("Linear", name, [x], last)
            return
        flat = f"{out}:flat"
        rule = Regroup([(1, None), (3, None)])
        self.module.steps.append(Step("Regroup", rule, [self._name_of(image)], [flat], first.name or ""))
        self.module.steps.append(Step("Linear", name, [flat], [out], first.name or ""))

    def _flattened_image(self, x: ir.Value) -> ir.Value | None:
        """The image (n, channels, height, width) that `x` is, flattened as height, width, channels; else None."""
        flat = x.producer()
        if flat is None or flat.op_type not in ("Reshape", "Flatten") or len(self.trials.shape(x)) != 2:
            return None
        turn = flat.inputs[0].producer() if flat.inputs[0] is not None else None
        if turn is None or turn.op_type != "Transpose" or list(turn.attributes["perm"].value) != [0, 2, 3, 1]:
            return None
        image = turn.inputs[0]
        assert image is not None
        n, channels, height, width = self.trials.shape(image)
        return image if self.trials.shape(x) == (n, channels * height * width) else None

    def _on_batchnormalization(self, node: ir.Node, settings: Settings) -> bool:
        values = [tensor for place in (1, 2, 3, 4) if (tensor := self._constant(node, place)) is not None]
        if len(values) != 4 or settings.get("training_mode") or node.inputs[0] is None:
            return False
        layer = make_batch_norm(len(self.trials.shape(node.inputs[0])), values, settings.get("epsilon", 1e-5))
        name = self._add_layer(layer, node.inputs[1], Origin("batchnorm", (node,)))
        self._add("BatchNorm", name, node.inputs[:1], node, outputs=node.outputs[:1])
        return True

    def _on_layernormalization(self, node: ir.Node, settings: Settings) -> bool:
        weight, bias, x = self._constant(node, 1), self._constant(node, 2), node.inputs[0]
        if weight is None or x is None or (bias is None and self._get_operand(node, 2)):
            return False
        shape = self.trials.shape(x)[settings.get("axis", -1) % len(self.trials.shape(x)) :]
        layer = make_layer_norm(shape, weight, bias, settings.get("epsilon", 1e-5))
        name = self._add_layer(layer, node.inputs[1], Origin("layernorm", (node,)))
        self._add("LayerNorm", name, [x], node, outputs=node.outputs[:1])
        return True

    def _on_gather(self, node: ir.Node, settings: Settings) -> bool:
        table, index, axis = self._constant(node, 0), self._constant(node, 1), settings.get("axis", 0)
        if table is not None and axis == 0 and table.dim() == 2 and table.is_floating_point() and index is None:
            layer = fill_(nn.Embedding(*table.shape), table)
            name = self._add_layer(layer, node.inputs[0], Origin("embedding", (node,)))
            self._add("Embedding", name, node.inputs[1:], node)
            return True
        if index is None or index.dim():
            return False
        self._add("Select", Select(axis, int(index)), node.inputs[:1], node)
        return True

    def _on_attention(self, node: ir.Node, settings: Settings) -> bool:
        """Attention whose heads lie side by side in (n, tokens, width), with reshapes that split and join them."""
        counts = [settings.get(name) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
        q, out = node.inputs[0], node.outputs[0].name or ""
        if q is None or len(self.trials.shape(q)) != 3 or None in counts or len(node.outputs) > 1:
            return False
        parted: list[str | None] = []
        for value, count in zip(node.inputs[:3], counts, strict=True):
            rule = Regroup([(1, None), (1, None), (1, [count, None])])
            parted.append(self._add_between("Regroup", rule, self._name_of(value), f"{out}:{len(parted)}:parted", node))
            parted[-1] = self._add_between("Transpose", swap_heads, parted[-1], f"{out}:{len(parted)}:heads", node)
        rest = [self._name_of(value) for value in node.inputs[3:]]
        call = Call(OPERATORS["Attention"], settings, {}, len(node.inputs))
        self.module.steps.append(Step("Attention", call, [*parted, *rest], [heads_of(out)], node.name or ""))
        joined = self._add_between("Transpose", swap_heads, heads_of(out), f"{out}:joined", node)
        self._add_between("Regroup", Regroup([(1, None), (1, None), (2, None)]), joined, out, node)
        return True

    def _add_between(self, kind: str, run: Callable[..., Any], x: str | None, out: str, node: ir.Node) -> str:
        """Add a step for which the file has no node; returns the name of its output."""
        self.module.steps.append(Step(kind, run, [x], [out], node.name or ""))
        return out

    def _on_split(self, node: ir.Node, settings: Settings) -> bool:
        axis = settings.get("axis", 0)
        if len({self.trials.shape(value)[axis] for value in node.outputs}) != 1:
            return False
        self._add("Chunk", Chunk(len(node.outputs), axis), node.inputs[:1], node)
        return True

    def _on_mul(self, node: ir.Node, settings: Settings) -> bool:
        """Add a constant factor per channel, outside of any layer, as a depthwise 1 x 1 convolution."""
        places = [place for place in (0, 1) if self._constant(node, place) is not None]
        if len(places) != 1 or (node.op_type in ("Sub", "Div") and places != [1]):
            return False
        value, x = self._constant(node, places[0]), node.inputs[1 - places[0]]
        if x is None or value is None or not self._is_per_channel(node, x, value):
            return False
        nodes, shift, flat = [node], None, value.reshape(-1).double()
        scale = torch.ones(len(flat)).double()
        if node.op_type in ("Mul", "Div"):
            scale = flat if node.op_type == "Mul" else 1 / flat
            after = only_reader(node.outputs[0])
            if (shift := self._shift_behind(after, self.trials.shape(x))) is not None and after is not None:
                nodes.append(after)
                self.inner.add(after)
        else:
            shift = flat if node.op_type == "Add" else -flat
        convolution = CONVOLUTIONS[len(self.trials.shape(x)) - 3]
        layer = convolution(len(flat), len(flat), 1, groups=len(flat), bias=shift is not None)
        fill_(layer, scale.float().reshape(layer.weight.shape), None if shift is None else shift.float())
        self._add("Conv", self._add_layer(layer, None, Origin("scale", tuple(nodes))), [x], nodes[-1])
        return True

    _on_add = _on_sub = _on_div = _on_mul

    def _is_per_channel(self, node: ir.Node, x: ir.Value, value: Tensor) -> bool:
        shape = self.trials.shape(x)
        fits = 3 <= len(shape) <= 5 and self.trials.shape(node.outputs[0]) == shape
        return fits and value.is_floating_point() and find_varying_axis(value, shape) == 1 and self._is_learned(x)

    def _shift_behind(self, node: ir.Node | None, shape: Sequence[int]) -> Tensor | None:
        """The constant per channel that an Add behind a factor adds; None if there is none."""
        if node is None or node.op_type != "Add" or node in self.patterns or node in self.inner:
            return None
        constants = [tensor for value in node.inputs if (tensor := self.trials.constant(value)) is not None]
        if len(constants) != 1 or find_varying_axis(constants[0], shape) != 1:
            return None
        return constants[0].reshape(-1).double()

    def _is_learned(self, x: ir.Value) -> bool:
        """Whether any layer with weights comes before `x`."""
        seen: set[ir.Node] = set()
        waiting: list[ir.Value | None] = [x]
        while waiting:
            value = waiting.pop()
            node = value.producer() if value is not None else None
            if node is None or node in seen:
                continue
            if node.op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
                return True
            seen.add(node)
            waiting += node.inputs
        return False
