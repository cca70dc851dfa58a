"""A module of one's own, saved as the run folder that `run` writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import CLASSES, FlattenCNN
from torch import Tensor, nn
from user_modules import USER_MODULES

import pxcompress
from pxcompress import InputError, compress_module
from pxcompress.models.adapter import UNKNOWN
from pxcompress.own_module import ModuleResult
from pxcompress.proof import Metric
from pxcompress.report.build import read_report
from pxcompress.report.record import Report
from pxcompress.report.summary import format_command
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


def test_what_a_folder_cannot_hold_is_refused_in_one_line(slim: ModuleResult, tmp_path: Path) -> None:
    build, draw = USER_MODULES["two inputs"]
    two = compress_module(
        build().eval(), draw(1), [(draw(8), None)], 0.3, scorer="random", repair=(), round_to=1, budget="params"
    )
    with pytest.raises(InputError, match="other inputs than one tensor") as caught:
        two.save(tmp_path / "two")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "two").exists()


def test_a_classifier_has_as_many_names_as_outputs(net: nn.Module, tmp_path: Path) -> None:
    batches = _batches(0)
    plain = compress_module(net, batches[0][0][:1], batches, 0.4, scorer="random", round_to=1, repair=())
    with pytest.raises(InputError, match=f"2 classes are named; the module returns logits of {CLASSES}"):
        plain.save(tmp_path / "mine", batches, classes=("a", "b"))
    assert not list(tmp_path.iterdir())


def test_samples_without_targets_have_unknown_ones() -> None:
    from pxcompress.module_folder import Targeted

    ((_, targets),) = Targeted([torch.zeros(2, 3)])
    assert targets.tolist() == [UNKNOWN, UNKNOWN]
