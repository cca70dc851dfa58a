"""Sessions of ONNX Runtime: what they take, where they run, what they refuse."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from exports import Exported
from onnx import TensorProto, helper

from pxcompress.deploy import quiet, runtime
from pxcompress.deploy.backends import BACKENDS
from pxcompress.deploy.backends import onnxruntime as backend
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.session import Port, Session, whole_batches
from pxcompress.errors import InputError, ResultError
from pxcompress.types import OpenAxes

GPU = not runtime.explain_failure("cuda")
without_gpu = pytest.mark.skipif(GPU, reason="says what happens without a GPU")


def _save(path: Path, inputs: dict[str, int], kind: int = TensorProto.FLOAT, operator: str = "Add") -> Path:
    """A file that adds up its first and its last input, or does something else with them."""
    ports = [helper.make_tensor_value_info(name, kind, ["n", size]) for name, size in inputs.items()]
    names = list(inputs)
    node = helper.make_node(operator, [names[0], names[-1]], ["y"])
    graph = helper.make_graph([node], "g", ports, [helper.make_tensor_value_info("y", kind, ["n", None])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_predict_takes_arrays_and_tensors_of_any_batch(wide_cnn: Exported) -> None:
    session = runtime.open_session(wide_cnn.path, "cpu")
    for count in (1, 2, 5):
        inputs = torch.randn(count, 3, 16, 16)
        expected = wide_cnn.model(inputs).detach().numpy()
        np.testing.assert_allclose(session.predict(inputs), expected, atol=1e-5)
        np.testing.assert_array_equal(session.predict(inputs.numpy().astype(np.float64)), session.predict(inputs))


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 16, 16), (2, 1, 16, 16)])
def test_predict_refuses_other_shapes(wide_cnn: Exported, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expects inputs of shape \(any, 3, 16, 16\); given"):
        runtime.open_session(wide_cnn.path, "cpu").predict(np.zeros(shape, np.float32))


def test_an_input_that_the_graph_cannot_take(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kind = TensorProto.FLOAT
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    ports = [[helper.make_tensor_value_info(name, kind, shape)] for name, shape in (("x", ["n", "h"]), ("y", None))]
    graph = helper.make_graph(nodes, "g", *ports, [helper.make_tensor("w", kind, [2, 1], [1.0, 1.0])])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    session = runtime.open_session(path, "cpu")
    assert session.predict(np.ones((1, 2), np.float32)) == 2
    with pytest.raises(InputError, match=r"does not run on inputs of shape \(1, 3\) on cpu: ") as caught:
        session.predict(np.ones((1, 3), np.float32))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_cpu_session_says_what_it_is(wide_cnn: Exported) -> None:
    session = runtime.open_session(str(wide_cnn.path), "cpu", threads=2, strict=True)
    nodes = len(onnx.load(wide_cnn.path).graph.node)
    placement = session.placement
    assert (placement.asked, placement.got, placement.fallback_reason) == ("cpu", "CPUExecutionProvider", "")
    assert placement.nodes_on_provider == placement.nodes_total == nodes
    assert session.providers == ("CPUExecutionProvider",)
    assert (session.device, session.precision, session.threads) == ("cpu", "fp32", 2)
    assert session.input == Port("input", (None, 3, 16, 16), np.dtype(np.float32))
    assert [(port.name, port.shape) for port in session.outputs] == [("logits", (None, 5))]


@pytest.mark.parametrize("name", ["wide_cnn", "small_vit"])
def test_placement_is_what_the_profiler_sees(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """With the optimisations that come before nodes are given to providers, without those that fuse them after."""
    exported: Exported = request.getfixturevalue(name)
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    model = ort.InferenceSession(exported.path, options, providers=["CPUExecutionProvider"])
    model.run(None, {"input": exported.example.numpy()})
    events = json.loads(Path(model.end_profiling()).read_text())
    ran = [each["args"]["provider"] for each in events if each.get("name", "").endswith("_kernel_time")]
    placement = runtime.open_session(exported.path, "cpu").placement
    assert Counter(ran) == {placement.got: placement.nodes_on_provider}


def test_default_threads_are_those_of_pytorch(wide_cnn: Exported) -> None:
    assert runtime.open_session(wide_cnn.path, "cpu").threads == torch.get_num_threads()
    with pytest.raises(InputError, match="threads is -1"):
        runtime.open_session(wide_cnn.path, "cpu", threads=-1)


@without_gpu
def test_auto_falls_back_quietly_and_says_why(wide_cnn: Exported, capfd: pytest.CaptureFixture[str]) -> None:
    runtime.explain_failure.cache_clear()
    placement = runtime.open_session(wide_cnn.path, "auto").placement
    assert (placement.asked, placement.got) == ("auto", "CPUExecutionProvider")
    assert placement.fallback_reason.startswith("CUDA cannot be used: ")
    assert "\n" not in placement.fallback_reason
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ResultError, match="does not run on auto alone"):
        runtime.open_session(wide_cnn.path, "auto", strict=True)


@without_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda-graph", "tensorrt"])
def test_an_asked_gpu_that_is_not_there(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=f"provider '{name}' cannot be used: .+; use auto or cpu") as caught:
        runtime.check_provider(name)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be used"):  # before anything else is looked at
        runtime.open_session(tmp_path / "missing.onnx", name)
    assert capfd.readouterr() == ("", "")


@without_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda-graph", "tensorrt"])
def test_a_gpu_session_is_never_a_cpu_session_in_disguise(
    name: str, wide_cnn: Exported, capfd: pytest.CaptureFixture[str]
) -> None:
    model, failure = backend._create(wide_cnn.path, name, threads=1)
    assert model is None
    assert failure
    assert "\n" not in failure
    assert "\x1b" not in failure
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
def test_a_recorded_graph_computes_the_same_at_every_batch_size(wide_cnn: Exported) -> None:
    graph, cpu = runtime.open_session(wide_cnn.path, "cuda-graph"), runtime.open_session(wide_cnn.path, "cpu")
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((size, 3, 16, 16), dtype=np.float32) for size in (4, 1, 4)]
    runs = [graph.bind(batch) for batch in batches]
    for _ in range(3):  # as it is, while it is recorded, and replayed
        for batch, run in zip(batches, runs, strict=True):
            run()
            np.testing.assert_allclose(run.targets[0].numpy(), cpu.predict(batch), atol=1e-2)
    np.testing.assert_allclose(graph.predict(batches[1]), cpu.predict(batches[1]), atol=1e-2)


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
def test_cuda_runs_and_agrees_with_the_cpu(wide_cnn: Exported) -> None:
    cuda, cpu = runtime.open_session(wide_cnn.path, "cuda"), runtime.open_session(wide_cnn.path, "cpu")
    assert cuda.placement.got == "CUDAExecutionProvider"
    assert 0 < cuda.placement.nodes_on_provider <= cuda.placement.nodes_total
    inputs = np.random.default_rng(0).standard_normal((4, 3, 16, 16), dtype=np.float32)
    np.testing.assert_allclose(cuda.predict(inputs), cpu.predict(inputs), atol=1e-2)  # TF32
    run = cuda.bind(inputs)
    run()
    np.testing.assert_allclose(run.targets[0].numpy(), cuda.predict(inputs), atol=1e-2)


def test_unknown_provider() -> None:
    with pytest.raises(InputError, match="unknown provider 'gpu'; expected one of: auto, cpu, cuda, cuda-graph, "):
        runtime.check_provider("gpu")
    runtime.check_provider("auto")
    runtime.check_provider("cpu")


def test_files_that_are_no_models(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.onnx").write_text("not a model\n" * 30)
    (tmp_path / "empty.onnx").touch()
    for name, message in {
        "missing.onnx": "no ONNX file at",
        ".": "no ONNX file at",
        "text.onnx": "cannot be loaded by ONNX Runtime",
        "empty.onnx": "cannot be loaded by ONNX Runtime",
    }.items():
        for provider in ("cpu", "auto"):
            with pytest.raises(InputError, match=message) as caught:
                runtime.open_session(tmp_path / name, provider)
            assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_only_one_input_of_numbers(tmp_path: Path) -> None:
    two = runtime.open_session(_save(tmp_path / "two.onnx", {"a": 2, "b": 2}), "cpu")
    with pytest.raises(InputError, match=r"has 2 inputs \(a, b\); expected one"):
        two.predict(np.ones((1, 2), np.float32))
    with pytest.raises(InputError, match=r"'a' is a tensor\(string\); expected one of: tensor\(float\)"):
        runtime.open_session(_save(tmp_path / "odd.onnx", {"a": 2}, TensorProto.STRING, "StringConcat"), "cpu")


def test_several_inputs_are_given_by_name(tmp_path: Path) -> None:
    two = runtime.open_session(_save(tmp_path / "two.onnx", {"a": 2, "b": 2}), "cpu")
    feed = {"a": np.ones((3, 2)), "b": np.full((3, 2), 4)}
    np.testing.assert_array_equal(two.predict(feed), np.full((3, 2), 5, np.float32), strict=True)
    run = two.bind(feed)
    run()
    np.testing.assert_array_equal(run.targets[0].numpy(), np.full((3, 2), 5, np.float32))


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64])
def test_inputs_of_other_numbers_are_converted(tmp_path: Path, kind: int) -> None:
    session = runtime.open_session(_save(tmp_path / "odd.onnx", {"a": 2}, kind), "cpu")
    outputs = session.predict(np.ones((1, 2), np.float32))
    np.testing.assert_array_equal(outputs, np.full((1, 2), 2, session.input.dtype), strict=True)


@pytest.fixture(scope="module")
def fixed(wide_cnn: Exported, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The same network, for four images at a time."""
    path = tmp_path_factory.mktemp("fixed") / "model.onnx"
    export_onnx(wide_cnn.model, wide_cnn.example, path, {}, axes=OpenAxes(4))
    return runtime.open_session(path, "cpu")


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_a_fixed_batch_is_filled_up(fixed: Session, wide_cnn: Exported, count: int) -> None:
    inputs = torch.randn(count, 3, 16, 16)
    assert fixed.input.shape == (4, 3, 16, 16)
    np.testing.assert_allclose(fixed.predict(inputs), wide_cnn.model(inputs).detach().numpy(), atol=1e-5)


