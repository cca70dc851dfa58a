"""fp16 and int8 files: what is in them, what they compute, and what is said when they are not worth shipping."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exports import METADATA, Exported
from onnx import TensorProto, numpy_helper
from torch import nn

from pxcompress.deploy import runtime
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.measure import FileTiming, time_and_predict
from pxcompress.deploy.precision import FP16_LIMIT, PRECISIONS, convert, measure_ranges
from pxcompress.deploy.predictions import Predictions
from pxcompress.errors import InputError, ModelError
from pxcompress.proof import Speedup
from pxcompress.recipe import Recipe
from pxcompress.report.targets import describe_speed, list_targets
from pxcompress.run_folder import targets
from pxcompress.run_folder.targets import make_targets, rate_targets
from pxcompress.state import seeded
from pxcompress.tasks.classification import Classification
from pxcompress.types import Batch, Batches


def images(count: int = 64) -> list[Batch]:
    with seeded(1):
        return [(torch.randn(16, 3, 16, 16), torch.randint(5, (16,))) for _ in range(count // 16)]


@pytest.fixture(scope="module")
def files(wide_cnn: Exported, small_vit: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Source and both precisions of a CNN and of a ViT, by "cnn", "cnn fp16", ..."""
    paths = {}
    for name, source in (("cnn", wide_cnn.path), ("vit", small_vit.path)):
        folder = tmp_path_factory.mktemp(name)
        paths[name] = source
        for precision in PRECISIONS:
            paths[f"{name} {precision}"] = convert(source, folder / "model.onnx", precision, images()).path
            paths[f"{name} {precision}"] = paths[f"{name} {precision}"].rename(folder / f"{precision}.onnx")
    return paths


def logits(path: Path) -> np.ndarray:
    model = runtime.open_session(path, "cpu", threads=1)
    return np.concatenate([model.predict(inputs) for inputs, _ in images()])


@pytest.mark.parametrize("family", ["cnn", "vit"])
@pytest.mark.parametrize(("precision", "tolerance", "share"), [("fp16", 5e-3, 0.52), ("int8", 0.3, 0.55)])
def test_a_converted_file_computes_nearly_the_same_in_fewer_bytes(
    files: dict[str, Path], family: str, precision: str, tolerance: float, share: float
) -> None:
    source, path = files[family], files[f"{family} {precision}"]
    expected, outputs = logits(source), logits(path)
    assert np.square(outputs - expected).mean() ** 0.5 <= tolerance * expected.std()
    weights = [sum(len(each.raw_data) for each in onnx.load(file).graph.initializer) for file in (source, path)]
    assert weights[1] < share * weights[0]


def dtypes(path: Path) -> Counter[int]:
    return Counter(each.data_type for each in onnx.load(path).graph.initializer)


@pytest.mark.parametrize("family", ["cnn", "vit"])
def test_callers_need_no_change(files: dict[str, Path], family: str) -> None:
    before = runtime.open_session(files[family], "cpu")
    for precision in PRECISIONS:
        after = runtime.open_session(files[f"{family} {precision}"], "cpu")
        assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
        how = {"quantisation": "ranges by extremes"} if precision == "int8" else {}
        assert after.metadata == {**METADATA, "precision": precision, **how}
        assert (before.precision, after.precision) == ("fp32", precision)
        assert after.predict(np.zeros((3, 3, 16, 16), np.float32)).dtype == np.float32


@pytest.mark.parametrize("name", ["cnn", "vit", "cnn fp16", "vit fp16", "cnn int8", "vit int8"])
def test_a_file_holds_nothing_that_it_does_not_use(files: dict[str, Path], name: str) -> None:
    model = onnx.load(files[name])
    onnx.checker.check_model(model, full_check=True)
    used = {name for node in model.graph.node for name in node.input} | {each.name for each in model.graph.output}
    assert not [each.name for each in model.graph.initializer if each.name not in used]
    assert not [node.name for node in model.graph.node if not set(node.output) & used]
    domains = {node.domain for node in model.graph.node}
    assert {entry.domain for entry in model.opset_import} == domains == {""}
    assert not [node for node in model.graph.node if node.op_type in ("BatchNormalization", "Constant", "Identity")]


def test_int8_has_a_scale_for_every_channel_and_unsigned_activations(files: dict[str, Path]) -> None:
    graph = onnx.load(files["cnn int8"]).graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    weights = [value for value in values.values() if value.dtype == np.int8 and value.ndim > 1]
    scales = {len(value) for value in values.values() if value.dtype == np.float32 and value.ndim == 1}
    assert sorted(len(value) for value in weights) == [5, 48, 48]
    assert scales == {5, 48}
    quantised = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    assert {values[node.input[2]].dtype for node in quantised.values()} == {np.dtype(np.uint8)}


