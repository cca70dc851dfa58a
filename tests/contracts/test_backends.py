"""What every backend promises, and that one file is enough to add another: here one that computes with NumPy."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from pxcompress.deploy import measure, runtime
from pxcompress.deploy.backends import BACKENDS, Backend, CannotOpen
from pxcompress.deploy.bench import BenchConditions, bench
from pxcompress.deploy.session import Array, Port, Session
from pxcompress.errors import InputError, OutOfMemoryError
from pxcompress.proof import Placement
from pxcompress.recipe import Bench
from pxcompress.report.table import format_bench
from pxcompress.tasks.classification import Classification

EXAMPLE = torch.arange(18, dtype=torch.float32).reshape(3, 6) / 9 - 1


def _save(path: Path, weights: Array) -> Path:
    """relu(x) @ weights, for any batch."""
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in zip(("input", "logits"), weights.shape, strict=True)
    ]
    nodes = [helper.make_node("Relu", ["input"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["logits"])]
    tensor = helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.ravel().tolist())
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"classes": "[]"})
    onnx.save(model, path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return _save(tmp_path / "model.onnx", np.arange(24, dtype=np.float32).reshape(6, 4) / 10)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, dict[type, Path]]:
    """A model, and what every backend exports of it."""
    model, files = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval(), {}
    for backend in {BACKENDS.get(name) for name in BACKENDS}:
        path = tmp_path_factory.mktemp("exported") / "model.onnx"
        backend().export(model, EXAMPLE, path, {"classes": "[1]"})
        files[backend] = path
    return model, files


@pytest.fixture(params=list(BACKENDS))
def provider(request: pytest.FixtureRequest) -> str:
    """Every provider that works on this machine."""
    if reason := runtime.explain_failure(request.param):
        pytest.skip(reason)
    return str(request.param)


@pytest.mark.parametrize("name", list(BACKENDS))
def test_a_backend_says_in_one_line_why_a_provider_does_not_work(
    name: str, capfd: pytest.CaptureFixture[str], file: Path
) -> None:
    backend = BACKENDS.get(name)()
    reason = backend.explain_failure(name)
    assert "\n" not in reason
    assert backend.title
    assert backend.version
    assert backend.get_device(name) in ("cpu", "cuda")
    if reason:
        with pytest.raises(InputError, match="cannot be used"):
            runtime.open_session(file, name)
    assert capfd.readouterr() == ("", "")


def test_what_is_exported_is_predicted_at_every_batch(
    provider: str, exported: tuple[nn.Module, dict[type, Path]]
) -> None:
    model, files = exported
    path = files[BACKENDS.get(provider)]
    session = runtime.open_session(path, provider)
    assert session.metadata == {"classes": "[1]"}
    tolerance = 1e-5 if session.device == "cpu" else 1e-2
    for samples in (1, 3):
        with torch.no_grad():
            expected = model(EXAMPLE[:samples]).numpy()
        np.testing.assert_allclose(session.predict(EXAMPLE[:samples]), expected, atol=tolerance)
    assert runtime.find_backend(provider).size(path) == path.stat().st_size


def test_a_session_says_what_it_is(provider: str, file: Path) -> None:
    session = runtime.open_session(file, provider, threads=1)
    placement = session.placement
    assert placement.asked == provider
    assert 0 < placement.nodes_on_provider <= placement.nodes_total
    assert session.device == runtime.find_backend(provider).get_device(provider)
    assert session.input == Port("input", (None, 6), np.dtype(np.float32))
    assert [(port.name, port.shape) for port in session.outputs] == [("logits", (None, 4))]
    assert (session.path, session.threads, session.metadata) == (file, 1, {"classes": "[]"})


def test_a_bound_call_is_repeated_and_timed(provider: str, file: Path) -> None:
    sessions = {"it": runtime.open_session(file, provider, threads=1)}
    seconds = runtime.time_runs(sessions, EXAMPLE.numpy(), batch_size=2, warmup=2, runs=6, max_seconds=0.1)["it"]
    assert len(seconds) == 6
    assert (seconds > 0).all()
    assert runtime.time_graph(file.read_bytes(), (2, 6), provider, 1) > 0


def test_other_inputs_are_refused(provider: str, file: Path) -> None:
    session = runtime.open_session(file, provider)
    for use in (session.predict, session.bind):
        with pytest.raises(InputError, match=r"expects inputs of shape \(any, 6\); given \(1, 7\)"):
            use(np.zeros((1, 7), np.float32))


def test_what_is_no_model_is_refused_in_one_line(
    provider: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(InputError, match=r"text\.onnx cannot be loaded by ") as caught:
        runtime.open_session(tmp_path / "text.onnx", provider)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@dataclass(frozen=True, eq=False)
class NumpySession(Session):
    """A session of ONNX's reference evaluator."""

    evaluator: Any

    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        return [np.asarray(value) for value in self.evaluator.run(None, dict(feed))]

    def bind_feed(self, feed: Mapping[str, Array]) -> Callable[[], None]:
        def call() -> None:
            self.run(feed)

        call()
        return call


