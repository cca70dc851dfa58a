"""Writes a pruned module back into the graph that it was read from: new weights; same names, axes and metadata.

Layers whose values are those that were read are left as they are, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from torch import Tensor, nn

from pxcompress.errors import ModelError, short
from pxcompress.onnx_in.folding import set_input
from pxcompress.onnx_in.half import narrow_
from pxcompress.onnx_in.opening import read_proto, tensors_of
from pxcompress.onnx_in.origins import Origin, digest_of
from pxcompress.onnx_in.recurrent import Recurrent
from pxcompress.onnx_in.sizes import resize_

if TYPE_CHECKING:
    from pxcompress.onnx_in.module import OnnxModule

LARGEST_INLINE = 1_500_000_000
"""Most bytes of weights inside an ONNX file; with more they go to a file beside it."""

OWN_KEY = "pxcompress"
"""Metadata key that marks a file as written by pxcompress."""


def write_back(module: OnnxModule, path: Path, metadata: Mapping[str, str], batch: int | None = None) -> None:
    """Write the module with its present weights as an ONNX file to `path`. Raises `ModelError` if that is impossible.

    `metadata` is added to the file's own, which is not overwritten unless it was written here. External weights stay
    external, in `<path>.data`. `batch`: the file takes so many samples a call.
    """
    source = module.source
    places = {node: place for place, node in enumerate(source.model.graph)}
    model = ir.from_proto(ir.to_proto(source.model))
    ir.external_data.set_base_dir(model.graph, source.path.resolve().parent)
    nodes = list(model.graph)
    for name, origin in module.origins.items():
        layer = module.get_submodule(name)
        if origin.has_changed(layer):
            _write_layer(model, origin, [nodes[places[node]] for node in origin.nodes], layer, module)
    _write_tables(model, module)
    resize_(model, module)
    common.RemoveUnusedNodesPass()(model)
    narrow_(model, source.types)
    proto = read_proto(source.path)
    own_metadata = {} if OWN_KEY in model.metadata_props else dict(model.metadata_props)
    model.metadata_props.update({**metadata, **own_metadata})
    _set_batch(model, batch, source.path)
    _save(model, path, proto)


def copy_file(source: Path, path: Path, metadata: Mapping[str, str]) -> None:
    """Copy an ONNX file with its graph unchanged, external weights included, and add `metadata`."""
    proto = read_proto(source)
    locations = {}
    for tensor in tensors_of(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                locations[entry.value] = entry.value = f"{path.stem}.{entry.value.removeprefix(f'{path.stem}.')}"
    for before, after in locations.items():
        shutil.copyfile(source.parent / before, path.parent / after)
    present = {entry.key for entry in proto.metadata_props}
    own = OWN_KEY in present
    if own:
        del proto.metadata_props[:]
    for key, value in metadata.items():
        if own or key not in present:
            proto.metadata_props.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def _write_layer(model: ir.Model, origin: Origin, nodes: list[ir.Node], layer: nn.Module, module: OnnxModule) -> None:
    writers = {
        "conv": _write_conv,
        "gemm": _write_gemm,
        "matmul": _write_matmul,
        "batchnorm": _write_batchnorm,
        "scale": _write_scale,
        "layernorm": _write_layernorm,
        "embedding": _write_embedding,
        "recurrent": _write_recurrent,
    }
    writers[origin.kind](model, origin, nodes, layer, module)


def _write_conv(model: ir.Model, origin: Origin, nodes: list[ir.Node], layer: nn.Module, module: OnnxModule) -> None:
    set_input(model, nodes[0], 1, _tensor(layer, "weight"))
    if layer.bias is not None:
        set_input(model, nodes[0], 2, _tensor(layer, "bias"))
    groups = int(layer.groups)  # type: ignore[arg-type]
    if "group" in nodes[0].attributes or groups != 1:
        nodes[0].attributes["group"] = ir.AttrInt64("group", groups)


def _write_gemm(model: ir.Model, origin: Origin, nodes: list[ir.Node], layer: nn.Module, module: OnnxModule) -> None:
    weight, turned = _file_order(origin, _tensor(layer, "weight")), nodes[0].attributes.get("transB")
    set_input(model, nodes[0], 1, weight if turned is not None and turned.value else weight.T)
    for name in ("alpha", "beta"):
        nodes[0].attributes.pop(name, None)
    if layer.bias is not None:
        set_input(model, nodes[0], 2, _tensor(layer, "bias"))


def _write_matmul(model: ir.Model, origin: Origin, nodes: list[ir.Node], layer: nn.Module, module: OnnxModule) -> None:
    set_input(model, nodes[0], 1, _file_order(origin, _tensor(layer, "weight")).T)
    if layer.bias is None:
        return
    if len(nodes) > 1:
        _set_constant(model, nodes[1], _tensor(layer, "bias"), module)
    else:
        _add_behind(model, nodes[0], _tensor(layer, "bias"))


def _write_batchnorm(
    model: ir.Model, origin: Origin, nodes: list[ir.Node], layer: nn.Module, module: OnnxModule
) -> None:
    for place, name in enumerate(("weight", "bias", "running_mean", "running_var"), 1):
        set_input(model, nodes[0], place, _tensor(layer, name))


def _write_layernorm(
    model: ir.Model, origin: Origin, nodes: list[ir.Node], layer: nn.Module, module: OnnxModule
) -> None:
    if nodes[0].op_type == "LayerNormalization":
        set_input(model, nodes[0], 1, _tensor(layer, "weight"))
        if layer.bias is not None:
            set_input(model, nodes[0], 2, _tensor(layer, "bias"))
        return
    for node in nodes[-2:]:
        name = {"Mul": "weight", "Add": "bias"}.get(node.op_type)
        if name and getattr(layer, name, None) is not None:
            _set_constant(model, node, _tensor(layer, name), module)


def _write_embedding(
    model: ir.Model, origin: Origin, nodes: list[ir.Node], layer: nn.Module, module: OnnxModule
) -> None:
    set_input(model, nodes[0], 0, _tensor(layer, "weight"))


def _write_scale(model: ir.Model, origin: Origin, nodes: list[ir.Node], layer: nn.Module, module: OnnxModule) -> None:
    scale = _tensor(layer, "weight").reshape(-1)
    shift = None if layer.bias is None else _tensor(layer, "bias")
    if nodes[0].op_type in ("Add", "Sub") and not bool((scale == 1).all()):
        _multiply_before(model, nodes[0], scale.reshape(_vector_shape(layer)))
    for node in nodes:
        signed = shift if node.op_type == "Add" or shift is None else -shift
        value = {"Mul": scale, "Div": 1 / scale}.get(node.op_type, signed)
        assert value is not None
        _set_constant(model, node, value, module)
    if shift is not None and not any(node.op_type in ("Add", "Sub") for node in nodes):
        _add_behind(model, nodes[-1], shift.reshape(_vector_shape(layer)))


def _vector_shape(layer: nn.Module) -> list[int]:
    """Shape with which a constant per channel broadcasts over the outputs of a 1 x 1 convolution."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return [-1] + [1] * (weight.dim() - 2)