def test_fp16_has_no_float32_weights(files: dict[str, Path]) -> None:
    for family in ("cnn", "vit"):
        assert dtypes(files[f"{family} fp16"])[TensorProto.FLOAT] == 0
        assert dtypes(files[family])[TensorProto.FLOAT] > 0


class _Loud(nn.Module):
    """A layer in the middle whose outputs float16 cannot hold, and one that makes them small again."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.first, self.loud, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loud = torch.relu(self.loud(self.first(x) * 1e3)) * 1e3
        return self.last(loud.mean((2, 3)) * 1e-6)


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model, example = _Loud().eval(), torch.randn(1, 3, 16, 16)
    return Exported(model, export_onnx(model, example, tmp_path_factory.mktemp("loud") / "m.onnx", METADATA), example)


def test_what_float16_cannot_hold_stays_in_float32(loud: Exported, tmp_path: Path) -> None:
    assert max(measure_ranges(loud.path, images()).values()) > 65504
    path = convert(loud.path, tmp_path / "m.onnx", "fp16", images()).path
    np.testing.assert_allclose(logits(path), logits(loud.path), rtol=0, atol=5e-3)
    kinds = dtypes(path)
    assert kinds[TensorProto.FLOAT16] > 0
    assert kinds[TensorProto.FLOAT] > 0


class _Upsampling(nn.Module):
    """Two layers that upsample by the same scales, which stay float32, as a detector's neck has them."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twice = nn.functional.interpolate(torch.relu(self.first(x)), scale_factor=2.0)
        return nn.functional.interpolate(self.last(twice), scale_factor=2.0).mean((2, 3))


def test_a_tensor_that_stays_in_float32_may_be_read_twice(tmp_path: Path) -> None:
    source = export_onnx(_Upsampling().eval(), torch.randn(1, 3, 16, 16), tmp_path / "m.onnx", METADATA).path
    path = convert(source, tmp_path / "m.fp16.onnx", "fp16", images()).path
    np.testing.assert_allclose(logits(path), logits(source), rtol=0, atol=5e-3)
    assert dtypes(path)[TensorProto.FLOAT16] > 0


def test_ranges_are_those_of_the_activations(wide_cnn: Exported) -> None:
    largest = measure_ranges(wide_cnn.path, images())
    assert largest["input"] == max(float(inputs.abs().max()) for inputs, _ in images())
    assert largest["logits"] == pytest.approx(float(np.abs(logits(wide_cnn.path)).max()), rel=1e-5)
    assert max(largest.values()) < FP16_LIMIT


def test_a_file_that_cannot_be_converted_is_one_line_and_leaves_nothing(slim_cnn: Exported, tmp_path: Path) -> None:
    model = onnx.load(slim_cnn.path)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 7  # it cannot be fed
    onnx.save(model, tmp_path / "model.onnx")
    for precision in PRECISIONS:
        with pytest.raises(ModelError, match=f"cannot be made {precision}: ") as caught:
            convert(tmp_path / "model.onnx", tmp_path / "out.onnx", precision, images())
        assert "\n" not in str(caught.value)
    made = make_targets(tmp_path / "model.onnx", ("fp16",), images())
    assert made.files == ()
    assert made.failures[0].text.startswith("NO model.fp16.onnx: ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.fixture
def folder(wide_cnn: Exported, slim_cnn: Exported, tmp_path: Path) -> Path:
    for name, exported in (("dense", wide_cnn), ("model", slim_cnn)):
        (tmp_path / f"{name}.onnx").write_bytes(exported.path.read_bytes())
    return tmp_path


def _rated(folder: Path, made: tuple[Path, ...] = (), batches: Batches = ()) -> targets.Targets:
    files = (folder / "dense.onnx", folder / "model.onnx", *made)
    return rate_targets(time_and_predict(files, batches or images(), Classification(), provider="cpu", threads=1))


def test_targets_are_measured_on_the_files_beside_the_others(folder: Path) -> None:
    made = make_targets(folder / "model.onnx", ("fp16", "int8"), images())
    assert made.failures == ()
    ratings = _rated(folder, made.files)
    names = ["dense.onnx", "model.onnx", "model.fp16.onnx", "model.int8.onnx"]
    assert [row.file for row in ratings.rows] == names
    assert [row.precision for row in ratings.rows] == ["fp32", "fp32", "fp16", "int8"]
    expected, labels = logits(folder / "model.onnx"), np.concatenate([each.numpy() for _, each in images()])
    for row in ratings.rows:
        outputs = logits(folder / row.file)
        assert row.quality.value == (outputs.argmax(1) == labels).mean()
        assert row.agreement == (outputs.argmax(1) == expected.argmax(1)).mean()
        assert row.max_abs == pytest.approx(np.abs(outputs - expected).max())
        assert row.onnx_bytes == (folder / row.file).stat().st_size
        assert row.samples == 64
    assert ratings.rows[0].speedup.ratio == 1
    assert ratings.rows[1].max_abs == 0


def _with_weights(path: Path, change: float) -> Path:
    """The file `path`, its weights times `change`, as another."""
    model = onnx.load(path)
    for each in model.graph.initializer:
        if each.data_type == TensorProto.FLOAT:
            each.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(each) * np.float32(change), each.name))
    onnx.save(model, path.with_name("model.int8.onnx"))
    return path.with_name("model.int8.onnx")