def test_a_fixed_batch_is_timed_as_it_is(fixed: Session) -> None:
    fixed.bind(np.zeros((4, 3, 16, 16), np.float32))()
    with pytest.raises(InputError, match="has a fixed batch of 4; given 2 samples"):
        fixed.bind(np.zeros((2, 3, 16, 16), np.float32))


@pytest.mark.parametrize("rows", range(1, 9))
def test_whole_batches_hold_all_rows_in_order(rows: int) -> None:
    array = np.arange(3 * rows).reshape(rows, 3)
    parts = whole_batches(array, 4)
    assert {part.shape for part in parts} == {(4, 3)}
    joined = np.concatenate(parts)
    np.testing.assert_array_equal(joined[:rows], array)
    assert all((row == array[-1]).all() for row in joined[rows:])


def test_what_cuda_is_asked_for(wide_cnn: Exported, tmp_path: Path) -> None:
    """As the documentation of ONNX Runtime's CUDA execution provider has it; options are texts."""
    options = {
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "enable_cuda_graph": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0" if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0" else "1",
    }
    types = {"trt_fp16_enable": "0", "trt_int8_enable": "0", "trt_engine_cache_enable": "0"}
    cpu, cuda = "CPUExecutionProvider", ("CUDAExecutionProvider", options)
    assert backend._STACKS["cuda"] == [cuda, cpu]
    assert backend._STACKS["cuda-graph"] == [(cuda[0], {**options, "enable_cuda_graph": "1"}), cpu]
    assert backend._STACKS["tensorrt"] == [("TensorrtExecutionProvider", types), cuda, cpu]
    assert backend._list_providers(wide_cnn.path, "tensorrt") == backend._STACKS["tensorrt"]
    model = onnx.load(wide_cnn.path)
    helper.set_model_props(model, {"precision": "fp16"})
    onnx.save(model, tmp_path / "fp16.onnx")
    (_, allowed), *_ = backend._list_providers(tmp_path / "fp16.onnx", "tensorrt")
    assert allowed == {**types, "trt_fp16_enable": "1"}
    own = {name for name in BACKENDS if BACKENDS.get(name) is backend.OnnxRuntime}
    assert {*backend._STACKS, "plugin"} == own


