"""ONNX files as models: read, compared with ONNX Runtime, pruned, and written back into the user's graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_nets import Attending, Dense, Plain, export, halved, make_proto
from torch import Tensor, nn

from pxcompress import compress_module
from pxcompress.deploy.all_outputs import run_graph
from pxcompress.deploy.onnx_modules import read_onnx
from pxcompress.deploy.runtime import open_session
from pxcompress.errors import ModelError
from pxcompress.graph import find_groups, prune
from pxcompress.models.loading import classifier_names
from pxcompress.onnx_in import OnnxModule
from pxcompress.types import Plan


def outputs_of(path: Path, module: OnnxModule, samples: int = 3) -> list[np.ndarray]:
    (name, example), *_ = module.source.example.items()
    draw = torch.Generator().manual_seed(5)
    return run_graph(path, {name: torch.randn(samples, *example.shape[1:], generator=draw).numpy()})


def assert_same_interface(path: Path, other: Path) -> None:
    """Inputs, outputs, opset, versions and the user's metadata are equal."""
    protos = onnx.load(path), onnx.load(other)
    for part in (
        lambda p: [value.SerializeToString() for value in p.graph.input],
        lambda p: [value.SerializeToString() for value in p.graph.output],
        lambda p: [(each.domain, each.version) for each in p.opset_import],
        lambda p: (p.ir_version, p.producer_name, p.doc_string),
    ):
        assert part(protos[0]) == part(protos[1])
    facts = [{entry.key: entry.value for entry in proto.metadata_props} for proto in protos]
    assert facts[0].items() <= facts[1].items()


@pytest.fixture(
    scope="module", params=[(Plain, 13), (Plain, 17), (Attending, 11), (Attending, 17), (Dense, 17)], ids=str
)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, opset = request.param
    return export(kind, tmp_path_factory.mktemp("onnx") / "net.onnx", opset)


def test_module_computes_what_the_file_does(file: Path) -> None:
    module = read_onnx(file)
    assert {type(part) for part in module.modules()} & {nn.Conv2d, nn.Linear}
    assert not list(module.buffers()) or all(part.isfinite().all() for part in module.buffers())


def test_pruned_file_computes_what_the_pruned_module_does(file: Path, tmp_path: Path) -> None:
    pruned = halved(read_onnx(file))
    pruned.model.write_onnx(tmp_path / "slim.onnx", {"pxcompress": "now"})
    assert_same_interface(file, tmp_path / "slim.onnx")
    assert (tmp_path / "slim.onnx").stat().st_size < 1.1 * file.stat().st_size
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        made = pruned.model.file_outputs(torch.randn(3, 3, 32, 32, generator=draw))
    for value, expected in zip(
        outputs_of(tmp_path / "slim.onnx", pruned.model), made if isinstance(made, tuple) else [made], strict=True
    ):
        assert np.abs(value - expected.numpy()).max() <= 1e-5 * max(1, np.abs(value).max())


