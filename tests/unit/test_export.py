from __future__ import annotations

import copy
import hashlib
import logging
import sys
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from exports import METADATA, Exported, make_cnn
from torch import Tensor, nn

from pxcompress.deploy import precision, runtime
from pxcompress.deploy.export import OPSET, _open_lengths, artifact_of, export_onnx, onnx_files
from pxcompress.deploy.parity import verify_other_sizes, verify_parity
from pxcompress.errors import DataError, ModelError
from pxcompress.tasks.classification import Classification
from pxcompress.types import OpenAxes


def _inputs(count: int, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def _nodes(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("name", ["wide_cnn", "small_vit"])
def test_the_file_computes_what_the_model_computes(name: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(name)
    session = runtime.open_session(exported.path, "cpu")
    for count in (1, 2, 7):
        inputs = _inputs(count)
        with torch.no_grad():
            expected = exported.model(inputs).numpy()
        assert abs(session.predict(inputs) - expected).max() < 1e-5 * max(1, abs(expected).max())
    parity = verify_parity(exported.model, exported.path, [_inputs(20)])
    assert parity.passed
    assert parity.samples == 20
    assert parity.agreement == 1.0
    assert 0 <= parity.max_abs < 1e-4


def test_artifact_describes_the_file(wide_cnn: Exported) -> None:
    artifact, content = wide_cnn.artifact, wide_cnn.path.read_bytes()
    proto = onnx.load(wide_cnn.path)
    onnx.checker.check_model(proto, full_check=True)
    assert artifact.bytes == len(content)
    assert artifact.sha256 == hashlib.sha256(content).hexdigest()
    assert artifact.opset == OPSET == proto.opset_import[0].version
    assert artifact.input_shape == (None, 3, 16, 16)
    assert [value.name for value in proto.graph.input] == ["input"]
    assert [value.name for value in proto.graph.output] == ["logits"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("name", ["wide_cnn", "small_vit"])
def test_only_the_given_metadata_and_nothing_of_this_machine(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name).path
    proto = onnx.load(path)
    assert {entry.key: entry.value for entry in proto.metadata_props} == METADATA
    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        assert not part.metadata_props
        assert not part.doc_string
    assert not proto.doc_string
    content = path.read_bytes()
    for trace in (str(Path.cwd()), sys.prefix, str(Path(torch.__file__).parent), "site-packages", ".py", "stack_trace"):
        assert trace.encode() not in content


def test_batchnorm_is_folded_into_the_convolution(wide_cnn: Exported) -> None:
    assert _nodes(wide_cnn.path).count("Conv") == 2
    assert "BatchNormalization" not in _nodes(wide_cnn.path)


def test_attention_is_decomposed(small_vit: Exported) -> None:
    assert "Attention" not in _nodes(small_vit.path)
    assert "Softmax" in _nodes(small_vit.path)


def test_model_is_left_as_it_was_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_cnn(4).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[3].register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / "model.onnx", {})
    verify_parity(model, tmp_path / "model.onnx", [_inputs(3, size=8)])
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert model[2].inplace is True
    assert len(model[3]._forward_hooks) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert logging.root.manager.disable == logging.NOTSET
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_same_model_same_bytes(wide_cnn: Exported, tmp_path: Path) -> None:
    again = export_onnx(wide_cnn.model, wide_cnn.example, tmp_path / "other.onnx", METADATA)
    assert again.sha256 == wide_cnn.artifact.sha256


def test_multihead_attention_exports(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).mT
            return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))

    model = Model()
    export_onnx(model, torch.randn(1, 8, 3, 3), tmp_path / "model.onnx", {})
    assert verify_parity(model, tmp_path / "model.onnx", [torch.randn(6, 8, 3, 3)]).passed


class _Windows(nn.Module):
    """Attention within windows, with five axes, under a mask of heads and windows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Conv2d(3, 24, 1), nn.Linear(8, 5)
        self.mask = nn.Parameter(torch.randn(2, 4, 1, 64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(-1, 3, 2, 4, 4, 64).permute(1, 0, 2, 4, 5, 3)  # (n, heads, windows, 64, width)
        return self.head(F.scaled_dot_product_attention(q, k, v, self.mask, scale=0.3).mean((2, 3)).flatten(1))


def test_attention_of_five_axes_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, attention = _Windows().eval(), F.scaled_dot_product_attention
    export_onnx(model, _inputs(1), tmp_path / "model.onnx", {})
    assert F.scaled_dot_product_attention is attention
    parity = verify_parity(model, tmp_path / "model.onnx", [_inputs(5)])
    assert parity.passed
    assert parity.max_abs < 1e-5


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of more than 100 bytes go beside their file, as else those of more than 1.5 GiB."""
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 100)
    monkeypatch.setattr(precision, "EMBEDDED_BYTES", 100)