def test_every_bound_call_records_a_graph_of_its_own(wide_cnn: Exported) -> None:
    session = runtime.open_session(wide_cnn.path, "cpu")
    runs = [session.bind(np.zeros((size, 3, 16, 16), np.float32)) for size in (1, 1, 2)]
    numbers = [int(run.options.get_run_config_entry("gpu_graph_id")) for run in runs]
    assert len(set(numbers)) == 3
    assert min(numbers) > 0  # 0 is ONNX Runtime's own, -1 neither records nor replays
    assert backend._run_options(backend._NO_GRAPH).get_run_config_entry("gpu_graph_id") == "-1"


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        ((), "fp32"),
        ((TensorProto.FLOAT,), "fp32"),
        ((TensorProto.FLOAT16, TensorProto.FLOAT), "fp16"),
        ((TensorProto.FLOAT, TensorProto.INT64), "fp32"),
        ((TensorProto.INT8, TensorProto.FLOAT), "int8"),
        ((TensorProto.BFLOAT16,), "bf16"),
    ],
)
def test_the_precision_of_a_foreign_file_is_that_of_most_weights(
    tmp_path: Path, kinds: tuple[int, ...], name: str
) -> None:
    path = _save(tmp_path / "model.onnx", {"a": 2})
    model = onnx.load(path)
    for place, kind in enumerate(kinds):  # the first is the largest
        model.graph.initializer.append(helper.make_tensor(f"w{place}", kind, [9 - place], [1] * (9 - place)))
    onnx.save(model, path)
    assert runtime.open_session(path, "cpu").precision == name


