"""Timing ONNX files side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path

import onnx
import pytest
from command import Px, image_folder, one_line
from conftest import Exported
from onnx import TensorProto, helper

from pxcompress.deploy import runtime
from pxcompress.deploy.bench import Where, bench, usable
from pxcompress.errors import InputError, ResultError

without_gpu = pytest.mark.skipif(not runtime.unusable("cuda"), reason="says what happens without a GPU")


def _classifier(path: Path, shape: list[int | str]) -> Path:
    """Global pooling and Flatten for inputs of `shape`."""
    kind = TensorProto.FLOAT
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["y"])]
    ports = [helper.make_tensor_value_info("x", kind, shape)], [helper.make_tensor_value_info("y", kind, None)]
    graph = helper.make_graph(nodes, "g", *ports)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_bench_times_every_file_at_every_batch_size(wide_cnn: Exported, slim_cnn: Exported, tmp_path: Path) -> None:
    other = _classifier(tmp_path / "open.onnx", ["n", 3, "h", "w"])
    paths = [wide_cnn.path, str(slim_cnn.path), other]
    rows = bench(paths, (1, 4), where=Where(("cpu",), 1), input_size=(3, 16, 16), runs=20)
    assert [(row.path, row.batch_size) for row in rows] == [(str(path), size) for size in (1, 4) for path in paths]
    for row in rows:
        assert row.input_shape == (row.batch_size, 3, 16, 16)
        assert row.latency_ms.runs == 20
        assert row.throughput == pytest.approx(row.batch_size * 1e3 / row.latency_ms.mean)
        assert (row.precision, row.threads, row.placement.got) == ("fp32", 1, "CPUExecutionProvider")
        assert row.onnx_bytes == Path(row.path).stat().st_size
        assert row.cold_start_ms > 0
        assert 0 <= row.noise < float("inf")
        assert 0 < row.cores <= (os.cpu_count() or 1)
    assert [row.speedup is None for row in rows] == [row.path == str(paths[0]) for row in rows]
    for reference, row in ((rows[0], rows[1]), (rows[3], rows[4])):
        assert row.speedup.ratio == pytest.approx(reference.latency_ms.p50 / row.latency_ms.p50)
        assert row.speedup.low <= row.speedup.ratio <= row.speedup.high
    assert len(bench([wide_cnn.path, wide_cnn.path], where=Where(("cpu",)), runs=1)) == 1


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (["n", 3, "h", "w"], {}, "takes images of any size .*--input-size 224"),
        ([4, 3, 8, 8], {}, "has a fixed batch of 4; given batch size 1"),
        (["n", 3, "w"], {}, "expected images"),
        (["n", 3, 8, 8], {"batch_sizes": (1, 0)}, "batch size is 0; expected 1 or more"),
    ],
)
def test_bench_refuses(shape: list[int | str], options: dict[str, object], message: str, tmp_path: Path) -> None:
    path = _classifier(tmp_path / "model.onnx", shape)
    with pytest.raises(InputError, match=message) as caught:
        bench([path], where=Where(("cpu",)), **options)
    assert "\n" not in str(caught.value)


def test_bench_fills_only_what_is_open(tmp_path: Path) -> None:
    path = _classifier(tmp_path / "model.onnx", ["n", 1, "h", 8])
    (row,) = bench([path], where=Where(("cpu",)), input_size=(3, 16, 16), runs=3)
    assert row.input_shape == (1, 1, 16, 8)


def test_bench_takes_a_fixed_batch_of_the_same_size(tmp_path: Path) -> None:
    (row,) = bench([_classifier(tmp_path / "model.onnx", [4, 3, 8, 8])], (4,), where=Where(("cpu",)), runs=3)
    assert row.input_shape == (4, 3, 8, 8)


def test_several_providers_are_timed_side_by_side(slim_cnn: Exported) -> None:
    rows = bench([slim_cnn.path], where=Where(("cpu", "auto"), 1), runs=5)
    assert [row.placement.asked for row in rows] == ["cpu", "auto"]
    assert rows[1].speedup is not None


@without_gpu
def test_providers_that_cannot_be_used_are_named(slim_cnn: Exported) -> None:
    assert usable(["cpu", "auto", "cpu"]) == (("cpu", "auto"), ())
    working, left_out = usable(["cuda", "cpu"])
    assert working == ("cpu",)
    assert len(left_out) == 1
    assert left_out[0].startswith("provider cuda is left out: ")
    for names, strict in ((["cuda"], False), (["cpu", "cuda"], True)):
        with pytest.raises(InputError, match="provider 'cuda' cannot be used"):
            usable(names, strict=strict)
    with pytest.raises(InputError, match="unknown provider 'gpu'"):
        usable(["cpu", "gpu"])
    with pytest.raises(ResultError, match="does not run on auto alone"):
        bench([slim_cnn.path], where=Where(strict=True))


@without_gpu
def test_the_command_leaves_out_what_does_not_work_and_is_strict_when_asked(px: Px, slim_cnn: Exported) -> None:
    outcome = px("bench", slim_cnn.path, "--provider", "cpu,cuda", "--threads", 1, "--json")
    assert outcome.code == 0
    assert [row["placement"]["got"] for row in json.loads(outcome.out)] == ["CPUExecutionProvider"]
    assert outcome.err.startswith("pxcompress: provider cuda is left out: ")
    assert "does not run on auto alone" in one_line(px("bench", slim_cnn.path, "--strict-provider"), code=3)
    assert "unknown provider 'gpu'" in one_line(px("bench", slim_cnn.path, "--provider", "cpu,gpu"))


def test_a_run_folder_stands_for_its_files(px: Px, slim_cnn: Exported, wide_cnn: Exported, tmp_path: Path) -> None:
    for name, made in (("model.int8", slim_cnn), ("model", slim_cnn), ("dense", wide_cnn)):
        (tmp_path / f"{name}.onnx").write_bytes(made.path.read_bytes())
    rows = json.loads(px("bench", tmp_path, *_FAST, "--json").out)
    assert [Path(row["path"]).name for row in rows] == ["dense.onnx", "model.onnx", "model.int8.onnx"]
    assert "model.onnx" in one_line(px("bench", tmp_path.parent, *_FAST))


@pytest.fixture
def foreign(wide_cnn: Exported, tmp_path: Path) -> Path:
    """A float32 file of another tool: no metadata, another name for its input, and its batch fixed."""
    model = onnx.load(wide_cnn.path)
    del model.metadata_props[:]
    (port,) = model.graph.input
    for node in model.graph.node:
        node.input[:] = ["pixels" if name == port.name else name for name in node.input]
    port.name = "pixels"
    port.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "foreign.onnx")
    return tmp_path / "foreign.onnx"


def test_precisions_are_made_on_the_fly_and_timed_beside_each_other(
    px: Px, foreign: Path, wide_cnn: Exported, tmp_path: Path
) -> None:
    data = image_folder(tmp_path / "data", {"train": 4, "val": 2}, 5, 16)
    before = sorted(tmp_path.iterdir())
    outcome = px("bench", foreign, wide_cnn.path, "--precision", "fp32,fp16,int8", "--data", data, *_FAST, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    rows = json.loads(outcome.out)
    asked = ["fp32", "fp16", "int8"]
    assert [(row["path"], row["precision"]) for row in rows] == [
        (str(path), name) for path in (foreign, wide_cnn.path) for name in asked
    ]
    assert rows[2]["onnx_bytes"] < rows[1]["onnx_bytes"] < rows[0]["onnx_bytes"]
    assert sorted(tmp_path.iterdir()) == before
    (row,) = json.loads(px("bench", foreign, "--precision", "fp16", *_FAST, "--json").out)
    assert row["precision"] == "fp16"  # its ranges are those of random numbers


_FAST = ("--provider", "cpu", "--threads", 1, "--batch-size", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int8"], "precision int8 is calibrated on images; give some with --data"),
        (["--precision", "fp15"], "unknown precision 'fp15'; did you mean fp16?"),
        (["--data", "digits"], "--data has no effect without --precision"),
        (["--precision", "int8", "--data", "nowhere"], "nowhere"),
    ],
)
def test_precisions_that_cannot_be_timed(px: Px, slim_cnn: Exported, options: list[str], message: str) -> None:
    assert message in one_line(px("bench", slim_cnn.path, "--provider", "cpu", *options))


def test_a_file_of_another_precision_is_not_converted(px: Px, slim_cnn: Exported, tmp_path: Path) -> None:
    model = onnx.load(slim_cnn.path)
    onnx.helper.set_model_props(model, {"precision": "int8"})
    onnx.save(model, tmp_path / "small.onnx")
    assert "is int8 already" in one_line(
        px("bench", tmp_path / "small.onnx", "--precision", "fp16", "--provider", "cpu")
    )