def test_other_precisions_of_a_large_model_are_large_as_well(tmp_path: Path, large: None) -> None:
    model, batches = make_cnn(16), [(_inputs(4, size=8), torch.zeros(4))]
    source = export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / "model.onnx", METADATA).path
    expected = runtime.open_session(source, "cpu").predict(batches[0][0])
    for name in precision.PRECISIONS:
        (tmp_path / name).mkdir()
        artifact = precision.convert(source, tmp_path / name / "model.onnx", name, batches)
        assert len(onnx_files(artifact.path)) == 2
        assert sorted(artifact.path.parent.iterdir()) == sorted(onnx_files(artifact.path))
        session = runtime.open_session(artifact.path, "cpu")
        assert {key: session.metadata[key] for key in (*METADATA, "precision")} == {**METADATA, "precision": name}
        assert abs(session.predict(batches[0][0]) - expected).max() < 0.1 * abs(expected).max()


def test_a_hash_covers_the_weights_beside_a_file(tmp_path: Path, large: None) -> None:
    path = export_onnx(make_cnn(16), torch.randn(1, 3, 8, 8), tmp_path / "model.onnx", {}).path
    before = artifact_of(path).sha256
    weights = onnx_files(path)[1]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    assert artifact_of(path).sha256 != before


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_may_be_fixed(tmp_path: Path, batch: int) -> None:
    model = make_cnn(8)
    artifact = export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / "model.onnx", {}, axes=OpenAxes(batch))
    assert artifact.input_shape == (batch, 3, 8, 8)
    assert [dim.dim_value for dim in onnx.load(artifact.path).graph.output[0].type.tensor_type.shape.dim] == [batch, 5]
    parity = verify_parity(model, artifact.path, [_inputs(7, size=8)])
    assert (parity.passed, parity.samples) == (True, 7)
    for name in precision.PRECISIONS:  # five images are no whole number of batches
        made = precision.convert(artifact.path, tmp_path / f"{name}.onnx", name, [(_inputs(5, size=8), torch.zeros(5))])
        assert made.input_shape == artifact.input_shape


def test_large_weights_go_beside_the_file(tmp_path: Path, large: None) -> None:
    model = make_cnn(16)
    artifact = export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / "model.onnx", {})
    files = onnx_files(tmp_path / "model.onnx")
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert len(files) == 2
    assert artifact.bytes == sum(file.stat().st_size for file in files)
    assert verify_parity(model, artifact.path, [_inputs(4, size=8)]).passed


class _Loose(nn.Module):
    """A forward that names no input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.head(args[0].mean((2, 3)))


def test_an_input_without_a_name_has_any_batch(tmp_path: Path) -> None:
    model = _Loose().eval()
    artifact = export_onnx(model, _inputs(1, size=8), tmp_path / "model.onnx", {})
    assert artifact.input_shape == (None, 3, 8, 8)
    assert verify_parity(model, artifact.path, [_inputs(5, size=8)]).passed


class _Forward(nn.Module):
    """A model that computes `function`."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> object:
        return self.function(self.head, x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda head, x: head(x.mean((2, 3))).sum(), r"returns no tensor \(2, ...\) for 2 inputs"),
        (lambda head, x: {"scale": head.weight.sum()}, r"returns no tensor \(2, ...\) for 2 inputs"),
        (lambda head, x: head(x), r"does not run on an input of shape \(2, 3, 8, 8\)"),
        (lambda head, x: head(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))), "model cannot be exported: "),
        (lambda head, x: head(x.reshape(2, 3, -1).mean(2)), "fixed batch of 2"),
    ],
)
def test_what_cannot_be_exported(
    function: object, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = _Forward(function).train()
    (tmp_path / "model.onnx").write_text("an earlier file")
    with pytest.raises(ModelError, match=message) as caught:
        export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / "model.onnx", {})
    assert "\n" not in str(caught.value)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.onnx", "an earlier file")]
    assert model.training
    assert capfd.readouterr() == ("", "")