def _write_recurrent(
    model: ir.Model, origin: Origin, nodes: list[ir.Node], layer: nn.Module, module: OnnxModule
) -> None:
    assert isinstance(layer, Recurrent)
    for place, value in enumerate(layer.weights_in_file(), 1):
        set_input(model, nodes[0], place, value)


def _write_tables(model: ir.Model, module: OnnxModule) -> None:
    """Write attention biases with an entry for each head, wherever they are read."""
    from pxcompress.onnx_in.module import AttentionBlock

    for block in [block for block in module.modules() if isinstance(block, AttentionBlock)]:
        for name, attribute in block.constants.items():
            table = getattr(block, attribute)
            if not isinstance(table, nn.Parameter) or digest_of(table) == block.tables[name]:
                continue
            own = [value for node in model.graph for value in node.outputs if value.name == name]
            for value in [model.graph.initializers[name]] if name in model.graph.initializers else own:
                for use in list(value.uses()):
                    set_input(model, use.node, use.idx, table.unsqueeze(0))


def _tensor(layer: nn.Module, name: str) -> Tensor:
    return getattr(layer, name).detach().cpu()


def _file_order(origin: Origin, weight: Tensor) -> Tensor:
    """A linear layer's weight with its columns in the order in which the file flattens the input."""
    if origin.unflattened is None:
        return weight
    return weight.unflatten(1, (-1, *origin.unflattened[1:])).permute(0, 2, 3, 1).flatten(1)


