"""What every converter promises, and that one file is enough to add another: here one that copies the ONNX file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, save
from torch import nn

from pxcompress.choices import CONVERSIONS
from pxcompress.deploy import runtime
from pxcompress.deploy.convert import InputKind, check_ecosystem, convert_model
from pxcompress.deploy.converters import CONVERTERS, Predict, Source, explain_missing
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.onnx_modules import read_onnx
from pxcompress.deploy.session import Array
from pxcompress.errors import InputError, ModelError, ParityError
from pxcompress.models.adapter import adapt_module, with_packed_inputs
from pxcompress.models.onnx_file import read_ports
from pxcompress.models.signature import bound_inputs

EXAMPLE = torch.zeros(2, 3, 8, 8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    model, path = nn.Sequential(*layers).eval(), tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(model, EXAMPLE, path, {})
    return model, path


@dataclass(frozen=True)
class Copying:
    """Its files are ONNX files."""

    title: ClassVar[str] = "Copies"
    package: ClassVar[str] = "copies"
    suffix: ClassVar[str] = ".copy"
    round_to: ClassVar[int] = 8
    reads_onnx: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-4

    def explain_failure(self) -> str:
        return ""

    def convert(self, source: Source, path: Path) -> None:
        os.write(2, b"chatter")
        shutil.copy(source.onnx, path)

    def open(self, path: Path) -> Predict | None:
        session = runtime.open_session(path, "cpu", threads=1)
        return lambda inputs: [values.numpy() for values in session.outputs_of(dict(inputs)).values()]


@dataclass(frozen=True)
class Refusing(Copying):
    def convert(self, source: Source, path: Path) -> None:
        path.write_text("half")
        raise NotImplementedError("operator aten::fold is not known\nand more")


@dataclass(frozen=True)
class Wrong(Copying):
    def open(self, path: Path) -> Predict | None:
        def predict(inputs: Mapping[str, Array]) -> list[Array]:
            return [outputs + 1 for outputs in Copying().open(path)(inputs)]

        return predict


@dataclass(frozen=True)
class Elsewhere(Copying):
    def open(self, path: Path) -> Predict | None:
        return None


@dataclass(frozen=True)
class Unreadable(Copying):
    def open(self, path: Path) -> Predict | None:
        raise ModelError("model.copy was built for another GPU; convert on the machine that it is for")


@pytest.fixture
def more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONVERTERS, "_classes", {name: CONVERTERS.get(name) for name in CONVERTERS})
    for kind in (Copying, Refusing, Wrong, Elsewhere, Unreadable):
        CONVERTERS.register(kind.__name__.lower())(kind)


def test_ecosystems_are_listed_without_loading_them() -> None:
    assert tuple(CONVERTERS) == CONVERSIONS


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_converter_says_what_it_is_and_what_to_install(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    converter = CONVERTERS.get(name)()
    assert converter.title
    assert converter.suffix.startswith(".")
    assert converter.round_to in (8, 16, 32)
    assert 0 < converter.tolerance < 0.1
    reason = converter.explain_failure()
    assert "\n" not in reason
    if "not installed" in reason:
        with pytest.raises(InputError, match=rf"no conversion to '{name}' here: .*pip install {converter.package}"):
            check_ecosystem(name)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSIONS)
def test_what_is_converted_computes_what_pytorch_computes(
    name: str, exported: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, onnx = exported
    converter = CONVERTERS.get(name)()
    if reason := converter.explain_failure():
        pytest.skip(reason)
    done = convert_model(model, onnx, EXAMPLE, name, tmp_path / f"m{converter.suffix}", output="logits")
    assert done.bytes > 0
    assert done.parity is None or (done.parity.passed and done.parity.agreement == 1)


def test_a_converter_from_elsewhere_is_held_against_pytorch(
    more: None, exported: tuple[nn.Module, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, onnx = exported
    done = convert_model(model, onnx, EXAMPLE, "copying", tmp_path / "m.copy", output="logits")
    assert done.path.read_bytes() == onnx.read_bytes()
    assert (done.bytes, done.inputs) == (onnx.stat().st_size, {"input": InputKind((2, 3, 8, 8), "float32")})
    assert done.parity is not None
    assert done.parity.passed
    assert done.parity.samples == 8
    assert convert_model(model, onnx, EXAMPLE, "elsewhere", tmp_path / "m.copy", output="logits").parity is None
    assert capfd.readouterr() == ("", "")


class Pair(nn.Module):
    """An image and a whole number, which is looked up; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table, self.head = nn.Conv2d(3, 8, 3), nn.Embedding(5, 8), nn.Linear(16, 4)

    def forward(self, image: torch.Tensor, kind: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = self.conv(image).relu().mean((2, 3))
        return {"score": self.head(torch.cat([pooled, self.table(kind)], 1)).softmax(1), "pooled": pooled}


PAIR = {"image": torch.randn(2, 3, 8, 8), "kind": torch.tensor([0, 4])}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, torch.Tensor]:
    """A module with two inputs as every stage takes it, its file, and a batch of it."""
    torch.manual_seed(0)
    adapted, path = adapt_module(Pair().eval(), PAIR, [PAIR]), tmp_path_factory.mktemp("pair") / "model.onnx"
    export_onnx(adapted.model, adapted.example, path, {})
    return adapted.model, path, adapted.example


