"""A module of one's own, saved as the run folder that `run` writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime as ort
import pytest
import torch
from models import CLASSES, FlattenCNN
from torch import Tensor, nn

import pxcompress
from pxcompress import InputError, compress_module
from pxcompress.models.adapter import UNKNOWN
from pxcompress.own_module import ModuleResult
from pxcompress.proof import Metric
from pxcompress.report.build import read_report
from pxcompress.report.record import Report
from pxcompress.report.summary import describe_conditions, format_command
from pxcompress.state import seeded
from pxcompress.tasks.task import Outputs, Task
from pxcompress.types import Preprocessing
from pxcompress.workload import load_workload


@dataclass(frozen=True)
class WithinTwo(Task):
    """A task of a user's own: the share of samples whose largest logit is at most two places off."""

    metric: ClassVar[Metric] = Metric("within-two", binary=True)

    def statistics(self, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
        return ((outputs["output"].argmax(1) - targets).abs() <= 2).float()[:, None]


def _batches(seed: int, count: int = 3) -> list[Any]:
    with seeded(seed):
        return [(torch.randn(16, 3, 12, 12), torch.randint(CLASSES, (16,))) for _ in range(count)]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with seeded(3):
        return FlattenCNN().eval()


@pytest.fixture(scope="module")
def slim(net: nn.Module) -> ModuleResult:
    batches = _batches(0)
    return compress_module(
        net, batches[0][0][:1], batches, 0.4, task=WithinTwo(), scorer="magnitude", round_to=1, repair=["fold"]
    )


@pytest.fixture(scope="module")
def saved(slim: ModuleResult, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("saved") / "mine"
    return folder, slim.save(folder, _batches(1, 2))


def test_the_folder_is_that_of_a_run(saved: tuple[Path, Report]) -> None:
    folder, report = saved
    names = {"dense.onnx", "model.onnx", "model.safetensors", "plan.json", "recipe.json", "scores.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*names, "report.json", "report.html", "SHA256SUMS"}
    assert set(report.sha256) == names
    assert read_report(folder) == report
    assert report.parity.passed
    assert report.pruned.macs < report.dense.macs


def test_models_are_judged_by_the_users_own_metric(
    net: nn.Module, slim: ModuleResult, saved: tuple[Path, Report]
) -> None:
    _, report = saved
    assert report.metric == WithinTwo.metric
    assert (report.data.test, report.data.select + report.data.repair) == (32, 48)
    for model, measured in ((net, report.dense), (slim.pruned.model, report.pruned)):
        with torch.no_grad():
            hits = [((model(inputs).argmax(1) - labels).abs() <= 2).float() for inputs, labels in _batches(1, 2)]
        assert measured.quality.value == pytest.approx(float(torch.cat(hits).mean()))


def test_the_module_is_loaded_back_by_one_like_the_dense_one(slim: ModuleResult, saved: tuple[Path, Report]) -> None:
    folder, _ = saved
    with seeded(99):
        other = FlattenCNN()
    again = pxcompress.load(folder, other)
    inputs = _batches(5, 1)[0][0]
    with torch.no_grad():
        torch.testing.assert_close(again(inputs), slim.pruned.model(inputs))
    assert type(again) is FlattenCNN
    assert other.training
    with pytest.raises(
        InputError, match=r"a FlattenCNN given in Python; give one like it: pxcompress.load\(folder, model"
    ):
        pxcompress.load(folder)


def test_the_report_says_how_it_was_made_in_python(saved: tuple[Path, Report]) -> None:
    folder, report = saved
    call = format_command(report.recipe)
    assert call.startswith("pxcompress.compress_module(model, example, batches, ratio=0.4, ")
    assert "repair=('fold',)" in call
    assert not any("too good" in note.text for note in report.notes)
    assert json.loads((folder / "recipe.json").read_text())["model"] == "FlattenCNN"
    assert "pxcompress run" not in (folder / "report.html").read_text()


def test_what_needs_model_and_data_again_says_that_no_file_holds_them(saved: tuple[Path, Report]) -> None:
    _, report = saved
    with pytest.raises(InputError, match="of a FlattenCNN and batches given in Python"):
        load_workload(report.recipe)


def test_a_folder_in_the_way_is_refused_before_any_work(slim: ModuleResult, saved: tuple[Path, Report]) -> None:
    with pytest.raises(InputError, match="exists"):
        slim.save(saved[0], _batches(1, 1))


@pytest.mark.slow
def test_images_with_labels_get_predict_py_and_their_accuracy(net: nn.Module, tmp_path: Path) -> None:
    batches = _batches(0)
    slim = compress_module(net, batches[0][0][:1], batches, 0.4, scorer="magnitude", round_to=1, repair=[])
    pixels = Preprocessing((3, 12, 12), (0.5,) * 3, (0.5,) * 3)
    report = slim.save(tmp_path / "mine", classes=[f"kind {n}" for n in range(CLASSES)], preprocessing=pixels)
    assert report.metric.name == "top-1"
    assert (tmp_path / "mine" / "predict.py").is_file()
    assert any("look too good" in note.text for note in report.notes)


class Placed(nn.Module):
    """An image and the number of its place, which is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.place = nn.Conv2d(3, 12, 3), nn.Embedding(9, 12)
        self.head = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, picture: Tensor, place: Tensor) -> Tensor:
        return self.head(self.image(picture).relu().mean((2, 3)) + self.place(place))


def test_several_inputs_and_whole_numbers_are_saved_by_name(tmp_path: Path) -> None:
    with seeded(5):
        net = Placed().eval()
        batches = [(torch.randn(24, 3, 8, 8), torch.randint(4, (24,))) for _ in range(2)]
        test = [((torch.randn(16, 3, 8, 8), torch.arange(16) % 9), torch.arange(16) % CLASSES)]
    example = tuple(each[:1] for each in batches[0])
    slim = compress_module(net, example, [(inputs, None) for inputs in batches], 0.4, scorer="magnitude", repair=[])
    report = slim.save(tmp_path / "mine", test)
    assert [(each.name, each.shape) for each in report.inputs] == [("picture", (3, 8, 8)), ("place", ())]
    assert report.metric.name == "top-1"
    assert "inputs picture 3x8x8, place 1" in describe_conditions(report)
    session = ort.InferenceSession(tmp_path / "mine" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [port.type for port in session.get_inputs()] == ["tensor(float)", "tensor(int64)"]
    again, (picture, place) = pxcompress.load(tmp_path / "mine", Placed()), test[0][0]
    with torch.no_grad():
        expected = slim.pruned.model(picture, place)
        torch.testing.assert_close(again(picture, place), expected)
    (output,) = session.run(None, {"picture": picture.numpy(), "place": place.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, atol=1e-4, rtol=1e-4)
    assert float((expected.argmax(1) == test[0][1]).float().mean()) == pytest.approx(report.pruned.quality.value)


def test_a_classifier_has_as_many_names_as_outputs(net: nn.Module, tmp_path: Path) -> None:
    batches = _batches(0)
    plain = compress_module(net, batches[0][0][:1], batches, 0.4, scorer="random", round_to=1, repair=())
    with pytest.raises(InputError, match=f"2 classes are named; the module returns logits of {CLASSES}"):
        plain.save(tmp_path / "mine", batches, classes=("a", "b"))
    assert not list(tmp_path.iterdir())


def test_samples_without_targets_have_unknown_ones() -> None:
    from pxcompress.module_folder import TargetBatches

    ((_, targets),) = TargetBatches([torch.zeros(2, 3)])
    assert targets.tolist() == [UNKNOWN, UNKNOWN]