def test_module_that_is_not_pruned_writes_the_same_values(file: Path, tmp_path: Path) -> None:
    module = read_onnx(file)
    module.write_onnx(tmp_path / "same.onnx", {})
    for value, expected in zip(outputs_of(tmp_path / "same.onnx", module), outputs_of(file, module), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_layers_that_keep_their_units_are_bit_for_bit_as_they_were(tmp_path: Path) -> None:
    path = export(Attending, tmp_path / "net.onnx")
    module = read_onnx(path)
    example = torch.zeros(1, 3, 32, 32)
    groups = find_groups(module, example, classifier_names(module, example)).groups
    heads = next(group for group in groups if group.kind == "head")
    pruned = prune(module, groups, Plan({heads.name: (0, 2)}, "macs", "MACs", 1.0, 1.0, 1.0))
    pruned.model.write_onnx(tmp_path / "slim.onnx", {})
    before, after = (
        {tensor.name: tensor.raw_data for tensor in onnx.load(each).graph.initializer}
        for each in (path, tmp_path / "slim.onnx")
    )
    whole = ["patch.weight", "patch.bias", "norm.weight", "gate.bias", "back.bias", "head.weight", "head.bias"]
    assert all(before[name] == after[name] for name in whole)
    assert before["qkv.bias"] != after["qkv.bias"]


def test_heads_are_found_by_what_the_graph_does(tmp_path: Path) -> None:
    module = read_onnx(export(Attending, tmp_path / "net.onnx"))
    groups = find_groups(module, torch.zeros(1, 3, 32, 32), ("head",)).groups
    assert [(group.units, len(group.members)) for group in groups if group.kind == "head"] == [(4, 2)]
    assert {group.units for group in groups if group.kind == "neuron"} == {24}


def _attention_file(path: Path) -> Path:
    """Tokens (n, 7, 3), and the Attention operator of opset 23 with four heads side by side."""
    draw = np.random.default_rng(0)
    sizes = {"into": (3, 32), "q": (32, 32), "k": (32, 32), "v": (32, 32), "proj": (32, 32), "head": (32, 5)}
    weights = {f"{name}.w": draw.normal(0, 0.2, size).astype(np.float32) for name, size in sizes.items()}
    nodes = [helper.make_node("MatMul", ["x", "into.w"], ["tokens"])]
    nodes += [helper.make_node("MatMul", ["tokens", f"{name}.w"], [name]) for name in "qkv"]
    nodes += [
        helper.make_node("Attention", ["q", "k", "v"], ["read"], q_num_heads=4, kv_num_heads=4),
        helper.make_node("MatMul", ["read", "proj.w"], ["made"]),
        helper.make_node("Add", ["made", "tokens"], ["sum"]),
        helper.make_node("ReduceMean", ["sum", "axis"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "head.w"], ["y"]),
    ]
    proto = make_proto(*nodes, opset=23, axis=np.array([1]), **weights)
    proto.ir_version = 10
    for port, sizes in ((proto.graph.input[0], ["n", 7, 3]), (proto.graph.output[0], ["n", 5])):
        port.CopyFrom(helper.make_tensor_value_info(port.name, TensorProto.FLOAT, sizes))
    onnx.save(proto, path)
    return path


def test_the_attention_operator_loses_whole_heads(tmp_path: Path) -> None:
    module = read_onnx(_attention_file(tmp_path / "net.onnx"))
    groups = find_groups(module, torch.zeros(1, 7, 3), classifier_names(module, torch.zeros(1, 7, 3))).groups
    assert [group.units for group in groups if group.kind == "head"] == [4]
    pruned = halved(module).model
    pruned.write_onnx(tmp_path / "slim.onnx", {})
    nodes = {node.op_type: node for node in onnx.load(tmp_path / "slim.onnx").graph.node}
    assert {each.name: each.i for each in nodes["Attention"].attribute} == {"q_num_heads": 2, "kv_num_heads": 2}
    inputs = torch.randn(3, 7, 3, generator=torch.Generator().manual_seed(0))
    (written,) = run_graph(tmp_path / "slim.onnx", {"x": inputs.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(written, pruned(inputs), atol=1e-5)


def test_a_fixed_batch_stays_fixed_and_the_module_takes_any(tmp_path: Path) -> None:
    path = export(Attending, tmp_path / "net.onnx", dynamic_axes=None)
    proto = onnx.load(path)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    module = halved(read_onnx(path)).model
    assert module(torch.zeros(5, 3, 32, 32)).shape == (5, 5)
    module.write_onnx(tmp_path / "slim.onnx", {})
    assert_same_interface(path, tmp_path / "slim.onnx")
    with pytest.raises(ModelError, match="2 samples a call"):
        module.write_onnx(tmp_path / "other.onnx", {}, batch=3)


class InHalf(Plain):
    """In half precision, inputs and outputs as well."""

    def __init__(self) -> None:
        super().__init__()
        self.half()


class OfBytes(Plain):
    """Takes the bytes of an image, its channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [(InHalf, torch.zeros(2, 3, 32, 32).half()), (OfBytes, torch.zeros(2, 32, 32, 3, dtype=torch.uint8))],
    ids=["half", "bytes"],
)
def test_a_module_takes_floats_with_channels_first_whatever_the_file_takes(
    kind: Callable[[], nn.Module], inputs: Tensor, tmp_path: Path
) -> None:
    path = export(kind, tmp_path / "net.onnx", inputs=inputs)
    module = read_onnx(path)
    assert next(iter(module.source.example.values())).shape[1:] == (3, 32, 32)
    assert {part.dtype for part in module.parameters()} == {torch.float32}
    pruned = halved(module).model
    pruned.write_onnx(tmp_path / "slim.onnx", {})
    assert_same_interface(path, tmp_path / "slim.onnx")
    types = [{t.name: t.data_type for t in onnx.load(p).graph.initializer} for p in (path, tmp_path / "slim.onnx")]
    assert types[0]["inner.weight"] == types[1]["inner.weight"]
    assert 10 * (kind is InHalf) in {*types[1].values(), 0}
    values = torch.randint(256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    (name,) = module.input_names
    (written,) = run_graph(
        tmp_path / "slim.onnx", {name: value.numpy() for name, value in pruned.file_inputs({name: values}).items()}
    )
    session = open_session(tmp_path / "slim.onnx", "cpu")
    np.testing.assert_allclose(session.predict(values), written, atol=1e-3 if kind is InHalf else 1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(written, pruned.file_outputs(values), atol=5e-3 if kind is InHalf else 1e-5)


def test_external_weights_stay_external(tmp_path: Path) -> None:
    export(Plain, tmp_path / "given.onnx")
    (tmp_path / "user").mkdir()
    path = tmp_path / "user" / "net.onnx"
    onnx.save(onnx.load(tmp_path / "given.onnx"), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    module = halved(read_onnx(path)).model
    module.write_onnx(tmp_path / "slim.onnx", {})
    assert (tmp_path / "slim.onnx.data").stat().st_size > (tmp_path / "slim.onnx").stat().st_size / 2
    assert (tmp_path / "slim.onnx.data").stat().st_size < path.with_name("w.bin").stat().st_size
    run_graph(tmp_path / "slim.onnx", {"pixels:0": np.zeros((1, 3, 32, 32), np.float32)})
    read_onnx(path).write_onnx(tmp_path / "whole.onnx", {})
    run_graph(tmp_path / "whole.onnx", {"pixels:0": np.zeros((1, 3, 32, 32), np.float32)})


def test_compress_module_takes_a_file_with_any_outputs(tmp_path: Path) -> None:
    module = read_onnx(export(Dense, tmp_path / "net.onnx"))
    batches = [torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    slim = compress_module(module, batches[0][:1], batches, ratio=0.4, round_to=1, repair=("fold",))
    slim.pruned.model.write_onnx(tmp_path / "slim.onnx", {})
    made = slim.pruned.model(batches[0])
    outputs = run_graph(tmp_path / "slim.onnx", {"pixels:0": batches[0].numpy()})
    assert [value.shape for value in outputs] == [(16, 2, 32, 32), (16, 3)]
    assert all(np.allclose(a, b.detach().numpy(), atol=1e-5) for a, b in zip(outputs, made, strict=True))


def test_initialisers_listed_as_inputs_stay_listed(tmp_path: Path) -> None:
    path = export(Plain, tmp_path / "net.onnx", keep_initializers_as_inputs=True)
    names = [value.name for value in onnx.load(path).graph.input]
    assert len(names) > 1
    halved(read_onnx(path)).model.write_onnx(tmp_path / "slim.onnx", {})
    assert set(names) <= {value.name for value in onnx.load(tmp_path / "slim.onnx").graph.input}
