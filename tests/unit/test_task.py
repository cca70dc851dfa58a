"""A task: some classes of the data, some outputs of the model, and a run that knows no others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command import Px, image_folder, one_line
from models import CLASSES, CLASSIFIERS, FlattenCNN, Subject, snapshot
from safetensors.torch import save_file
from torch import Tensor, nn

import pxcompress
from pxcompress.data import open_source, restrict_classes
from pxcompress.deploy.runtime import open_session
from pxcompress.errors import DataError, ModelError
from pxcompress.models.task import slice_classes
from pxcompress.pipeline import compress
from pxcompress.recipe import Guarantee, Recipe
from pxcompress.report.build import from_json
from pxcompress.report.summary import format_command
from pxcompress.state import seeded
from pxcompress.workload import load_workload, with_baseline

OUTPUTS = (3, 0, 1)
KEPT = ("8", "3", "5")
MODEL = "test_task:net"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Baselines and a record of used splits of its own."""
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PXCOMPRESS_CACHE", str(place))
        yield place


def net(num_classes: int = 10) -> nn.Module:
    """A small network without normalisation for digits of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 32), nn.ReLU(),
        nn.Linear(32, num_classes),
    )  # fmt: skip


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)


# --- the model ------------------------------------------------------------------------------------------------------


def test_scores_are_the_dense_models_columns(subject: Subject) -> None:
    before = snapshot(subject.model)
    slim = slice_classes(subject.model, subject.example, OUTPUTS)
    expected = outputs_of(subject.model, subject.inputs)[:, OUTPUTS]
    torch.testing.assert_close(outputs_of(slim, subject.inputs), expected, rtol=1e-5, atol=1e-5)
    assert snapshot(subject.model) == before
    for name in CLASSIFIERS[subject.name]:
        dense, layer = subject.model.get_submodule(name), slim.get_submodule(name)
        assert torch.equal(layer.weight, dense.weight[list(OUTPUTS)])
        assert torch.equal(layer.bias, dense.bias[list(OUTPUTS)])
        assert layer.out_features == len(OUTPUTS)
    stale = [name for name, module in slim.named_modules() if getattr(module, "num_classes", None) == CLASSES]
    assert stale == []


class ConvolutionLast(nn.Module):
    """A classifier of 1 x 1 convolutions; `behind` is what follows it."""

    def __init__(self, behind: Callable[[Tensor], Tensor] = torch.flatten, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.last = nn.Conv2d(8, 4, 1, bias=False, groups=groups)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.last(torch.relu(self.first(x)).mean((2, 3), keepdim=True)))


def flat(scores: Tensor) -> Tensor:
    return scores.flatten(1)


def test_a_convolution_may_be_the_classifier() -> None:
    inputs = torch.randn(4, 3, 8, 8)
    model = ConvolutionLast(flat).eval()
    slim = slice_classes(model, inputs[:1], (2, 0))
    assert slim.last.out_channels == 2
    torch.testing.assert_close(outputs_of(slim, inputs), outputs_of(model, inputs)[:, [2, 0]])


@pytest.mark.parametrize(
    ("model", "outputs", "message"),
    [
        (nn.Flatten(), (0, 1), "no linear or convolutional classifier"),
        (ConvolutionLast(flat, groups=2), (0, 1), "no output of its own for every class"),
        (ConvolutionLast(flat), (0, 4), "output 4 is asked for, but classifier 'last' has 4"),
        (ConvolutionLast(flat), (-1, 0), "output -1 is asked for"),
        (ConvolutionLast(lambda scores: flat(scores).softmax(1)), (0, 1), "leave a softmax behind it out"),
        (ConvolutionLast(lambda scores: flat(scores) @ torch.eye(4)), (0, 1), "does not run with 2 classes"),
        (ConvolutionLast(lambda scores: flat(scores).repeat(1, 2)), (0, 1), "another score"),
    ],
)
def test_a_model_that_cannot_be_sliced_is_refused_in_one_line(
    model: nn.Module, outputs: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        slice_classes(model.eval(), torch.randn(1, 3, 8, 8), outputs)
    assert "\n" not in str(caught.value)


# --- the data -------------------------------------------------------------------------------------------------------


def named(samples: object, classes: tuple[str, ...]) -> dict[str, str]:
    """Sample id -> name of its class."""
    return {sample: classes[label] for sample, label in zip(samples.ids, samples.labels, strict=True)}  # type: ignore[attr-defined]


def test_the_pools_of_embedded_data_stay_and_labels_are_renumbered() -> None:
    source = open_source("digits")
    task = restrict_classes(source, KEPT)
    assert task.classes == KEPT
    for pool in ("train", "select", "held_out"):
        whole, part = getattr(source, pool), getattr(task, pool)
        expected_names = {sample: name for sample, name in named(whole, source.classes).items() if name in KEPT}
        assert named(part, KEPT) == expected_names
        assert part.ids == tuple(expected_names)
        where = whole.ids.index(part.ids[1])
        np.testing.assert_array_equal(np.asarray(part.load(1)), np.asarray(whole.load(where)))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), {"train": 24, "val": 10}, CLASSES, 16)


def test_held_out_images_of_a_user_stay_held_out(images: Path) -> None:
    source = open_source(str(images))
    names = ("class3", "class0")
    task = restrict_classes(source, names)
    learned = {**named(source.train, source.classes), **named(source.select, source.classes)}
    assert {**named(task.train, names), **named(task.select, names)} == {
        sample: name for sample, name in learned.items() if name in names
    }
    assert len(task.train) + len(task.select) == 48
    assert len(task.select) == round(0.15 * 48)
    held_out = named(source.held_out, source.classes)
    assert named(task.held_out, names) == {sample: name for sample, name in held_out.items() if name in names}


def test_all_classes_in_their_order_are_no_task(images: Path) -> None:
    source = open_source(str(images))
    assert restrict_classes(source, source.classes) is source
    assert (
        load_workload(Recipe("models:FlattenCNN", 0.5, data=str(images), classes=source.classes, input_size=16)).whole
        is None
    )


def test_unknown_classes_are_named_with_the_nearest(images: Path) -> None:
    with pytest.raises(DataError, match=r"unknown class of data 'digits': 'x'; known: 0, 1, 2"):
        restrict_classes(open_source("digits"), ("0", "x"))
    with pytest.raises(DataError, match="did you mean class"):
        restrict_classes(open_source(str(images)), ("class0", "clas3"))


# --- both -----------------------------------------------------------------------------------------------------------


def test_a_users_weights_are_sliced_as_the_data_are(images: Path, tmp_path: Path) -> None:
    with seeded(1):
        weights = FlattenCNN().state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    recipe = Recipe(
        "models:FlattenCNN", 0.5, data=str(images), checkpoint=str(tmp_path / "w.safetensors"), input_size=16
    )
    whole, task = load_workload(recipe), load_workload(recipe.but(classes=("class3", "class0")))
    assert task.loaded.classes == 2
    assert (task.source.classes, task.loaded.weights) == (("class3", "class0"), "checkpoint")
    assert torch.equal(task.loaded.model.fc2.weight, weights["fc2.weight"][[3, 0]])
    inputs, labels = next(iter(task.splits.test))
    expected = outputs_of(whole.loaded.model, inputs)[:, [3, 0]]
    torch.testing.assert_close(outputs_of(task.loaded.model, inputs), expected)
    assert set(labels.tolist()) == {0, 1}
    assert with_baseline(task, 0, print) is task


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three digits, certified, with a baseline that is trained for it."""
    recipe = Recipe(
        MODEL, 0.5, classes=KEPT, input_size=8, scorer="magnitude", round_to=1, guarantee=Guarantee(0.1, steps=1)
    )
    folder = tmp_path_factory.mktemp("task") / recipe.label
    compress(recipe, folder)
    return folder