@dataclass(frozen=True)
class NumpyRuntime(Backend):
    """Runs ONNX files with NumPy."""

    title: ClassVar[str] = "NumPy"
    version: ClassVar[str] = f"numpy-{np.__version__}"

    def get_device(self, provider: str) -> str:
        return "cpu"

    def explain_failure(self, provider: str) -> str:
        return ""

    def open(self, source: Path | bytes, provider: str, threads: int) -> NumpySession:
        try:
            content = source if isinstance(source, bytes) else source.read_bytes()
            evaluator = ReferenceEvaluator(onnx.load_from_string(content))
        except Exception as error:
            raise CannotOpen(str(error).splitlines()[0]) from error
        graph = evaluator.proto_.graph
        ports = [
            Port(
                value.name,
                tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim),
                np.dtype(np.float32),
            )
            for value in (*graph.input, *graph.output)
        ]
        return NumpySession(
            path=Path("model") if isinstance(source, bytes) else source,
            placement=Placement(provider, "NumPyCPU", len(graph.node), len(graph.node)),
            inputs=tuple(ports[:-1]),
            outputs=(ports[-1],),
            threads=threads,
            metadata={entry.key: entry.value for entry in evaluator.proto_.metadata_props},
            evaluator=evaluator,
        )


@dataclass(frozen=True, eq=False)
class SmallSession(NumpySession):
    """On a device that has room for two samples."""

    def run(self, feed: Mapping[str, Array]) -> list[Array]:
        if len(feed["input"]) > 2:
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 99")
        return super().run(feed)


def test_where_memory_does_not_suffice_batches_are_smaller_and_a_timed_one_is_refused(file: Path) -> None:
    session = NumpyRuntime().open(file, "cpu", 1)
    fields = {field.name: getattr(session, field.name) for field in dataclasses.fields(session)}
    small, inputs = SmallSession(**fields), np.random.default_rng(0).standard_normal((7, 6), dtype=np.float32)
    np.testing.assert_array_equal(small.predict(inputs), session.predict(inputs))
    with pytest.raises(
        OutOfMemoryError, match=r"\(7, 6\) do not fit into the memory of cpu; give a smaller --batch-size"
    ):
        small.bind(inputs)


@pytest.fixture
def numpy_provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(BACKENDS, "_classes", {name: BACKENDS.get(name) for name in BACKENDS})
    BACKENDS.register("numpy")(NumpyRuntime)
    yield "numpy"
    runtime.explain_failure.cache_clear()


def test_a_backend_from_elsewhere_keeps_the_same_promises(
    numpy_provider: str, file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    test_a_session_says_what_it_is(numpy_provider, file)
    test_a_bound_call_is_repeated_and_timed(numpy_provider, file)
    test_other_inputs_are_refused(numpy_provider, file)
    test_what_is_no_model_is_refused_in_one_line(numpy_provider, tmp_path, capfd)


def test_a_backend_from_elsewhere_is_timed_beside_the_others(numpy_provider: str, file: Path) -> None:
    rows = bench([file], (1, 2), conditions=BenchConditions(("cpu", numpy_provider), 1), runs=6)
    assert [(row.placement.got, row.batch_size) for row in rows] == [
        ("CPUExecutionProvider", 1),
        ("NumPyCPU", 1),
        ("CPUExecutionProvider", 2),
        ("NumPyCPU", 2),
    ]
    assert all(row.speedup is not None for row in rows[1::2])
    assert all(row.onnx_bytes == file.stat().st_size for row in rows)
    table = format_bench(rows)
    assert "model.onnx on cpu: fp32, 2 nodes on CPU" in table
    assert "model.onnx on numpy: fp32, 2 nodes on NumPyCPU" in table


def test_a_backend_from_elsewhere_measures_a_run(numpy_provider: str, file: Path, tmp_path: Path) -> None:
    assert Bench(provider=numpy_provider).provider == numpy_provider
    other = _save(tmp_path / "other.onnx", -np.ones((6, 4), np.float32))
    batches = [(EXAMPLE, torch.full((3,), 3))]
    files = measure.time_and_predict([file, other], batches, Classification(), provider=numpy_provider, threads=1)
    assert [each.session.placement.got for each in files] == ["NumPyCPU"] * 2
    assert all((each.seconds > 0).all() for each in files)


def test_a_provider_that_two_backends_claim_is_refused(numpy_provider: str) -> None:
    with pytest.raises(ValueError, match="'numpy' is registered twice"):
        BACKENDS.register("numpy")(NumpyRuntime)


def test_a_runtime_that_is_not_installed_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    runtime.explain_failure.cache_clear()
    with pytest.raises(InputError, match=r"provider 'openvino' cannot be used: .+ \(pip install openvino\)"):
        runtime.open_session(file, "openvino")
    runtime.explain_failure.cache_clear()