def test_a_file_that_gives_no_numbers_is_not_shipped(folder: Path) -> None:
    broken = _with_weights(folder / "model.onnx", float("nan"))
    ratings = _rated(folder, (broken,))
    assert [row.file for row in ratings.rows] == ["dense.onnx", "model.onnx"]
    assert [note.text for note in ratings.notes] == [
        "NO model.int8.onnx: its outputs are not finite on 64 of 64 test samples"
    ]
    assert not broken.exists()


def test_a_file_that_loses_accuracy_says_so(folder: Path) -> None:
    right = [(inputs, torch.from_numpy(_decisions(folder / "model.onnx", inputs))) for inputs, _ in images()]
    wrong = _with_weights(folder / "model.onnx", -1.0)
    ratings = _rated(folder, (wrong,), right)
    lost = 100 * (1 - ratings.rows[2].quality.value)
    assert lost > 1
    texts = [note.text for note in ratings.notes]
    assert f"model.int8.onnx LOSES {lost:.1f} POINTS of top-1 against model.onnx" in texts


@pytest.mark.parametrize(("factor", "words"), [(0.5, "slower than"), (1.0, "not shown to be faster than"), (2.0, "")])
def test_a_file_that_is_not_faster_says_so(slim_cnn: Exported, factor: float, words: str) -> None:
    """Seconds are drawn, not measured."""
    predictions = Predictions(Classification(), torch.eye(5)[:, :3], torch.ones(5))
    session, seconds = runtime.open_session(slim_cnn.path, "cpu"), np.random.default_rng(0).normal(1, 0.1, 100)
    inputs = np.zeros((1, *session.input.shape[1:]), np.float32)
    source, other = (FileTiming(session, runs, predictions, 1, inputs) for runs in (seconds, seconds[::-1] / factor))
    notes = targets._warnings(other, source)
    assert len(notes) == bool(words)
    assert all(f"is {words} model.onnx here" in note.text for note in notes)
    assert all("on CPU, 95 % interval" in note.text for note in notes)


def _decisions(path: Path, inputs: torch.Tensor) -> np.ndarray:
    return runtime.open_session(path, "cpu", threads=1).predict(inputs).argmax(1)


def test_the_recipe_orders_targets_and_refuses_unknown_ones() -> None:
    for names, ordered in (
        (("int8",), ("fp32", "int8")),
        (("int8", "fp16", "fp32", "int8"), ("fp32", "fp16", "int8")),
    ):
        recipe = Recipe("m", 0.5, scorer="magnitude", targets=names)
        assert recipe.targets == ordered
        assert Recipe.from_json(recipe.to_json()) == recipe
        assert json.loads(recipe.to_json())["targets"] == list(ordered)
    with pytest.raises(InputError, match="unknown target 'int4'; did you mean int8"):
        Recipe("m", 0.5, scorer="magnitude", targets=("int4",))
    with pytest.raises(InputError, match=r"max-quant-drop is 0\.02, but no int8 file is made; add --targets int8"):
        Recipe("m", 0.5, max_quant_drop=0.02)


def test_the_table_says_no_difference_where_it_cannot_tell(folder: Path) -> None:
    from reports import make_report

    assert describe_speed(Speedup(1.04, 0.98, 1.1)) == "not shown (0.98 to 1.10)"
    assert describe_speed(Speedup(2.0, 1.9, 2.1)) == "2.00x (1.90 to 2.10)"
    assert describe_speed(Speedup(0.5, 0.4, 0.6)) == "0.50x (0.40 to 0.60)"
    ratings = _rated(folder)
    cells = list_targets(make_report(targets=ratings.rows))
    assert cells[0][0] == "dense.onnx"
    assert "reference" in cells[0]
    assert cells[1][-1].endswith(" on CPU")
    assert list_targets(make_report(targets=())) == []
