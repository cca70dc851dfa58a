"""The whole way for models that are no classifiers, from the command's recipe to the files that a user ships."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import pxcompress
from pxcompress.commands.options import read_input_size
from pxcompress.errors import InputError
from pxcompress.explain.compare import ExplanationRequest, explain
from pxcompress.explain.folder import write
from pxcompress.pipeline import _check_task
from pxcompress.recipe import Guarantee, Recipe
from pxcompress.report.explanation import Marks, format_explanation
from pxcompress.report.heatmap_figures import draw_marks, list_panels
from pxcompress.report.record import Report
from pxcompress.report.table import to_table
from pxcompress.run_folder.model_files import certify_files
from pxcompress.run_folder.written import check_dynamic_size
from pxcompress.tasks import TASKS
from pxcompress.tasks.regression import Regression
from pxcompress.tasks.segmentation import Segmentation
from pxcompress.tasks.task import Outputs
from pxcompress.workload import load_workload

SIDE = 16


class MapNet(nn.Module):
    """Two maps of class scores in a dict, as torchvision's segmentation models return them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(24, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.head, self.auxiliary = nn.Conv2d(32, num_classes, 1), nn.Conv2d(24, num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.first(x)
        return {"out": self.head(self.second(features)), "aux": self.auxiliary(features)}