@pytest.mark.parametrize("is_file", [False, True])
def test_several_inputs_stay_several(
    more: None, pair: tuple[nn.Module, Path, torch.Tensor], tmp_path: Path, is_file: bool
) -> None:
    """By name, whole numbers as such: of a module in Python, and of one that was read from its file."""
    model, onnx, example = pair
    if is_file:
        ports = bound_inputs(read_ports(str(onnx)).inputs, {name: [value] for name, value in PAIR.items()})
        model = with_packed_inputs(read_onnx(onnx, {"image": [3, 8, 8]}), ports, example.shape[1:])
    done = convert_model(model, onnx, example, "copying", tmp_path / "m.copy", output="logits")
    assert done.inputs == {"image": InputKind((2, 3, 8, 8), "float32"), "kind": InputKind((2,), "int64")}
    assert done.parity is not None
    assert done.parity.max_abs < 1e-5
    with pytest.raises(ParityError):
        convert_model(model, onnx, example, "wrong", tmp_path / "m.copy", output="logits")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSIONS)
def test_several_inputs_compute_what_pytorch_computes(
    name: str, pair: tuple[nn.Module, Path, torch.Tensor], tmp_path: Path
) -> None:
    model, onnx, example = pair
    converter = CONVERTERS.get(name)()
    if reason := converter.explain_failure():
        pytest.skip(reason)
    done = convert_model(model, onnx, example, name, tmp_path / f"m{converter.suffix}", output="logits")
    assert done.parity is None or (done.parity.passed and done.parity.agreement == 1)


def softmax_file(path: Path, is_last: bool) -> Path:
    """A file with one convolution and a softmax at its end, of images with their channels first or last."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 3, 3, 3)), "head": rng.normal(size=(4, 5))}
    turn = [helper.make_node("Transpose", ["x"], ["first"], perm=[0, 3, 1, 2])] if is_last else []
    nodes = [
        *turn,
        helper.make_node("Conv", ["first" if is_last else "x", "w"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    shape = ["n", 8, 8, 3] if is_last else ["n", 3, 8, 8]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, tensors)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.mark.parametrize("is_last", [False, True])
def test_a_file_is_converted_with_all_that_it_computes(more: None, tmp_path: Path, is_last: bool) -> None:
    """Modules leave out a softmax at the end, and take channels first; what reads the file must agree with it."""
    path = softmax_file(tmp_path / "net.onnx", is_last)
    model = read_onnx(path)
    done = convert_model(model, path, torch.zeros(2, 3, 8, 8), "copying", tmp_path / "m.copy", output="logits")
    assert done.inputs == {"x": InputKind((2, 8, 8, 3) if is_last else (2, 3, 8, 8), "float32")}
    assert done.parity is not None
    assert done.parity.max_abs < 1e-5


@pytest.mark.parametrize(
    ("ecosystem", "error", "words"),
    [
        ("refusing", ModelError, r"Copies's converter \(copies\) does not take this model: .*aten::fold is not known"),
        ("wrong", ParityError, "differs from PyTorch by up to 1.00e.00"),
        ("unreadable", ModelError, "built for another GPU"),
    ],
)
def test_what_fails_is_one_line_and_leaves_nothing(
    more: None, exported: tuple[nn.Module, Path], tmp_path: Path, ecosystem: str, error: type[Exception], words: str
) -> None:
    model, onnx = exported
    with pytest.raises(error, match=words) as caught:
        convert_model(model, onnx, EXAMPLE, ecosystem, tmp_path / "m.copy", output="logits")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named_once() -> None:
    message = "the package none-such is not installed (pip install none-such)"
    assert explain_missing("none_such.inner", "none-such") == explain_missing("none_such", "none-such") == message
    assert explain_missing("json", "json") == ""


def test_an_unknown_ecosystem_is_refused() -> None:
    with pytest.raises(InputError, match="unknown ecosystem 'executorh'; did you mean executorch"):
        check_ecosystem("executorh")