def test_the_probe_is_a_model_that_runs() -> None:
    model, failure = backend._create(backend._make_convolution(), "cpu", threads=1)
    assert failure == ""
    assert model.run(None, {"x": np.ones((1, 1, 2, 2), np.float32)})[0] == 4


def test_placement_counts_nodes_that_run_elsewhere() -> None:
    def part(provider: str, *operators: str) -> SimpleNamespace:
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type=op) for op in operators])

    model = SimpleNamespace(
        get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        get_provider_graph_assignment_info=lambda: [
            part("CUDAExecutionProvider", "Conv", "Relu", "Gemm"),
            part("CPUExecutionProvider", "Shape"),
            part("CPUExecutionProvider", "Shape", "Gather"),
        ],
        get_provider_options=lambda: {"CUDAExecutionProvider": {"use_tf32": "1"}},
    )
    placement = backend._describe_placement(model, "cuda")
    assert (placement.got, placement.nodes_on_provider, placement.nodes_total) == ("CUDAExecutionProvider", 3, 6)
    assert placement.elsewhere == {"CPUExecutionProvider": 3}
    assert placement.fallback_reason == (
        "3 of 6 nodes run elsewhere: 2 Shape on CPUExecutionProvider, 1 Gather on CPUExecutionProvider"
    )


def test_runner_computes_what_predict_does_whatever_memory_is_reused(wide_cnn: Exported) -> None:
    session = runtime.open_session(wide_cnn.path, "cpu")
    inputs = np.random.default_rng(0).standard_normal((3, 3, 16, 16), dtype=np.float32)
    expected = session.predict(inputs)
    run = session.bind(inputs.astype(np.float64))  # converted: nobody but the runner holds the bound array
    _ = [np.full(inputs.shape, 9, np.float32) for _ in range(100)]
    run()
    np.testing.assert_array_equal(run.targets[0].numpy(), expected)


def test_captured_is_silent_and_gives_back_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet.capture_output() as noise:
        os.write(2, b"from C++")
        sys.stdout.write("from Python")
    assert noise() == "from C++"
    os.write(2, b"after")
    assert capfd.readouterr() == ("", "after")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("\x1b[1;31m [E:...] Failed to load library x.so with error: y.so: no such file\n\x1b[m", "y.so: no such file"),
        ("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load failed:parsing.\nmore", "Load failed:parsing."),
        ("", ""),
    ],
)
def test_one_line(message: str, line: str) -> None:
    assert quiet.shorten_message(message) == line