def map_net(num_classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return MapNet(num_classes)


class WeightedError(Regression):
    """A user's own task: only the first number counts."""

    def logits(self, outputs: Outputs) -> Tensor:
        return super().logits(outputs)[:, :1]


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of three colours on noise, with masks."""
    root, draw = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir()
    for number in range(60):
        image, mask = draw.integers(0, 90, (SIDE, SIDE, 3), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
        for label in (1, 2, 3):
            row, column = draw.integers(0, SIDE - 6, 2)
            image[row : row + 6, column : column + 6, label - 1] += 150
            mask[row : row + 6, column : column + 6] = label
        Image.fromarray(image).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def segmented(masks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """The report and the folder of a run on masks."""
    folder = tmp_path_factory.mktemp("run") / "slim"
    recipe = Recipe(
        "test_task_runs:map_net", 0.4, data=str(masks), input_size=SIDE, repair=("fold",), dynamic_size=True
    )
    return pxcompress.compress(recipe, folder), folder


def test_masks_make_it_a_segmentation(segmented: tuple[Report, Path]) -> None:
    report, folder = segmented
    assert report.task == "segmentation"
    assert (report.metric.name, report.data.layout, report.data.classes) == ("mIoU", "masks", ("0", "1", "2", "3"))
    assert report.pruned.macs < report.dense.macs
    assert report.dense.quality.low <= report.dense.quality.value <= report.dense.quality.high
    assert report.change.value == pytest.approx(report.pruned.quality.value - report.dense.quality.value)
    assert "mIoU" in to_table(report)
    assert "mIoU" in (folder / "report.html").read_text()
    assert json.loads((folder / "report.json").read_text())["metric"]["name"] == "mIoU"


def test_the_file_has_the_outputs_of_the_model_by_name(segmented: tuple[Report, Path]) -> None:
    _, folder = segmented
    slim, dense = (ort.InferenceSession(folder / name) for name in ("model.onnx", "dense.onnx"))
    shapes = [[(port.name, port.shape[1:]) for port in session.get_outputs()] for session in (slim, dense)]
    assert shapes[0] == shapes[1] == [("out", [4, "height", "width"]), ("aux", [4, "height", "width"])]
    for sides in ((SIDE, SIDE), (SIDE + 3, 2 * SIDE)):
        inputs = torch.randn(3, 3, *sides)
        expected = pxcompress.load(folder)(inputs)
        for value, name in zip(slim.run(None, {"input": inputs.numpy()}), ("out", "aux"), strict=True):
            np.testing.assert_allclose(value, expected[name].detach(), atol=1e-4)


def test_a_model_that_takes_one_size_is_refused_before_any_work(tmp_path: Path) -> None:
    for model, data, message in (
        (
            "vit_tiny_patch16_224",
            "digits",
            r"--dynamic-size: model does not run .* \(1, 3, 64, 32\): AssertionError: Input height",
        ),
        ("pxcompress.demo.nets:note_reader", "notes", "--dynamic-size is for images, .* leave it out"),
    ):
        recipe = Recipe(model, 0.4, data=data, dynamic_size=True)
        with pytest.raises(InputError, match=message):
            check_dynamic_size(recipe, load_workload(recipe))


def test_predict_writes_a_mask(segmented: tuple[Report, Path], masks: Path, tmp_path: Path) -> None:
    _, folder = segmented
    image = tmp_path / "image.png"
    image.write_bytes((masks / "images" / "0.png").read_bytes())
    subprocess.run(
        [sys.executable, folder / "predict.py", image], check=True, capture_output=True, timeout=60, cwd=tmp_path
    )
    mask = np.asarray(Image.open(f"{image}.mask.png"))
    assert mask.shape == (SIDE, SIDE)
    assert set(np.unique(mask)) <= {0, 1, 2, 3}


def test_what_only_classifiers_have_is_refused_for_others(masks: Path, tmp_path: Path) -> None:
    recipe = Recipe("test_task_runs:map_net", 0.4, data=str(masks), input_size=SIDE)
    for changes, message in (
        ({"class_scores": True}, "class_scores needs one label a sample"),
        ({"task": "classification"}, "task 'classification' reads classes, data .* have masks"),
        ({"task": "embedding"}, "task 'embedding' reads classes or identities, data .* have masks"),
        ({"repair": ("fold", "finetune:labels=true")}, "repair 'finetune:labels=true' needs one label"),
        ({"scorer": "lrp:target=label"}, "needs one label a sample"),
    ):
        with pytest.raises(InputError, match=message):
            pxcompress.compress(recipe.but(**changes), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_images_without_labels_are_enough(masks: Path) -> None:
    workload = load_workload(
        Recipe("test_task_runs:map_net", 0.4, data=str(masks / "images"), input_size=SIDE, task="agreement")
    )
    assert workload.task.metric.name == "agreement"
    assert next(iter(workload.splits.score))[0].shape[1:] == (3, SIDE, SIDE)


def test_inputs_need_not_be_square(masks: Path) -> None:
    assert (read_input_size("24"), read_input_size("16x24")) == (24, (16, 24))
    recipe = Recipe("test_task_runs:map_net", 0.4, data=str(masks), input_size=read_input_size("16x24"))
    assert Recipe.from_json(recipe.to_json()) == recipe
    inputs, targets = next(iter(load_workload(recipe).splits.score))
    assert inputs.shape[1:] == (3, 16, 24)
    assert targets.shape[1:] == (16, 24)
    for text in ("4x40", "24x", "axb", "1x2x3"):
        with pytest.raises(InputError, match="input-size is"):
            recipe.but(input_size=read_input_size(text))


def test_a_task_of_ones_own_is_taken_by_its_name() -> None:
    task = TASKS.build("test_task_runs:WeightedError")
    assert type(task) is WeightedError
    assert TASKS.text(task) == "test_task_runs:WeightedError"
    other = TASKS.build("test_task_runs:WeightedError:largest=3")
    assert TASKS.build(TASKS.text(other)) == other != task
    with pytest.raises(InputError, match="unknown option of task 'test_task_runs:WeightedError': 'largets'"):
        TASKS.build("test_task_runs:WeightedError:largets=3")
    with pytest.raises(InputError, match="expected a dataclass derived from"):
        TASKS.build("test_task_runs:SIDE")


def test_a_registered_task_of_ones_own_is_known_by_its_module() -> None:
    """Another process has not imported it, and does not know its registered name."""
    name = "weighted-error-of-a-test"
    TASKS.register(name)(WeightedError)
    try:
        assert TASKS.text(TASKS.build(name)) == "test_task_runs:WeightedError"
    finally:
        del TASKS._classes[name]


def test_a_module_of_ones_own_is_judged_by_its_task() -> None:
    torch.manual_seed(1)
    batches = [torch.randn(12, 3, SIDE, SIDE) for _ in range(6)]
    net = map_net().eval()
    result = pxcompress.compress_module(net, batches[0][:1], batches, 0.3, task="segmentation", repair=("fold",))
    assert result.agreements is not None
    with torch.no_grad():
        dense, pruned = net(batches[0]), result.pruned.model(batches[0])
    assert {name: value.shape for name, value in pruned.items()} == {name: value.shape for name, value in dense.items()}
    assert 0.5 < result.agreements.held_out.share < 1


def test_a_segmenter_is_certified_by_its_loss(segmented: tuple[Report, Path]) -> None:
    _, folder = segmented
    record = certify_files([folder], "", Guarantee(0.7, risk="loss-increase"))
    assert [row.n for row in record.rows] == [record.reserved] * 2
    assert record.certificate.limit.bound == "betting"
    assert abs(record.rows[0].errors) < 1e-9  # the dense model against itself
    recipe = Recipe("test_task_runs:map_net", 0.4, data="never read", guarantee=Guarantee(0.5))
    with pytest.raises(InputError, match="risk 'negative-flips' and --part are for classifiers; give --risk"):
        _check_task(recipe, Segmentation())


def test_explanations_show_the_maps_of_both_models(segmented: tuple[Report, Path], tmp_path: Path) -> None:
    _, folder = segmented
    result = explain(folder, request=ExplanationRequest(samples=8))
    assert result.subject == "the map"
    assert {row.kind for row in result.similarity} <= {"all", "as good", "worse", "better"}
    for case in result.cases:
        assert case.dense.probability is None
        assert "%" in case.dense.name
        assert [marks.regions.shape for marks in case.pictures.marks if marks.regions is not None] == [(SIDE, SIDE)] * 2
        assert [panel.title.partition(":")[0] for panel in list_panels(case)] == ["dense", "pruned"] * 2
    assert result.flipping.measure == "agreement with the answer"
    assert "relevance of the map" in format_explanation(result)
    assert f"agreement {result.cases[0].agreement:.2f}" in " ".join(format_explanation(result).split())
    write(result, folder, tmp_path)
    assert "why the map" in (tmp_path / "explain.html").read_text()


def test_boxes_are_drawn_in_the_colours_of_their_classes() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    marks = Marks(boxes=((10.0, 10.0, 30.0, 30.0),), classes=(1,), names=("a 0.50",))
    picture = draw_marks(image, marks)
    assert picture.shape == (160, 320, 3)  # enlarged, so that the name can be read
    assert picture[100, 41].tolist() == [0, 255, 0]
    assert picture[80, 160].tolist() == [0, 0, 0]
