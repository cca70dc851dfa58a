"""Timing ONNX files side by side."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from command import Px, image_folder, one_line
from exports import Exported
from onnx import TensorProto, helper

from pxcompress.deploy import hardware, runtime
from pxcompress.deploy.bench import BenchConditions, bench, choose_providers
from pxcompress.deploy.feeds import Sizes
from pxcompress.errors import InputError, ResultError
from pxcompress.proof import Placement
from pxcompress.report.table import format_bench

without_gpu = pytest.mark.skipif(not runtime.explain_failure("cuda"), reason="says what happens without a GPU")


def _classifier(path: Path, shape: list[int | str], kind: int = TensorProto.FLOAT, last: bool = False) -> Path:
    """Global pooling of inputs of `shape`, channels first or `last`; logits in float32, and the class beside them."""
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2] if last else list(range(len(shape)))),
        helper.make_node("GlobalAveragePool", ["t"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
        helper.make_node("ArgMax", ["y"], ["class"], axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info(name, of, None)
        for name, of in (("y", TensorProto.FLOAT), ("class", TensorProto.INT64))
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, shape)], outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("shape", "kind", "last", "used"),
    [
        (["n", "h", "w", 3], TensorProto.FLOAT, True, (1, 16, 24, 3)),
        (["n", 8, 8, 3], TensorProto.UINT8, True, (1, 8, 8, 3)),
        (["n", 1, "h", "w"], TensorProto.FLOAT16, False, (1, 1, 16, 24)),
        (["n", 3, "h", 3], TensorProto.INT64, False, (1, 3, 16, 3)),
        (["n", "c", "h", "w"], TensorProto.DOUBLE, False, (1, 3, 16, 24)),
        ([5, 4, 20], TensorProto.FLOAT, False, (5, 4, 20)),
    ],
)
def test_any_classifier_is_timed(
    tmp_path: Path, shape: list[int | str], kind: int, last: bool, used: tuple[int, ...]
) -> None:
    path = _classifier(tmp_path / "model.onnx", shape, kind, last)
    (row,) = bench([path], conditions=BenchConditions(("cpu",), 1), sizes=Sizes((3, 16, 24)), runs=3)
    assert row.input_shape == used
    assert row.batch_size == used[0]
    assert row.device_bytes == 0


def test_weights_beside_a_file_count_and_are_needed(px: Px, wide_cnn: Exported, tmp_path: Path) -> None:
    model = onnx.load(wide_cnn.path)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=64)
    (row,) = json.loads(px("bench", tmp_path / "m.onnx", "--provider", "cpu", "--json").out)
    assert row["onnx_bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())
    whole = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(whole[: len(whole) // 2])
    assert "m.onnx" in one_line(px("bench", tmp_path / "m.onnx", "--provider", "cpu"))
    (tmp_path / "m.data").unlink()
    assert "m.onnx" in one_line(px("bench", tmp_path / "m.onnx", "--provider", "cpu"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_broken_file_is_one_line(px: Px, wide_cnn: Exported, tmp_path: Path, share: float) -> None:
    content = wide_cnn.path.read_bytes()
    (tmp_path / "m.onnx").write_bytes(content[: int(share * len(content))])
    assert "m.onnx" in one_line(px("bench", tmp_path / "m.onnx", wide_cnn.path, "--provider", "cpu"))


def test_the_table_says_what_a_gpu_ran(slim_cnn: Exported) -> None:
    (row,) = bench([slim_cnn.path], conditions=BenchConditions(("cpu",), 1), runs=6)
    assert "GPU" not in format_bench([row])
    lost = "1 of 9 nodes run elsewhere: 1 TopK on CPUExecutionProvider"
    placement = Placement("cuda-graph", "CUDAExecutionProvider", 8, 9, lost, {"CPUExecutionProvider": 1}, device="cuda")
    text = format_bench([replace(row, placement=placement, device_bytes=3_210_000, precision="tf32")])
    assert "tf32, 8 of 9 on CUDA graph, 1 on CPU, 3.21 MB of GPU memory" in text
    assert "GPU: time on the device, without copies" in text
    assert text.endswith(f"note: {lost}")


def test_the_affinity_of_this_process_is_said() -> None:
    allowed, cores = os.sched_getaffinity(0), os.cpu_count() or 1
    first = min(allowed)
    os.sched_setaffinity(0, {first})
    try:
        sentence = hardware.describe_affinity()
    finally:
        os.sched_setaffinity(0, allowed)
    assert sentence == (f"bound to 1 of {cores} cores ({first})" if cores > 1 else "not pinned, of 1 cores")
    assert f"of {cores} cores" in hardware.describe_affinity()


@without_gpu
def test_without_a_gpu_none_of_its_memory_is_taken() -> None:
    assert hardware.measure_memory() == 0


@pytest.mark.skipif(runtime.explain_failure("cuda") != "", reason="needs an NVIDIA GPU")
def test_peak_memory_on_the_gpu_holds_the_weights_and_grows_with_the_batch(wide_cnn: Exported) -> None:
    rows = bench([wide_cnn.path], (1, 4096), conditions=BenchConditions(("cuda", "cuda-graph")), runs=5)
    for small, large in zip(rows[:2], rows[2:], strict=True):
        assert 4096 * 48 * 16 * 16 * 4 < large.device_bytes - small.device_bytes < 1 << 34


def test_bench_times_every_file_at_every_batch_size(wide_cnn: Exported, slim_cnn: Exported, tmp_path: Path) -> None:
    other = _classifier(tmp_path / "open.onnx", ["n", 3, "h", "w"])
    paths = [wide_cnn.path, str(slim_cnn.path), other]
    rows = bench(paths, (1, 4), conditions=BenchConditions(("cpu",), 1), sizes=Sizes((3, 16, 16)), runs=20)
    assert [(row.path, row.batch_size) for row in rows] == [(str(path), size) for size in (1, 4) for path in paths]
    for row in rows:
        assert row.input_shape == (row.batch_size, 3, 16, 16)
        assert row.latency_ms.runs == 20
        assert row.throughput == pytest.approx(row.batch_size * 1e3 / row.latency_ms.mean)
        assert (row.precision, row.threads, row.placement.got) == ("fp32", 1, "CPUExecutionProvider")
        assert row.onnx_bytes == Path(row.path).stat().st_size
        assert row.cold_start_ms > 0
        assert 0 <= row.noise < float("inf")
        assert row.affinity == hardware.describe_affinity()
    assert [row.speedup is None for row in rows] == [row.path == str(paths[0]) for row in rows]
    for reference, row in ((rows[0], rows[1]), (rows[3], rows[4])):
        assert row.speedup.ratio == pytest.approx(reference.latency_ms.p50 / row.latency_ms.p50)
        assert row.speedup.low <= row.speedup.ratio <= row.speedup.high
    assert len(bench([wide_cnn.path, wide_cnn.path], conditions=BenchConditions(("cpu",)), runs=1)) == 1


def _several(path: Path) -> Path:
    """Whole numbers, a mask, an image and a scalar in; the log of an image out, which is NaN for half of its values."""
    kinds = {
        "ids": (TensorProto.INT64, ["n", "length"]),
        "mask": (TensorProto.BOOL, ["n", "length"]),
        "image": (TensorProto.FLOAT, ["n", 3, "h", "w"]),
        "scale": (TensorProto.FLOAT, []),
    }
    inputs = [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()]
    table = helper.make_tensor("table", TensorProto.FLOAT, [2, 3], [0.0] * 6)  # ids are 0 and 1
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["looked_up"]),
        helper.make_node("ReduceSum", ["looked_up"], ["total"]),
        helper.make_node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMin", ["m"], ["least"]),
        helper.make_node("Div", ["total", "least"], ["whole"]),  # NaN where anything is masked
        helper.make_node("Mul", ["image", "scale"], ["scaled"]),
        helper.make_node("Abs", ["scaled"], ["size"]),
        helper.make_node("Add", ["size", "whole"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [table])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_several_inputs_get_random_numbers_of_the_right_kind(px: Px, tmp_path: Path) -> None:
    path = _several(tmp_path / "several.onnx")
    options = ("--batch-size", 2, "--provider", "cpu", "--threads", 1, "--input-size", 8)
    outcome = px("bench", path, *options, "--shapes", "ids:5,mask:6", "--json")
    (row,) = json.loads(outcome.out)
    assert row["inputs"] == {"ids": [2, 5], "mask": [2, 6], "image": [2, 3, 8, 8], "scale": []}
    assert row["finite"]
    refused = {
        (): "takes 'ids' of any size (any, any); say which: --shapes ids:128,mask:128",
        ("--shapes", "ids:5"): "takes 'mask' of any size",
        ("--shapes", "ids:5,mask:6,foo:7"): "shapes names 'foo', an input that no file has; expected: ids, image,",
        ("--shapes", "ids:5x5,mask:6"): "shapes gives 'ids' samples of 5x5; ",
        ("--shapes", "ids"): "shapes has 'ids'; expected each input once, as NAME:SIZES",
        ("--shapes", "ids:5,ids:6"): "shapes has 'ids:6'",
        ("--shapes", "ids:0"): "shapes has 'ids:0'",
    }
    for extra, message in refused.items():
        assert message in one_line(px("bench", path, *options, *extra))


def test_a_file_that_returns_nan_is_named(px: Px, tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([helper.make_node("Log", ["x"], ["y"])], "g", inputs, outputs)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "bad.onnx"
    )
    fine = _classifier(tmp_path / "fine.onnx", ["n", 3, 8, 8])
    outcome = px("bench", fine, tmp_path / "bad.onnx", "--provider", "cpu", "--threads", 1)
    assert outcome.code == 0
    assert "note: bad.onnx RETURNS NaN OR INFINITY" in outcome.out
    assert "fine.onnx RETURNS" not in outcome.out


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (["n", 3, "h", "w"], {}, "takes images of any size .*--input-size 224"),
        ([4, 3, 8, 8], {"batch_sizes": (1,)}, "has a fixed batch of 4; given batch size 1"),
        (["n", 3, "w"], {}, "takes 'x' of any size .*--shapes x:3x128"),
        (["n", 3, 8, 8], {"batch_sizes": (1, 0)}, "batch size is 0; expected 1 or more"),
    ],
)
def test_bench_refuses(shape: list[int | str], options: dict[str, object], message: str, tmp_path: Path) -> None:
    path = _classifier(tmp_path / "model.onnx", shape)
    with pytest.raises(InputError, match=message) as caught:
        bench([path], conditions=BenchConditions(("cpu",)), **options)
    assert "\n" not in str(caught.value)


def test_bench_fills_only_what_is_open(tmp_path: Path) -> None:
    path = _classifier(tmp_path / "model.onnx", ["n", 1, "h", 8])
    (row,) = bench([path], conditions=BenchConditions(("cpu",)), sizes=Sizes((3, 16, 16)), runs=3)
    assert row.input_shape == (1, 1, 16, 8)


@pytest.mark.parametrize(
    ("shape", "size", "used"),
    [
        (["n", 3, "h", "w"], None, (1, 3, 12, 10)),
        (["n", 3, "h", "w"], (3, 16, 16), (1, 3, 16, 16)),
        (["n", 3, 8, "w"], None, (1, 3, 8, 10)),
    ],
)
def test_bench_takes_the_size_that_a_file_was_made_for(
    tmp_path: Path, shape: list[int | str], size: tuple[int, int, int] | None, used: tuple[int, ...]
) -> None:
    """As its metadata say, where nothing is asked for."""
    path = _classifier(tmp_path / "model.onnx", shape)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"input_size": "[3, 12, 10]"})
    onnx.save(model, path)
    (row,) = bench([path], conditions=BenchConditions(("cpu",)), sizes=Sizes(size), runs=3)
    assert row.input_shape == used


def test_bench_takes_a_fixed_batch_of_the_same_size(tmp_path: Path) -> None:
    path = _classifier(tmp_path / "model.onnx", [4, 3, 8, 8])
    for batch_sizes in ((4,), ()):
        (row,) = bench([path], batch_sizes, conditions=BenchConditions(("cpu",)), runs=3)
        assert row.input_shape == (4, 3, 8, 8)
    other = _classifier(tmp_path / "other.onnx", ["n", 3, 8, 8])
    assert [row.batch_size for row in bench([path, other], conditions=BenchConditions(("cpu",)), runs=3)] == [4, 4]
    with pytest.raises(InputError, match="has a fixed batch of 4; given batch size 1"):
        bench([other, path], conditions=BenchConditions(("cpu",)), runs=3)


def test_several_providers_are_timed_side_by_side(slim_cnn: Exported) -> None:
    rows = bench([slim_cnn.path], conditions=BenchConditions(("cpu", "auto"), 1), runs=5)
    assert [row.placement.asked for row in rows] == ["cpu", "auto"]
    assert rows[1].speedup is not None


@without_gpu
def test_providers_that_cannot_be_used_are_named(slim_cnn: Exported) -> None:
    assert choose_providers(["cpu", "auto", "cpu"]) == (("cpu", "auto"), ())
    working, left_out = choose_providers(["cuda", "cpu"])
    assert working == ("cpu",)
    assert len(left_out) == 1
    assert left_out[0].startswith("provider cuda is left out: ")
    for names, strict in ((["cuda"], False), (["cpu", "cuda"], True)):
        with pytest.raises(InputError, match="provider 'cuda' cannot be used"):
            choose_providers(names, strict=strict)
    with pytest.raises(InputError, match="unknown provider 'gpu'"):
        choose_providers(["cpu", "gpu"])
    with pytest.raises(ResultError, match="does not run on auto alone"):
        bench([slim_cnn.path], conditions=BenchConditions(strict=True))


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
    precisions = ["fp32", "fp16", "int8"]
    assert [(row["path"], row["precision"]) for row in rows] == [
        (str(path), name) for path in (foreign, wide_cnn.path) for name in precisions
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