def test_a_run_on_a_task_tells_its_classes(finished: Path) -> None:
    report = from_json((finished / "report.json").read_text())
    assert finished.name == "test_task_net-macs-0.50-3-classes-drop-0.1"
    assert report.data.classes == KEPT
    assert report.dense.quality.value > 0.6
    assert "a task of 3 of the 10 classes: the dense model, too, knows no others" in [
        note.text for note in report.notes
    ]
    assert "--classes 8,3,5" in format_command(report.recipe)
    for file in ("dense.onnx", "model.onnx"):
        facts = {entry.key: entry.value for entry in onnx.load(finished / file).metadata_props}
        assert json.loads(facts["classes"]) == list(KEPT)


def test_load_gives_the_sliced_model_that_was_exported(finished: Path) -> None:
    inputs = torch.randn(5, 3, 8, 8)
    expected = open_session(finished / "model.onnx", "cpu").predict(inputs)
    assert expected.shape == (5, 3)
    np.testing.assert_allclose(outputs_of(pxcompress.load(finished), inputs).numpy(), expected, atol=1e-4)


@pytest.mark.usefixtures("finished")
def test_the_baseline_of_a_task_is_that_of_all_classes(cache: Path) -> None:
    told: list[str] = []
    recipe = Recipe(MODEL, 0.5, input_size=8)
    whole = with_baseline(load_workload(recipe), 0, told.append)
    assert [line.partition(":")[0] for line in told] == [f"baseline read from {next((cache / 'baselines').iterdir())}"]
    task = with_baseline(load_workload(recipe.but(classes=KEPT)), 0, told.append)
    assert task.loaded.weights == "trained-here"
    rows = [int(name) for name in KEPT]
    assert torch.equal(task.loaded.model[-1].weight, whole.loaded.model[-1].weight[rows])  # type: ignore[index]
    assert not set(task.splits.ids["certify"] + task.splits.ids["test"]) & set(whole.source.train.ids)