def test_parity_sees_a_difference(wide_cnn: Exported) -> None:
    changed = copy.deepcopy(wide_cnn.model)
    with torch.no_grad():
        changed[-1].bias[0] += 0.5
    parity = verify_parity(changed, wide_cnn.path, [_inputs(5)])
    assert not parity.passed
    assert parity.max_abs == pytest.approx(0.5, abs=1e-4)
    assert verify_parity(changed, wide_cnn.path, [_inputs(5)], tolerance=1.0).passed


def test_parity_fails_on_nan(wide_cnn: Exported) -> None:
    broken = copy.deepcopy(wide_cnn.model)
    with torch.no_grad():
        broken[-1].bias.fill_(float("nan"))
    assert not verify_parity(broken, wide_cnn.path, [_inputs(5)]).passed


@pytest.mark.parametrize(("sizes", "samples", "used"), [([1], 64, 1), ([3, 4], 64, 7), ([40, 40], 64, 64), ([9], 5, 5)])
def test_parity_counts_its_samples(wide_cnn: Exported, sizes: list[int], samples: int, used: int) -> None:
    batches = [(_inputs(size), torch.zeros(size, dtype=torch.int64)) for size in sizes]
    parity = verify_parity(wide_cnn.model, wide_cnn.path, batches, samples=samples)
    assert parity.samples == used
    assert parity.passed


def test_parity_needs_inputs(wide_cnn: Exported) -> None:
    with pytest.raises(DataError, match="at least one sample"):
        verify_parity(wide_cnn.model, wide_cnn.path, [])


class CountedBatch(nn.Module):
    """Asks for its batch by `len`, of which Python makes a plain number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(1, 3).tile([len(x), 1]) + x.reshape(len(x), -1).sum(1, keepdim=True)


def test_a_batch_that_is_asked_for_by_len_stays_open() -> None:
    net, sizes = CountedBatch(), ({0: torch.export.Dim("batch")},)
    with pytest.raises(Exception, match="specialized it to be a constant"):
        torch.export.export(net, (torch.ones(2, 4),), dynamic_shapes=sizes)
    with _open_lengths(net):
        program = torch.export.export(net, (torch.ones(2, 4),), dynamic_shapes=sizes)
        assert len([1, 2]) == 2
    assert "len" not in globals()
    assert program.module()(torch.ones(5, 4)).shape == (5, 3)


@pytest.mark.parametrize("batch", [None, 2])
def test_height_and_width_may_be_open(tmp_path: Path, batch: int | None) -> None:
    model = make_cnn(8)
    artifact = export_onnx(model, _inputs(1, size=8), tmp_path / "model.onnx", {}, axes=OpenAxes(batch, size=True))
    assert artifact.input_shape == (batch, 3, None, None)
    parity = verify_other_sizes(model, artifact.path, _inputs(1, size=8), Classification())
    assert parity.passed
    outputs = runtime.open_session(artifact.path, "cpu").predict(torch.randn(2, 3, 11, 7))
    assert outputs.shape == (2, 5)


def test_a_size_that_the_exporter_fixes_is_refused(tmp_path: Path) -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + torch.ones(3, 8, 8)).mean((2, 3))

    with pytest.raises(ModelError, match="takes 8x8 only"):
        export_onnx(Square(), _inputs(1, size=8), tmp_path / "model.onnx", {}, axes=OpenAxes(size=True))
