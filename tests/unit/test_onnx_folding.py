"""Constants right behind a layer of an ONNX file go into its weights, in whatever form the file has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx_nets import halved

from pxcompress.deploy.all_outputs import run_graph
from pxcompress.deploy.onnx_modules import read_onnx, relative_difference
from pxcompress.onnx_in import OnnxModule, writing

IMAGES, VECTORS = (3, 8, 8), (6,)


def save(path: Path, shape: tuple[int, ...], nodes: list[NodeProto], weights: dict[str, tuple[int, ...]]) -> Path:
    """A graph from `x` to `y` with drawn weights of these shapes, none near 0."""
    draw = np.random.default_rng(0)
    values = {name: draw.uniform(0.5, 1.5, size) * draw.choice([-1, 1], size) for name, size in weights.items()}
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()]
    ports = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)]
        for name, sizes in (("x", ["n", *shape]), ("y", ["n", 5]))
    ]
    graph = helper.make_graph(nodes, "graph", *ports, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def convolutions(path: Path, kind: str, *operands: str) -> Path:
    """Two convolutions with an operator between them that has a constant per channel."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["h"]),
        helper.make_node(kind, list(operands), ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["o"]),
        helper.make_node("GlobalAveragePool", ["o"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3"], ["y"]),
    ]
    weights = {"w1": (8, 3, 3, 3), "b1": (8,), "c": (8, 1, 1), "w2": (4, 8, 1, 1), "w3": (4, 5)}
    return save(path, IMAGES, nodes, weights)


def assert_same(module: OnnxModule, path: Path, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = module.file_outputs(inputs)
    assert relative_difference(outputs, run_graph(path, {"x": inputs.numpy()})[0]) < 1e-5


@pytest.mark.parametrize(
    ("kind", "operands", "folds"),
    [
        ("Mul", ("h", "c"), True),
        ("Mul", ("c", "h"), True),
        ("Div", ("h", "c"), True),
        ("Add", ("c", "h"), True),
        ("Sub", ("h", "c"), True),
        ("Sub", ("c", "h"), False),
    ],
)
def test_a_constant_behind_a_convolution_counts_as_it_stands(
    tmp_path: Path, kind: str, operands: tuple[str, str], folds: bool
) -> None:
    path = convolutions(tmp_path / "net.onnx", kind, *operands)
    module = read_onnx(path)
    assert_same(module, path, IMAGES)
    pruned = halved(module)
    assert any(pruned.plan.removed.values())
    pruned.model.write_onnx(tmp_path / "slim.onnx", {})
    assert_same(pruned.model, tmp_path / "slim.onnx", IMAGES)
    kinds = [node.op_type for node in onnx.load(tmp_path / "slim.onnx").graph.node]
    assert (kind not in kinds) == folds


def gemms(path: Path, between: list[NodeProto], last: str) -> Path:
    """Two of them, whose factors differ, with some nodes between `h` and `last`."""
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], alpha=0.5, beta=2.0),
        *between,
        helper.make_node("Relu", [last], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], alpha=3.0, beta=0.25, transB=1),
    ]
    return save(path, VECTORS, nodes, {"w1": (6, 16), "b1": (16,), "c": (16,), "w2": (5, 16), "b2": (5,)})


def test_what_is_added_behind_a_gemm_is_not_multiplied_by_its_beta(tmp_path: Path) -> None:
    path = gemms(tmp_path / "net.onnx", [helper.make_node("Add", ["h", "c"], ["m"])], "m")
    assert_same(read_onnx(path), path, VECTORS)


def test_factors_of_a_gemm_count_once(tmp_path: Path) -> None:
    """They are in the weights of the layer that is read, and so not in the node that is written."""
    path = gemms(tmp_path / "net.onnx", [], "h")
    module = read_onnx(path)
    assert_same(module, path, VECTORS)
    pruned = halved(module)
    assert sum(map(len, pruned.plan.removed.values())) == 8
    pruned.model.write_onnx(tmp_path / "slim.onnx", {})
    assert_same(pruned.model, tmp_path / "slim.onnx", VECTORS)


def test_weights_that_one_file_cannot_hold_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in protobuf's format ends at two gigabytes."""
    module = read_onnx(convolutions(tmp_path / "net.onnx", "Mul", "h", "c"))
    module.write_onnx(tmp_path / "small.onnx", {})
    assert not (tmp_path / "small.onnx.data").exists()
    monkeypatch.setattr(writing, "LARGEST_INLINE", 1000)
    module.write_onnx(tmp_path / "large.onnx", {})
    assert (tmp_path / "large.onnx.data").exists()
    assert_same(module, tmp_path / "large.onnx", IMAGES)