def _set_constant(model: ir.Model, node: ir.Node, value: Tensor, module: OnnxModule) -> None:
    """Replace the constant of an arithmetic node, along the same axis as before."""
    first = node.inputs[0]
    place = 0 if first is not None and first.name in module.source.constants else 1
    operand = node.inputs[place]
    assert operand is not None
    before = module.source.shapes[operand.name or ""]
    axis = next((axis for axis, size in enumerate(before) if size != 1), len(before) - 1)
    shape = [1] * max(len(before), 1)
    shape[axis] = value.numel()
    set_input(model, node, place, value.reshape(shape))


def _add_behind(model: ir.Model, node: ir.Node, bias: Tensor) -> None:
    """Insert an Add of a bias behind a node; the sum takes over the node's output name and readers."""
    out = node.outputs[0]
    name = out.name or "value"
    add = ir.Node("", "Add", [out, None], outputs=[ir.Value(name=f"{name}.biased")], name=f"{node.name or name}.bias")
    model.graph.insert_after(node, add)
    total = add.outputs[0]
    for use in [use for use in out.uses() if use.node is not add]:
        use.node.replace_input_with(use.idx, total)
    for place, value in enumerate(model.graph.outputs):
        if value is out:
            model.graph.outputs[place] = total
            total.type, total.shape = out.type, out.shape
    out.name = f"{name}.unbiased"
    total.name = name
    set_input(model, add, 1, bias)


def _multiply_before(model: ir.Model, node: ir.Node, factor: Tensor) -> None:
    """Insert a Mul in front of a node that adds a constant."""
    place = 0 if node.inputs[0] is not None and not node.inputs[0].is_initializer() else 1
    multiply = ir.Node("", "Mul", [node.inputs[place], None], name=f"{node.name or node.outputs[0].name}.scale")
    model.graph.insert_before(node, multiply)
    multiply.outputs[0].name = f"{node.outputs[0].name}.scaled"
    node.replace_input_with(place, multiply.outputs[0])
    set_input(model, multiply, 1, factor)


def _set_batch(model: ir.Model, batch: int | None, path: Path) -> None:
    """Fix the batch size of inputs and outputs to `batch` if it is open.

    Raises `ModelError` if the file has another one.
    """
    for value in (*model.graph.inputs, *model.graph.outputs) if batch is not None else ():
        first = value.shape[0] if value.shape is not None and len(value.shape) else batch
        if isinstance(first, int) and first != batch:
            raise ModelError(f"{path.name} takes {first} samples a call, no other number; give --batch-size {first}")
        if value.shape is not None and len(value.shape):
            value.shape = ir.Shape([batch, *list(value.shape)[1:]])


def _save(model: ir.Model, path: Path, proto: onnx.ModelProto) -> None:
    """Write the model to `path`, with its weights in a file beside it if the user's file has that or they are too
    large.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    initializers = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer)
    external |= sum(tensor.nbytes for tensor in initializers) > LARGEST_INLINE
    inputs = {value.name for value in proto.graph.input}
    if inputs & {tensor.name for tensor in proto.graph.initializer}:  # as files before IR version 4 had to
        listed = {value.name for value in model.graph.inputs}
        model.graph.inputs.extend(value for name, value in model.graph.initializers.items() if name not in listed)
    try:
        ir.save(model, path, external_data=f"{path.name}.data" if external else None)
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        path.unlink(missing_ok=True)
        raise ModelError(f"the pruned {path.name} is not valid ONNX: {short(error)}") from error
