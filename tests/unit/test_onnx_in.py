"""ONNX files as models: read, compared with ONNX Runtime, pruned, and written back into the user's graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from pxcompress import compress_module
from pxcompress.deploy.all_outputs import run_graph
from pxcompress.deploy.onnx_modules import check_agrees, read_onnx
from pxcompress.deploy.runtime import open_session
from pxcompress.errors import ModelError
from pxcompress.graph import find_groups, prune
from pxcompress.models.loading import classifier_names
from pxcompress.onnx_in import OnnxModule
from pxcompress.types import Plan, Pruned


class Plain(nn.Module):
    """Convolutions with a residual, BatchNorm left as it is behind an activation, a flatten, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.out = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 16, 1)
        self.norm, self.first, self.head = nn.BatchNorm2d(24), nn.Linear(16 * 16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        x = x + F.pad(self.out(self.norm(F.relu(self.inner(x)))), (1, 1, 1, 1))
        x = F.avg_pool2d(x, 4)
        return self.head(F.gelu(self.first(x.flatten(1)))).softmax(-1)


class Attending(nn.Module):
    """Tokens, an attention of four heads with one layer for queries, keys and values, and a chunked gate."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.qkv, self.proj = (
            nn.Conv2d(3, 32, 8, 8),
            nn.LayerNorm(32),
            nn.Linear(32, 96),
            nn.Linear(32, 32),
        )
        self.gate, self.back, self.head = nn.Linear(32, 48), nn.Linear(24, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        weights = ((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, width))
        a, b = self.gate(x).chunk(2, -1)
        return self.head((x + self.back(a * torch.sigmoid(b))).mean(1))


class Dense(nn.Module):
    """Two outputs, the first an image as large as the input."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 16, 3, 2, 1), nn.ConvTranspose2d(16, 8, 2, 2)
        self.inner, self.outer = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 8, 3, padding=1)
        self.map, self.count = nn.Conv2d(8, 2, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.down(x))
        return torch.sigmoid(self.map(F.relu(self.outer(F.relu(self.inner(self.up(x))))))), self.count(x.mean((2, 3)))


