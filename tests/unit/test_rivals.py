"""What `benchmarks/rivals.py` promises about other packages' models, and the traps in them that it goes around."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch_pruning as tp
from models import batches_of, snapshot
from models import subject as subject_named
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.functional import cross_entropy

from pxcompress.cost.count import count_macs
from pxcompress.errors import ResultError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
rivals = pytest.importorskip("rivals")

TARGETS = (0.8, 0.6)
NOTHING = rivals.Refused("no")


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([(0.9, "a"), (0.52, "b"), (0.49, "c"), (0.3, "d")], "c"),
        ([(0.52, "a"), (0.47, "b")], "a"),  # above, but within the tolerance
        ([(0.53, "a"), (0.3, "b")], "b"),
        ([(0.55, "a"), NOTHING, (0.48, "b")], "b"),
        ([(0.55, "a"), NOTHING], NOTHING),
        ([NOTHING, (0.55, "a")], rivals.Refused("removes no more than leaves 0.55 of the MACs")),
        ([], rivals.Refused("removes no more than leaves 1.00 of the MACs")),
    ],
)
def test_closest_is_next_to_the_target_and_never_far_above(trials: Sequence[object], expected: object) -> None:
    assert rivals.closest(iter(trials), [0.5]) == {0.5: expected}


def test_closest_stops_below_all_targets() -> None:
    trials = iter([(0.6, "a"), (0.4, "b"), (0.2, "c")])
    assert rivals.closest(trials, [0.6, 0.5]) == {0.6: "a", 0.5: "b"}
    assert next(trials) == (0.2, "c")


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("resnet_basic", rivals.TorchPruning("L2", "local", round_to=2)),
        ("resnet_bottleneck", rivals.TorchPruning("Taylor", "isomorphic", round_to=1)),
        ("flatten_cnn", rivals.TorchPruning("Hessian", "global", round_to=1)),
        ("vit", rivals.TorchPruning("Taylor", "global", iterative=True, round_to=1)),
        ("vit", rivals.TorchPruning("Hessian, summed", "local", whole_heads=True, round_to=1)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.importance,
)
def test_torch_pruning_comes_to_the_target(family: str, setting: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "TRIALS", 12)
    subject = subject_named(family)
    before = snapshot(subject.model)
    results = setting(subject.model, subject.example, batches_of(subject.inputs, 4), TARGETS)
    assert snapshot(subject.model) == before
    dense, outputs = count_macs(subject.model, subject.example), subject.model(subject.inputs)
    for target in TARGETS:
        model = results[target]
        assert isinstance(model, nn.Module), model
        assert 0 < count_macs(model, subject.example) / dense <= target + rivals.TOLERANCE
        slim = model(subject.inputs)
        assert slim.shape == outputs.shape
        assert slim.isfinite().all()


def test_a_package_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing heads step by step ends in an error of the package: one of its variables was never set."""
    monkeypatch.setattr(rivals, "TRIALS", 12)
    subject = subject_named("vit")
    setting = rivals.TorchPruning("L2", "global", iterative=True, whole_heads=True)
    results = setting(subject.model, subject.example, [], TARGETS)
    assert all("head_thres" in results[target].reason for target in TARGETS)


def test_hessian_is_summed_where_the_package_keeps_the_last_sample() -> None:
    """When this fails, the package sums, and `SummedHessian` can go."""
    subject = subject_named("flatten_cnn")
    batches = batches_of(subject.inputs, 3)
    model = rivals._trainable(subject.model)
    squares = []
    for image, label in ((i[None], j[None]) for inputs, labels in batches for i, j in zip(inputs, labels, strict=True)):
        model.zero_grad()
        cross_entropy(model(image), label).backward()
        squares.append([parameter.grad.square() for parameter in model.parameters()])
    ours, theirs = rivals.SummedHessian(), tp.importance.GroupHessianImportance()
    for scorer in (ours, theirs):
        rivals.accumulate(model, scorer, batches)
    assert len(squares) > 1
    for place, parameter in enumerate(model.parameters()):
        mean = sum(sample[place] for sample in squares) / len(squares)
        assert torch.allclose(ours._accu_grad[parameter] / ours._counter[parameter], mean, rtol=1e-4, atol=1e-9)
        last = theirs._accu_grad[parameter] / theirs._counter[parameter]
        assert torch.allclose(last, squares[-1][place], rtol=1e-4, atol=1e-9)


