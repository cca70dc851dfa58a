"""int8 files: ranges, biases and float32 operators are chosen by what files lose on samples."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from pxcompress.deploy.float_nodes import find_tail
from pxcompress.deploy.int8 import Judge, QuantisedFile, quantise
from pxcompress.deploy.nncf_int8 import quantise_by_nncf
from pxcompress.deploy.precision import convert
from pxcompress.deploy.qdq import METHODS, Style, correct_biases, measure_ranges, quantisable_nodes, write_quantised
from pxcompress.deploy.runtime import explain_failure, open_session
from pxcompress.errors import ModelError
from pxcompress.tasks.classification import Classification
from pxcompress.types import Batch

WIDTHS = (12, 32, 32, 4)


def save_net(path: Path, scale: float = 1.0) -> Path:
    """Three dense layers with ReLU between them; `scale` widens the range of what the second one gives."""
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for place, (inputs, outputs) in enumerate(itertools.pairwise(WIDTHS)):
        weight = rng.standard_normal((inputs, outputs), dtype=np.float32) / inputs**0.5
        if place == 1:
            weight[:, 0] *= scale
        if place == 2:
            weight[0] = 0  # what has the wide range is not read
        bias = rng.standard_normal(outputs, dtype=np.float32)
        weights += [numpy_helper.from_array(weight, f"w{place}"), numpy_helper.from_array(bias, f"b{place}")]
        nodes.append(helper.make_node("Gemm", [name, f"w{place}", f"b{place}"], [f"y{place}"], name=f"gemm{place}"))
        name = f"y{place}"
        if place < 2:
            nodes.append(helper.make_node("Relu", [name], [f"r{place}"], name=f"relu{place}"))
            name = f"r{place}"
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", k]) for n, k in (("x", 12), (name, 4))]
    graph = helper.make_graph(nodes, "net", ports[:1], ports[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def samples(seed: int, count: int = 256) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, 12, generator=generator), torch.zeros(32).long()) for _ in range(count // 32)]


def labelled(path: Path, batches: list[Batch]) -> list[Batch]:
    """Samples whose label is what the float32 file says."""
    session = open_session(path, "cpu", threads=1)
    return [(inputs, torch.from_numpy(session.predict(inputs).argmax(1))) for inputs, _ in batches]


def made(source: Path, folder: Path, max_drop: float) -> QuantisedFile:
    judge = Judge(labelled(source, samples(1)), Classification(), max_drop)
    return quantise(source, folder / "made.onnx", samples(0), judge)


def test_ranges_without_their_tails_are_taken_where_they_are_better(tmp_path: Path) -> None:
    source = save_net(tmp_path / "net.onnx")
    outlier = samples(0)
    outlier[0][0][0] *= 200  # one sample widens every range
    judge = Judge(labelled(source, samples(1)), Classification(), max_drop=1.0)
    best = quantise(source, tmp_path / "best.onnx", outlier, judge)
    plain = quantise(source, tmp_path / "plain.onnx", outlier, Judge())
    assert best.method != "extremes"
    assert plain.method == "extremes"
    assert best.rating.error < 0.1
    assert best.in_float == ()


def test_a_bias_makes_up_for_what_its_layer_is_moved_by(tmp_path: Path) -> None:
    source, shifted = save_net(tmp_path / "net.onnx"), tmp_path / "moved.onnx"
    model = onnx.load(source)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    before = numpy_helper.to_array(tensors["b2"])
    tensors["b2"].CopyFrom(numpy_helper.from_array(before + np.float32([1, 0, -2, 0.5]), "b2"))
    onnx.save(model, shifted)
    assert correct_biases(source, source, shifted, tmp_path / "corrected.onnx", samples(0)) == 3
    after = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "corrected.onnx").graph.initializer
    }
    np.testing.assert_allclose(after["b2"], before - [1, 0, -2, 0.5], atol=1e-5)
    np.testing.assert_allclose(after["b0"], numpy_helper.to_array(tensors["b0"]), atol=1e-6)


def test_corrected_biases_bring_the_means_back(tmp_path: Path) -> None:
    source = save_net(tmp_path / "net.onnx")
    ranges = measure_ranges(source, samples(0), "extremes")
    write_quantised(source, tmp_path / "q.onnx", ranges, Style())
    correct_biases(source, source, tmp_path / "q.onnx", tmp_path / "c.onnx", samples(0))
    write_quantised(tmp_path / "c.onnx", tmp_path / "qc.onnx", ranges, Style())
    inputs = torch.cat([batch for batch, _ in samples(0)])
    exact, plain, corrected = (
        open_session(tmp_path / name, "cpu", threads=1).predict(inputs).mean(0)
        for name in ("net.onnx", "q.onnx", "qc.onnx")
    )
    assert np.abs(corrected - exact).max() < np.abs(plain - exact).max()


def test_what_loses_most_stays_in_float32_until_the_budget_is_met(tmp_path: Path) -> None:
    source = save_net(tmp_path / "net.onnx", scale=3000)
    free, held = made(source, tmp_path, max_drop=1.0), made(source, tmp_path, max_drop=0.02)
    assert free.in_float == ()
    assert free.rating.drop > 0.02
    assert held.rating.drop <= 0.02
    assert 0 < len(held.in_float) < held.nodes
    assert f"{len(held.in_float)} of {held.nodes} operators left in float32" in held.recipe
    counts = Counter(node.op_type for node in onnx.load(held.path).graph.node)
    assert counts["QuantizeLinear"] > 0


def test_a_gpu_gets_signed_activations_around_zero(tmp_path: Path) -> None:
    source = save_net(tmp_path / "net.onnx")
    write_quantised(source, tmp_path / "gpu.onnx", measure_ranges(source, samples(0), "extremes"), Style(gpu=True))
    graph = onnx.load(tmp_path / "gpu.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    zeros = [numpy_helper.to_array(tensors[node.input[2]]) for node in graph.node if node.op_type == "QuantizeLinear"]
    assert zeros
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert "relu0" in {node.name for node in graph.node}
    feeding = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    quantised = {node.name for node in graph.node if node.op_type == "Gemm" and node.input[1] in feeding}
    assert quantised == {"gemm1"}  # the others are narrower than 16


def test_openvino_gets_what_nncf_makes_or_the_name_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_net(tmp_path / "net.onnx")
    judge = Judge(labelled(source, samples(1)), Classification(), 0.5, "openvino")
    if not explain_failure("openvino") and importlib.util.find_spec("nncf"):
        path = convert(source, tmp_path / "int8.onnx", "int8", samples(0), judge).path
        assert "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
        assert open_session(path, "openvino").metadata["quantisation"] == "ranges by NNCF"
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ModelError, match=r"needs the package nncf \(pip install nncf\)"):
        quantise_by_nncf(source, tmp_path / "none.onnx", samples(0), judge)
    assert not (tmp_path / "none.onnx").exists()


def test_a_converted_file_says_how_it_was_made(tmp_path: Path) -> None:
    source = save_net(tmp_path / "net.onnx")
    assert quantisable_nodes(source)[0] == "gemm0"
    convert(source, tmp_path / "int8.onnx", "int8", samples(0))
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "int8.onnx").metadata_props}
    assert facts == {"precision": "int8", "quantisation": "ranges by extremes"}


@pytest.mark.parametrize("method", METHODS)
def test_ranges_cover_what_most_samples_give(tmp_path: Path, method: str) -> None:
    source = save_net(tmp_path / "net.onnx")
    low, high = (np.asarray(end).item() for end in measure_ranges(source, samples(0), method)["x"].range_value)
    assert -6 < low < -1.5
    assert 1.5 < high < 6


def test_what_is_made_of_results_stays_in_floating_point() -> None:
    """Boxes in pixels beside probabilities have no scale in common; whatever a layer with weights reads has its own."""
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["hidden"], "first"),
        helper.make_node("Sigmoid", ["hidden"], ["gate"], "gate"),
        helper.make_node("MatMul", ["gate", "w"], ["logits"], "last"),
        helper.make_node("Sigmoid", ["logits"], ["chances"], "chances"),
        helper.make_node("Concat", ["chances", "logits"], ["all"], "all", axis=1),
    ]
    graph = helper.make_graph(nodes, "boxes", [], [], [weight])
    assert sorted(find_tail(graph)) == ["all", "chances"]