def export(kind: Callable[[], nn.Module], path: Path, opset: int = 17, **options: Any) -> Path:
    """A net with random weights as a file of the older exporter, with odd names and any batch."""
    torch.manual_seed(0)
    net = kind().eval()
    outputs = ["score/1:0", "second"][: 2 if kind is Dense else 1]
    names = {"pixels:0": {0: "N"}, **{name: {0: "N"} for name in outputs}}
    given = {"dynamic_axes": names, "input_names": ["pixels:0"], "output_names": outputs, **options}
    inputs = given.pop("inputs", torch.randn(2, 3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (inputs,), path, dynamo=False, opset_version=opset, **given)
    proto = onnx.load(path)
    proto.metadata_props.add(key="author", value="someone")
    onnx.save(proto, path)
    return path


def halved(module: OnnxModule) -> Pruned:
    """The module without the first half of every group."""
    example = next(iter(module.source.example.values()))[:1]
    groups = find_groups(module, example, classifier_names(module, example)).groups
    removed = {group.name: tuple(range(group.units // 2)) for group in groups}
    return prune(module, groups, Plan(removed, "macs", "MACs", 1.0, 1.0, 1.0))


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
    proto = _proto(*nodes, opset=23, axis=np.array([1]), **weights)
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
    found = run_graph(tmp_path / "slim.onnx", {"pixels:0": batches[0].numpy()})
    assert [value.shape for value in found] == [(16, 2, 32, 32), (16, 3)]
    assert all(np.allclose(a, b.detach().numpy(), atol=1e-5) for a, b in zip(found, made, strict=True))


def test_initialisers_listed_as_inputs_stay_listed(tmp_path: Path) -> None:
    path = export(Plain, tmp_path / "net.onnx", keep_initializers_as_inputs=True)
    names = [value.name for value in onnx.load(path).graph.input]
    assert len(names) > 1
    halved(read_onnx(path)).model.write_onnx(tmp_path / "slim.onnx", {})
    assert set(names) <= {value.name for value in onnx.load(tmp_path / "slim.onnx").graph.input}


def test_another_result_than_onnx_runtime_is_refused_with_the_node(tmp_path: Path) -> None:
    module = read_onnx(export(Plain, tmp_path / "net.onnx"))
    with torch.no_grad():
        module.get_submodule("inner").weight[0, 0, 0, 0] += 0.5
    with pytest.raises(ModelError, match="first at Conv '/inner/Conv'"):
        check_agrees(module)


def _proto(*nodes: Any, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    domains = {node.domain for node in nodes} - {""}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def _node(kind: str, *inputs: str, **options: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs) or ["x"], ["y"], **options)


def _huge(rows: int = 1 << 40) -> onnx.ModelProto:
    """A weight that says it has more rows than there are."""
    proto = _proto(_node("MatMul", "x", "w"), w=np.zeros((4, 4), np.float32))
    proto.graph.initializer[0].dims[0] = rows
    return proto


def _if_on_data() -> onnx.ModelProto:
    """A branch that the mean of the input chooses."""
    branches = [
        helper.make_graph(
            [helper.make_node(kind, ["x"], [kind])],
            kind,
            [],
            [helper.make_tensor_value_info(kind, TensorProto.FLOAT, ["n", 4])],
        )
        for kind in ("Relu", "Neg")
    ]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Greater", ["mean", "zero"], ["high"]),
        helper.make_node("If", ["high"], ["y"], "gate", then_branch=branches[0], else_branch=branches[1]),
    ]
    return _proto(*nodes, zero=np.zeros((), np.float32))


REFUSED: dict[str, tuple[onnx.ModelProto, str]] = {
    "quantised": (_proto(_node("QLinearMatMul")), "quantised already .*float32 file it was made from"),
    "runtime's own": (_proto(_node("FusedConv", domain="com.microsoft")), "com.microsoft .FusedConv.*before optim"),
    "QDQ": (
        _proto(_node("QuantizeLinear", "x", "s"), _node("DequantizeLinear", "x", "s"), s=np.ones((), np.float32)),
        r"quantised already \(DequantizeLinear, QuantizeLinear\).*--targets int8",
    ),
    "loop": (_proto(_node("Loop")), "has a loop"),
    "scan": (_proto(_node("Scan")), "has a loop .Scan"),
    "if on data": (_if_on_data(), "If 'gate': which way it goes depends on the input's values"),
    "nothing makes it": (_proto(_node("Relu", "other")), "Relu '' reads 'other', which nothing in the file makes"),
    "bfloat16": (
        _proto(_node("MatMul", "x", "w"), w=np.zeros((16, 16), ml_dtypes.bfloat16)),
        "bfloat16.*export it in float32 or float16",
    ),
    "too new": (_proto(_node("Relu"), opset=99), "opset 99; known are 7 to"),
    "too large": (_huge(), r"tensor 'w' says it has the shape \[1099511627776, 4\]; refused"),
    "not its bytes": (_huge(8), r"tensor 'w' of shape \[8, 4\] has 64 bytes, not 128; fetch the whole file"),
    "unknown": (
        _proto(_node("Det"), _node("Det"), _node("NonMaxSuppression")),
        r"Det \(2x\), NonMaxSuppression \(1x\)",
    ),
    "opset": (_proto(_node("Relu"), opset=5), "opset 5"),
    "double": (_proto(_node("MatMul", "x", "w"), w=np.zeros((16, 16))), "weights in float64"),
    "no graph": (onnx.ModelProto(), "no ONNX file"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_cannot_be_pruned_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    proto, message = REFUSED[case]
    path = tmp_path / "net.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=message) as refusal:
        read_onnx(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07\x12"])
def test_files_that_are_no_onnx_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="no ONNX file"):
        read_onnx(tmp_path / "net.onnx")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = export(Plain, tmp_path / "net.onnx")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError):
        read_onnx(path)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "sub/w.bin", "", "link.bin", "short.bin"])
def test_external_weights_from_elsewhere_are_refused_before_they_are_read(location: str, tmp_path: Path) -> None:
    proto = _proto(_node("MatMul", "x", "w"), w=np.zeros((4, 4), np.float32))
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "64"}.items():
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "link.bin").symlink_to("/etc/passwd")
    (tmp_path / "short.bin").write_bytes(b"1234")
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"not beside it|fetch the whole file"):
        read_onnx(tmp_path / "net.onnx")