def test_the_certificate_of_a_task_can_be_recomputed(px: Px, finished: Path, images: Path) -> None:
    assert px("verify", finished, "--quiet").code == 0
    told = json.loads((finished / "certificate.json").read_text())
    recipe = Recipe.from_json((finished / "recipe.json").read_text())
    assert told["n"] == len(load_workload(recipe).splits.ids["certify"])
    for files in ([finished], [finished / "dense.onnx", finished / "model.onnx", "--data", "digits"]):
        again = json.loads(px("certify", *files, "--max-drop", 0.1, "--json").out)
        assert (again["n"], again["hashes"]["split"]) == (told["n"], told["hashes"]["split"])
    assert "data that the models are for" in one_line(px("certify", finished, "--data", images, "--max-drop", 0.1))


# --- the words ------------------------------------------------------------------------------------------------------


def test_recipes_hold_their_classes() -> None:
    recipe = Recipe("resnet18", 0.5, classes=("b", "a"))
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.label == "resnet18-macs-0.50-2-classes"
    assert "--classes" not in format_command(Recipe("resnet18", 0.5))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("0", "classes are only '0'"),
        ("0,1,0", "class '0' is given 2 times"),
        (" , ", "has no names"),
        ("no-such-file.txt", "classes are only 'no-such-file.txt'; expected two or more names, or a file"),
        ("0, one", "unknown class of data 'digits': 'one'; known: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        (",".join(f"class{number}" for number in range(100)), "unknown class of data 'digits': 'class0'"),
        (b"0\n\n ten \r\n", "unknown class of data 'digits': 'ten'"),
        (b"\xff\xfe\x00", "is not a text file"),
    ],
)
def test_wrong_classes_get_one_line(px: Px, tmp_path: Path, classes: str | bytes, message: str) -> None:
    value: object = classes
    if isinstance(classes, bytes):
        value = tmp_path / "classes"
        value.write_bytes(classes)
    options = ["--model", MODEL, "--ratio", 0.5, "--classes", value, "--quiet", "--out", tmp_path / "out"]
    assert message in one_line(px("run", *options))
    assert not (tmp_path / "out").exists()