def test_pruners_do_not_share_what_they_remember() -> None:
    """The defaults of `BasePruner` are dictionaries of the whole process."""
    subject = subject_named("vit")
    rivals.TorchPruning("L2", "local", round_to=1)(subject.model, subject.example, [], [0.9])
    defaults = [value for value in tp.pruner.BasePruner.__init__.__defaults__ if isinstance(value, dict)]
    assert defaults
    assert not any(defaults)


def test_reestimate_changes_statistics_and_nothing_else() -> None:
    subject = subject_named("conv1d")
    model = rivals._trainable(subject.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert rivals.reestimate(model, batches_of(subject.inputs, 4)) is model
    changed = {name.rpartition(".")[2] for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def _onnx(hidden: int) -> onnx.ModelProto:
    """Convolution 3 -> hidden -> 4 on 8 x 8 pixels, mean, two dense layers 4 -> 6 -> 5; weights are drawn."""
    generator = np.random.default_rng(0)
    sizes = {"a": (hidden, 3, 3, 3), "b": (4, hidden, 3, 3), "c": (4, 6), "d": (5, 6)}
    weights = [
        numpy_helper.from_array(generator.normal(size=size).astype(np.float32), key) for key, size in sizes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["input", "a"], ["1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["1"], ["2"]),
        helper.make_node("Conv", ["2", "b"], ["3"], strides=[2, 2]),
        helper.make_node("ReduceMean", ["3", "axes"], ["4"], keepdims=0),
        helper.make_node("MatMul", ["4", "c"], ["5"]),
        helper.make_node("Gemm", ["5", "d"], ["logits"], transB=1),
    ]
    weights.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *size])
        for name, size in (("input", [3, 8, 8]), ("logits", [5]))
    ]
    graph = helper.make_graph(nodes, "tiny", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("hidden", [8, 5])
def test_onnx_macs_is_arithmetic(hidden: int) -> None:
    assert rivals.onnx_macs(_onnx(hidden)) == 64 * 27 * hidden + 9 * 9 * hidden * 4 + 4 * 6 + 6 * 5


def test_onnx_macs_refuses_what_it_cannot_see() -> None:
    model = _onnx(8)
    model.graph.node[1].op_type, model.graph.node[1].domain = "Unknown", "somewhere"
    model.opset_import.append(helper.make_opsetid("somewhere", 1))
    with pytest.raises(ResultError, match="no shape can be inferred for the Conv"):
        rivals.onnx_macs(model)


@pytest.mark.parametrize("importance", ["magnitude", "Wanda"])
def test_onnxsim_comes_to_the_target(importance: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxsim")
    path = tmp_path / "dense.onnx"
    onnx.save(_onnx(16), path)
    batches = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))]
    results = rivals.Onnxsim(importance)(path, batches, [0.5, 0.001])
    share = rivals.onnx_macs(onnx.load(results[0.5])) / rivals.onnx_macs(onnx.load(path))
    assert math.isclose(share, 0.5, abs_tol=rivals.TOLERANCE)
    assert results[0.001].reason == "removes no more than leaves 0.19 of the MACs"  # 3 of 16 channels


def test_onnxsim_that_is_missing_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    results = rivals.Onnxsim("magnitude")(tmp_path / "dense.onnx", [], [0.5])
    assert "pxcompress[benchmarks]" in results[0.5].reason
