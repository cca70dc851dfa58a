"""A guarantee that ships with the model: `run --max-drop`, `certify` and `verify`, on files of a tiny model."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Outcome, Px, call_once, image_folder, one_line
from models import CLASSES, FlattenCNN
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import binom
from torch import nn

import pxcompress
from pxcompress import pipeline
from pxcompress.certify.learn_then_test import fixed_sequence
from pxcompress.certify.used import FILE, Use, add_use, count_seen_elsewhere
from pxcompress.data import load_splits, open_source
from pxcompress.data.samples import USER_LIMITS
from pxcompress.deploy.runtime import open_session
from pxcompress.errors import DataError, InputError
from pxcompress.proof import Warning
from pxcompress.recipe import Guarantee, Recipe
from pxcompress.report.build import from_json, to_json
from pxcompress.run_folder.certificate import check_certifiable
from pxcompress.run_folder.sums import write_sums
from pxcompress.state import seeded
from pxcompress.types import Batch, Batches, Preprocessing
from pxcompress.workload import Workload, load_workload

SIZE = 16
PREPROCESSING = Preprocessing((3, SIZE, SIZE), (0.5,) * 3, (0.5,) * 3)
Run = Callable[..., Outcome]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A record of used splits of its own."""
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PXCOMPRESS_CACHE", str(place))
        yield place


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: noise around a colour of the class; 75 images to certify on."""
    return image_folder(tmp_path_factory.mktemp("images"), {"train": 24, "val": 30}, CLASSES, SIZE)


@pytest.fixture(scope="module")
def options(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """What every run here has in common; the model is trained until it is right, so that answers can turn wrong."""
    weights = tmp_path_factory.mktemp("weights") / "flatten.safetensors"
    with seeded(1):
        save_file(FlattenCNN().state_dict(), weights)
        recipe = Recipe("models:FlattenCNN", 0.5, data=str(images), checkpoint=str(weights), input_size=SIZE)
        workload = load_workload(recipe)
        save_file(_trained(workload.loaded.model, workload.splits.score).state_dict(), weights)
    found = ["--model", "models:FlattenCNN", "--data", images, "--checkpoint", weights, "--input-size", SIZE]
    return [*found, "--score", "magnitude", "--budget", "channels", "--round-to", 1, "--quiet"]


@pytest.fixture(scope="module")
def certified(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run of which a smaller model passes, with a temperature."""
    out = tmp_path_factory.mktemp("runs") / "certified"
    asked = ["--max-drop", 0.3, "--steps", 3, "--temperature-scaling"]
    return out, call_once("run", *options, "--ratio", 0.6, "--repair", "fold", *asked, "--out", out)


@pytest.fixture(scope="module")
def refused(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run of which every smaller model fails: most units go, nothing is repaired, one error in 75 is too many."""
    out = tmp_path_factory.mktemp("runs") / "refused"
    asked = ["--max-drop", 0.05, "--risk", "disagreement", "--steps", 2]
    return out, call_once("run", *options, "--ratio", 0.8, "--min-keep", 0, "--repair", "none", *asked, "--out", out)


def _trained(model: nn.Module, batches: Batches) -> nn.Module:
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
    for _ in range(60):
        for inputs, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    return model


def test_a_temperature_is_in_the_file_and_the_report_says_what_probabilities_are_worth(
    certified: tuple[Path, Outcome], refused: tuple[Path, Outcome]
) -> None:
    folder, outcome = certified
    report = from_json((folder / "report.json").read_text())
    assert report.temperature not in (0, 1)
    facts = open_session(folder / "model.onnx", "cpu").metadata
    assert float(facts["temperature"]) == pytest.approx(report.temperature, rel=1e-4)
    assert "temperature" not in open_session(folder / "dense.onnx", "cpu").metadata
    assert report.calibration is not None
    assert report.calibration.samples == report.data.test
    assert f"logits divided by {report.temperature:.3g}" in outcome.out
    page = (folder / "report.html").read_text()
    assert "expected calibration error" in page
    assert "logits were divided by" in page
    plain = from_json((refused[0] / "report.json").read_text())
    assert plain.temperature == 1
    assert plain.calibration is not None


@pytest.fixture
def copy(certified: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A certified run folder to tamper with."""
    shutil.copytree(certified[0], tmp_path / "copy")
    return tmp_path / "copy"


def _content(folder: Path) -> dict[str, object]:
    return json.loads((folder / "certificate.json").read_text())


# --- run ------------------------------------------------------------------------------------------------------------


def test_the_smallest_model_that_passes_is_what_the_folder_holds(certified: tuple[Path, Outcome]) -> None:
    folder, outcome = certified
    assert outcome.code == 0, outcome.err
    told = _content(folder)
    rows, chosen = told["rows"], told["chosen"]
    assert (told["risk"], told["alpha"], told["delta"], told["n"]) == ("negative-flips", 0.3, 0.05, 75)
    assert [row["size"] for row in rows] == sorted((row["size"] for row in rows), reverse=True)
    assert chosen == fixed_sequence([row["p_value"] for row in rows], 0.05) - 1 > 0
    assert binom.cdf(rows[chosen]["errors"], 75, 0.3) <= 0.05
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["cost_planned"] == rows[chosen]["size"] < rows[0]["size"] == plan["cost_dense"]
    assert told["hashes"].keys() == {"model", "dense", "plan", "weights", "split"}
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_report_shows_the_certificate(certified: tuple[Path, Outcome]) -> None:
    folder, outcome = certified
    told = _content(folder)
    report = from_json((folder / "report.json").read_text())
    assert json.loads(to_json(report))["certificate"] == told
    assert Recipe.from_json((folder / "recipe.json").read_text()).guarantee == Guarantee(0.3, steps=3)
    page = (folder / "report.html").read_text()
    assert "Certified: " in page
    assert "What it does not promise" in page
    for text in (outcome.out, page):
        assert str(told["sentence"]).replace("'", "&#39;") in text.replace("'", "&#39;")
    assert "--max-drop 0.3 --steps 3" in page
    assert outcome.out.splitlines()[-2] == report.verdict


def test_the_sparsest_model_is_that_of_a_run_without_a_guarantee(
    px: Px, certified: tuple[Path, Outcome], options: list[object], tmp_path: Path
) -> None:
    outcome = px("run", *options, "--ratio", 0.6, "--repair", "fold", "--out", tmp_path / "plain")
    assert outcome.code == 0, outcome.err
    plain = json.loads((tmp_path / "plain" / "plan.json").read_text())
    assert plain["cost_planned"] == _content(certified[0])["rows"][-1]["size"]
    assert not (tmp_path / "plain" / "certificate.json").exists()
    assert json.loads((tmp_path / "plain" / "report.json").read_text())["certificate"] is None


def test_a_path_that_always_fails_returns_the_dense_model_and_exit_code_3(refused: tuple[Path, Outcome]) -> None:
    folder, outcome = refused
    assert outcome.code == 3
    assert outcome.err.startswith("pxcompress: not certified")
    assert len(outcome.err.strip().splitlines()) == 1
    told = _content(folder)
    assert told["chosen"] == 0
    assert told["certified"] == [True, False, False]
    inputs = torch.randn(5, 3, SIZE, SIZE)
    dense, model = (open_session(folder / name, "cpu").predict(inputs) for name in ("dense.onnx", "model.onnx"))
    np.testing.assert_array_equal(dense, model)
    assert json.loads((folder / "plan.json").read_text())["removed"] == {}
    with torch.no_grad():
        np.testing.assert_allclose(pxcompress.load(folder)(inputs).numpy(), dense, atol=1e-5)
    assert "Only the dense model is certified" in outcome.out


def test_where_the_dense_model_fails_nothing_is_certified(px: Px, options: list[object], tmp_path: Path) -> None:
    """Without training it is wrong nearly always; the paper's own code returned its sparsest model here."""
    with seeded(1):
        save_file(FlattenCNN().state_dict(), tmp_path / "random.safetensors")
    asked = ["--max-drop", 0.3, "--risk", "top1-error", "--part", "classes", "--steps", 1, "--out", tmp_path / "out"]
    outcome = px(
        "run", *options, "--ratio", 0.5, "--repair", "none", "--checkpoint", tmp_path / "random.safetensors", *asked
    )
    assert outcome.code == 3
    told = _content(tmp_path / "out")
    assert told["part"] == "classes"
    assert [each["n"] for each in told["rows"][0]["classes"]] == [15] * CLASSES
    assert told["chosen"] is None
    assert told["certified"] == [False, False]
    assert str(told["sentence"]).startswith("Not certified; the dense model stays.")
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["removed"] == {}
    assert "<strong>Not certified: </strong>" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--max-drop", 0.01], "needs at least 299"),
        (["--max-drop", 0.03, "--confidence", 0.99], "needs at least 152"),
        (["--max-drop", 3], "max-drop is 3"),
        (["--max-drop", 0.3, "--confidence", 95], "confidence is 95"),
        (["--max-drop", 0.3, "--risk", "flips"], "negative-flips"),
        (["--max-drop", 0.3, "--steps", 0], "steps is 0"),
        (["--risk", "disagreement"], "without --max-drop"),
        (["--part", "classes"], "without --max-drop"),
        (["--max-drop", 0.3, "--part", "class"], "did you mean classes"),
        (["--max-drop", 0.3, "--coverage", 0.8], "no effect with part 'all'"),
        (["--max-drop", 0.3, "--part", "classes", "--coverage", 0.8], "no effect with part 'classes'"),
        (["--max-drop", 0.15, "--part", "classes"], "15 samples of 'class0', the smallest class"),
        (["--max-drop", 0.15, "--part", "classes"], "needs at least 19"),
        (["--max-drop", 0.045, "--part", "confident"], "60 samples to certify on that are confident"),
        (["--max-drop", 0.05, "--part", "confident", "--coverage", 0.5], "needs at least 59"),
    ],
)
def test_what_cannot_be_certified_is_said_before_any_work(
    px: Px, options: list[object], tmp_path: Path, asked: list[object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(pipeline, "with_baseline", work)
    assert said in one_line(px("run", *options, "--ratio", 0.5, *asked, "--out", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# --- the reserved samples -------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(options: list[object]) -> Recipe:
    names = dict(zip(options[:-1:2], options[1:-1:2], strict=True))
    return Recipe(
        "models:FlattenCNN",
        0.5,
        data=str(names["--data"]),
        checkpoint=str(names["--checkpoint"]),
        input_size=SIZE,
        scorer="lrp-residual",
        repair=("closed-form",),
        guarantee=Guarantee(0.3, steps=1),
    )


class Watched:
    """Batches that tell when they are read."""

    def __init__(self, batches: object, tell: Callable[[], None]) -> None:
        self._batches, self._tell = batches, tell

    def __iter__(self) -> Iterator[Batch]:
        self._tell()
        return iter(self._batches)  # type: ignore[call-overload]


def test_no_other_stage_reaches_the_reserved_samples(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    reads: list[str] = []

    def watched(recipe: Recipe) -> Workload:
        workload = load_workload(recipe)
        certify = Watched(workload.splits.certify, lambda: reads.append(stages[-1]))
        return dataclasses.replace(workload, splits=dataclasses.replace(workload.splits, certify=certify))

    monkeypatch.setattr(pipeline, "load_workload", watched)
    report = pipeline.compress(recipe, tmp_path / "run", note=stages.append)
    assert report.certificate is not None
    assert set(reads) == {"certify ..."}
    assert {stage.name for stage in report.stages} >= {"score (lrp-residual)", "certify", "measure"}


@pytest.mark.parametrize("role", ["score", "repair", "select", "test", "training"])
def test_ids_that_serve_another_role_are_refused(recipe: Recipe, role: str) -> None:
    workload = load_workload(recipe)
    check_certifiable(recipe, workload)
    shared = workload.splits.ids["certify"][0]
    if role == "training":
        train = workload.source.train
        source = dataclasses.replace(workload.source, train=dataclasses.replace(train, ids=(shared, *train.ids[1:])))
        with pytest.raises(DataError, match="also serve 'training'"):
            check_certifiable(recipe, dataclasses.replace(workload, source=source))
        return
    ids = {**workload.splits.ids, role: (shared, *workload.splits.ids[role])}
    with pytest.raises(ValueError, match="is in both"):
        dataclasses.replace(workload.splits, ids=ids)


def test_a_split_that_is_used_again_is_told(
    px: Px, certified: tuple[Path, Outcome], refused: tuple[Path, Outcome], cache: Path
) -> None:
    """The two runs made two certificates on the same samples; which one came first depends on the order of tests."""
    uses = sorted(_content(folder)["uses_before"] for folder, _ in (certified, refused))
    assert uses[0] < uses[1]
    before = _uses(cache)
    again = px("certify", certified[0], "--max-drop", 0.31)
    made = _uses(cache)
    assert len(made) == len(before) + 1
    assert f"certified {len(made) - 1} times before, so their guarantee is spent" in again.out
    assert f"give each --confidence {1 - 0.05 / len(made):.6g}" in again.out
    px("certify", certified[0], "--max-drop", 0.31)
    assert _uses(cache) == made  # the same certificate once more is no new use


def _uses(cache: Path) -> list[object]:
    """The certificates on the only split that the record has, whose samples are those of the run's."""
    (split,) = json.loads((cache / FILE).read_text()).values()
    assert len(set(split["samples"])) == 75
    return split["uses"]


def test_a_spent_split_is_noted_in_the_report_and_on_stderr(
    px: Px, options: list[object], refused: tuple[Path, Outcome], tmp_path: Path
) -> None:
    told = [option for option in options if option != "--quiet"]
    asked = ["--ratio", 0.2, "--repair", "fold", "--max-drop", 0.32, "--steps", 1, "--out", tmp_path / "out"]
    outcome = px("run", *told, *asked, "--part", "confident")
    assert outcome.code == 0, outcome.err
    _check_confident(px, tmp_path / "out")
    message = str(_content(tmp_path / "out")["spent"])
    assert "guarantee is spent" in message
    assert message in outcome.err
    assert message in outcome.out
    assert Warning("spent", message) in from_json((tmp_path / "out" / "report.json").read_text()).notes


def _check_confident(px: Px, folder: Path) -> None:
    """What is left of a run with --part confident."""
    told = _content(folder)
    assert (told["part"], told["coverage"], told["reserved"]) == ("confident", 0.8, 75)
    assert told["n"] == told["rows"][0]["n"] < 75
    page = (folder / "report.html").read_text()
    assert "Certified where the dense model is confident: " in page
    assert f"{told['n']} of 75 samples count" in page
    assert "--part confident --coverage 0.8" in page
    assert Recipe.from_json((folder / "recipe.json").read_text()).guarantee == Guarantee(
        0.32, steps=1, part="confident", coverage=0.8
    )
    assert px("verify", folder, "--quiet").out.endswith(f"recomputed on {told['n']} samples: the certificate holds\n")


def test_the_record_tells_data_apart_and_says_when_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    assert [add_use("digits", "split", "ABC", Use(text)) for text in ("a", "a", "b", "c", "b")] == [0, 0, 1, 2, 2]
    assert add_use("glyphs", "split", "DE", Use("a")) == add_use("digits", "other", "F", Use("a")) == 0
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    (tmp_path / FILE).write_text("[")
    with pytest.raises(InputError, match="damaged"):
        add_use("digits", "split", "ABC", Use("a"))


def test_the_record_knows_samples_again_in_data_that_have_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what a certificate has looked at counts, wherever the samples are now."""
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    assert add_use("monday", "split", "ABCDEF", Use("first", 0, 3)) == 0
    assert count_seen_elsewhere("tuesday", "grown", "FEDCBAGH") == 3
    assert count_seen_elsewhere("tuesday", "grown", "FEDGH") == 0
    assert count_seen_elsewhere("monday", "split", "ABCDEF") == 0, "what is left of a split is told by its own uses"
    assert add_use("tuesday", "grown", "FEDGHA", Use("second", 0, 5)) == 0
    assert add_use("tuesday", "grown", "FEDGHA", Use("third", 5, 6)) == 1
    (tmp_path / FILE).write_text(json.dumps({"old": ["hash"], "newer": [{"certificate": "hash", "begins": 2}]}))
    assert add_use("tuesday", "grown", "FEDGHA", Use("third")) == 0, "earlier versions kept no samples"


# --- certify --------------------------------------------------------------------------------------------------------


def test_files_are_tested_in_order(px: Px, certified: tuple[Path, Outcome], images: Path) -> None:
    dense, model = certified[0] / "dense.onnx", certified[0] / "model.onnx"
    asked = ["--data", images, "--max-drop", 0.3]
    outcome = px("certify", dense, model, *asked, "--json")
    assert outcome.code == 0, outcome.err
    told, run = json.loads(outcome.out), _content(certified[0])
    assert [row["name"] for row in told["rows"]] == [str(dense), str(model)]
    assert told["rows"][1]["errors"] == run["rows"][run["chosen"]]["errors"]
    assert told["rows"][1]["p_value"] == run["rows"][run["chosen"]]["p_value"]
    assert told["hashes"]["split"] == run["hashes"]["split"]
    assert told["chosen_name"] == str(model)
    assert "With 95 % confidence" in px("certify", dense, model, *asked).out
    assert "path out of order" in one_line(px("certify", model, dense, *asked))
    assert "given twice" in one_line(px("certify", dense, dense, *asked))
    assert "expected a run folder" in one_line(px("certify", model, *asked))
    assert "--data" in one_line(px("certify", dense, model, "--max-drop", 0.3))
    assert "data that the models are for" in one_line(
        px("certify", dense, model, "--data", "digits", "--max-drop", 0.3)
    )
    assert "needs at least 299" in one_line(px("certify", dense, model, "--data", images, "--max-drop", 0.01))
    assert "nothing.onnx" in one_line(px("certify", dense, "nothing.onnx", *asked))


def test_a_run_folder_is_a_path_of_two(px: Px, certified: tuple[Path, Outcome], images: Path, tmp_path: Path) -> None:
    outcome = px("certify", certified[0], "--max-drop", 0.3)
    assert outcome.code == 0, outcome.err
    assert "chosen" in outcome.out
    for label in range(CLASSES):  # every label is wrong
        shutil.copytree(images / "val" / f"class{label}", tmp_path / "val" / f"class{(label + 1) % CLASSES}")
        shutil.copytree(images / "train" / f"class{label}", tmp_path / "train" / f"class{label}")
    wrong = px("certify", certified[0], "--data", tmp_path, "--max-drop", 0.3, "--risk", "top1-error", "--quiet")
    assert wrong.code == 3
    assert "Not certified: the dense model stays." in wrong.out
    assert wrong.err.startswith("pxcompress: not certified")


def _outputs(folder: Path, images: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Logits of both models by role, one sample at a time, and labels."""
    models = {name: open_session(folder / f"{name}.onnx", "cpu") for name in ("dense", "model")}
    with seeded(0):
        workload = load_workload(Recipe("models:FlattenCNN", 0.5, data=str(images), input_size=SIZE))
    logits, labels = {}, {}
    for role in ("select", "certify"):
        batches = list(getattr(workload.splits, role))
        labels[role] = np.concatenate([part.numpy() for _, part in batches])
        for name, model in models.items():
            logits[f"{name} {role}"] = np.concatenate([model.predict(one[None]) for part, _ in batches for one in part])
    return logits, labels


def test_the_confident_part_by_hand(px: Px, certified: tuple[Path, Outcome], images: Path) -> None:
    asked = ["--max-drop", 0.3, "--risk", "disagreement", "--part", "confident", "--coverage", 0.6]
    told = json.loads(px("certify", certified[0], *asked, "--json").out)
    logits, _ = _outputs(certified[0], images)
    sure = {role: np.exp(logits[f"dense {role}"]) for role in ("select", "certify")}
    sure = {role: (values / values.sum(1, keepdims=True)).max(1) for role, values in sure.items()}
    threshold = np.sort(sure["select"])[::-1][int(np.ceil(0.6 * len(sure["select"]))) - 1]
    assert told["threshold"] == pytest.approx(threshold, rel=1e-4)
    counted = sure["certify"] >= told["threshold"]
    differ = logits["dense certify"].argmax(1) != logits["model certify"].argmax(1)
    assert [(row["n"], row["errors"]) for row in told["rows"]] == [
        (counted.sum(), 0),
        (counted.sum(), (differ & counted).sum()),
    ]
    assert told["rows"][1]["p_value"] == pytest.approx(binom.cdf((differ & counted).sum(), counted.sum(), 0.3))
    assert "the predictions of which the dense model is confident" in told["sentence"]


def test_every_class_by_hand(px: Px, certified: tuple[Path, Outcome], images: Path) -> None:
    asked = ["--max-drop", 0.35, "--risk", "disagreement", "--part", "classes"]
    told = json.loads(px("certify", certified[0], *asked, "--json").out)
    logits, labels = _outputs(certified[0], images)
    differ = logits["dense certify"].argmax(1) != logits["model certify"].argmax(1)
    expected = [(f"class{place}", 15, differ[labels["certify"] == place].sum()) for place in range(CLASSES)]
    assert [(each["name"], each["n"], each["errors"]) for each in told["rows"][1]["classes"]] == expected
    worst = max(expected, key=lambda each: each[2])
    assert told["rows"][1]["p_value"] == pytest.approx(binom.cdf(worst[2], 15, 0.35))
    assert f"in each of the {CLASSES} classes" in told["sentence"]
    table = px("certify", certified[0], *asked)
    assert table.code == (0 if told["chosen"] else 3)
    assert f"{worst[2]} of 15 in '{worst[0]}'" in table.out
    assert f"the weakest of {CLASSES} classes (by true label)" in table.out


def test_an_anytime_test_leaves_samples_to_the_next(
    px: Px, certified: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    asked = ["certify", certified[0], "--max-drop", 0.6, "--anytime"]
    first, second = (json.loads(px(*asked, "--json").out) for _ in range(2))
    assert (first["bound"], first["delta"], first["budget"]["lost"]) == ("e-process", 0.025, False)
    assert 0 < first["n"] == first["budget"]["ends"] == second["budget"]["begins"] < 75
    assert "'confident' is given with --anytime" in one_line(px(*asked, "--part", "confident"))
    assert "no table" in one_line(px(*asked, "--group", "camera"))
    assert "LEFT for other tests" in px(*asked[:2], "--max-drop", 0.7, "--anytime").out


def test_where_too_few_are_confident_after_all_nothing_is_certified(
    px: Px, certified: tuple[Path, Outcome], images: Path, tmp_path: Path
) -> None:
    """Held-out images between two classes: of none of them is the model as sure as of the surest training images."""
    shutil.copytree(images / "train", tmp_path / "train")
    image_folder(tmp_path, {"val": 30}, CLASSES, SIZE)
    for number, file in enumerate((tmp_path / "val").rglob("*.png")):
        pixels = np.full((SIZE, SIZE, 3), 100, np.uint8)
        pixels.flat[number] += 1  # equal images would be no independent samples
        Image.fromarray(pixels).save(file)
    asked = ["--max-drop", 0.4, "--part", "confident", "--coverage", 0.1]
    outcome = px("certify", certified[0], "--data", tmp_path, *asked)
    assert outcome.code == 3
    assert "Not certified: the dense model stays." in outcome.out
    assert "lost 0 of 0 samples (p = 1; it takes at least 6 samples)" in outcome.out


# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify_recomputes_and_does_not_count(px: Px, certified: tuple[Path, Outcome], cache: Path) -> None:
    before = (cache / FILE).read_bytes()
    outcome = px("verify", certified[0])
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "recomputed on 75 samples: the certificate holds"
    told = json.loads(px("verify", certified[0], "--json").out)
    assert told["holds"] is True
    assert told["problems"] == []
    assert (cache / FILE).read_bytes() == before


def test_verify_takes_data_that_have_moved(px: Px, copy: Path, images: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    assert px("verify", copy, "--data", moved, "--quiet").code == 0
    next((moved / "val" / "class0").iterdir()).unlink()
    outcome = px("verify", copy, "--data", moved, "--quiet")
    assert outcome.code == 3
    assert "the split is not the certified one" in outcome.err


def test_verify_detects_another_model(px: Px, copy: Path, refused: tuple[Path, Outcome], tmp_path: Path) -> None:
    shutil.copy(copy / "dense.onnx", copy / "model.onnx")
    outcome = px("verify", copy, "--quiet")
    assert outcome.code == 3
    assert "the model is not the certified one" in outcome.err
    assert "holds" not in outcome.out


def test_verify_detects_any_file_that_was_altered(px: Px, copy: Path) -> None:
    """One line more at the end of each file in turn; what makes a model is measured again, and told by its role."""
    roles = {"model.onnx": "model", "dense.onnx": "dense", "plan.json": "plan", "model.safetensors": "weights"}
    files = sorted(path for path in copy.iterdir() if path.is_file())
    names = {file.name for file in files}
    assert {"report.json", "report.html", "predict.py", "recipe.json", "certificate.json", "SHA256SUMS"} < names
    for file in files:
        before = file.read_bytes()
        comment = b"\x32\x01 " if file.suffix == ".onnx" else b"\n"  # an ONNX file's doc_string
        file.write_bytes(before + comment)
        outcome = px("verify", copy, "--quiet")
        told = f"{file.name!r} is not the file that was written"
        if file.name == "SHA256SUMS":
            told = "SHA256SUMS of"
        if file.name in roles:
            told = f"the {roles[file.name]} is not the certified one"
        assert outcome.code == 3, (file.name, outcome)
        assert told in outcome.err, file.name
        file.write_bytes(before)
    assert px("verify", copy, "--quiet").code == 0


@pytest.mark.parametrize("name", ["recipe.json", "dense.onnx", "model.onnx", "model.safetensors", "certificate.json"])
def test_verify_of_a_file_that_is_no_longer_readable_says_what_was_altered(px: Px, copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"\x00")
    outcome = px("verify", copy, "--quiet")
    assert outcome.code == 3
    assert name in outcome.err or "weights" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_verify_says_what_is_missing(px: Px, copy: Path) -> None:
    (copy / "report.html").unlink()
    outcome = px("verify", copy)
    assert outcome.code == 0
    assert "not there any more, and so not checked: report.html\n" in outcome.err
    for name in ("plan.json", "model.safetensors"):
        (copy / name).rename(copy / "elsewhere")
        assert f"has no {name}, which its certificate is about" in one_line(px("verify", copy, "--quiet"))
        (copy / "elsewhere").rename(copy / name)


def test_verify_detects_a_figure_of_the_report_that_is_on_no_page(px: Px, copy: Path) -> None:
    content = json.loads((copy / "report.json").read_text())
    content["dense"]["latency_ms"]["quantiles"][3] += 1e-6
    (copy / "report.json").write_text(json.dumps(content, indent=1))
    assert "'report.json' is not the file that was written" in px("verify", copy, "--quiet").err


def test_verify_measures_and_does_not_only_compare_hashes(px: Px, copy: Path) -> None:
    """Errors that were written down too low, with p-values that fit them."""
    told = _content(copy)
    row = told["rows"][told["chosen"]]
    low = max(row["errors"] - 1, 0) if row["errors"] else 1
    row["errors"], row["p_value"] = low, Guarantee(0.3).limit.p_value(1.0 * (np.arange(75) < low))
    (copy / "certificate.json").write_text(json.dumps(told))
    outcome = px("verify", copy, "--quiet")
    assert outcome.code == 3
    assert f"not {low:g} errors on 75 samples" in outcome.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.update(alpha=0.29), "p = "),
        (lambda told: told.update(delta=1e-15), "does not follow from its own p-values"),
        (lambda told: told["rows"][1].update(p_value=1e-7), "the p-value of 'step 1"),
        (lambda told: told["hashes"].update(plan="0"), "the plan is not the certified one"),
        (lambda told: told.update(chosen=0), "does not follow from its own p-values"),
        (lambda told: told.pop("rows"), "rows: it is missing"),
    ],
)
def test_verify_detects_a_certificate_that_was_edited(
    px: Px, copy: Path, change: Callable[[dict[str, object]], object], said: str
) -> None:
    told = _content(copy)
    change(told)
    (copy / "certificate.json").write_text(json.dumps(told))
    outcome = px("verify", copy, "--quiet")
    assert outcome.code == 3
    assert said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def _remade(px: Px, folder: Path, *asked: object) -> dict[str, object]:
    """The certificate of a run folder's two models, as a run with them as its path would have left it there."""
    told = json.loads(px("certify", folder, "--json", *asked).out)
    told["hashes"] = _content(folder)["hashes"]
    (folder / "certificate.json").write_text(json.dumps(told))
    write_sums(folder)
    return told


@pytest.mark.parametrize("part", ["confident", "classes"])
def test_verify_honours_the_part(px: Px, copy: Path, part: str) -> None:
    assert _remade(px, copy, "--max-drop", 0.7, "--part", part)["chosen"] == 1
    outcome = px("verify", copy, "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1].endswith("the certificate holds")


# --- verify what `certify --out` wrote ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked", [[], ["--part", "classes"], ["--part", "confident", "--risk", "disagreement"], ["--anytime"]]
)
def test_verify_recomputes_a_certificate_of_files(
    px: Px, copy: Path, images: Path, asked: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "cache"))
    out, files = tmp_path / "out", [copy / "dense.onnx", copy / "model.onnx"]
    made = px("certify", *files, "--data", images, "--max-drop", 0.7, *asked, "--out", out, "--quiet")
    assert made.code == 0, made.err
    before = (tmp_path / "cache" / FILE).read_bytes()
    outcome = px("verify", out, "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == f"recomputed on {_content(out)['n']} samples: the certificate holds"
    assert (tmp_path / "cache" / FILE).read_bytes() == before, "to verify is no use of the samples"
    for key in ("alpha", "delta", "sentence", "reserved", "coverage", "threshold"):
        told = _content(out)
        if told[key] is not None:
            changed = {**told, key: told[key] + ("x" if key == "sentence" else -0.1 if key != "reserved" else 1)}
            (out / "certificate.json").write_text(json.dumps(changed))
            assert px("verify", out, "--quiet").code == 3, key
            (out / "certificate.json").write_text(json.dumps(told))
    shutil.copy(files[0], files[1])
    assert "is not the certified one" in px("verify", out, "--quiet").err
    files[1].unlink()
    assert "is not there any more" in one_line(px("verify", out, "--quiet"))


def test_data_that_have_grown_are_known_again(
    px: Px, certified: tuple[Path, Outcome], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another name, too; what told something already is not looked at again in silence."""
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "cache"))
    asked = ["certify", certified[0], "--max-drop", 0.6, "--anytime", "--quiet"]
    assert px(*asked, "--out", tmp_path / "one").code == 0
    image_folder(tmp_path / "more", {"val": 10}, CLASSES, SIZE)
    shutil.copytree(images, tmp_path / "grown")
    for file in (tmp_path / "more").rglob("*.png"):
        pixels = 255 - np.asarray(Image.open(file))
        Image.fromarray(pixels).save(tmp_path / "grown" / "val" / file.parent.name / f"more-{file.name}")
    again = one_line(px(*asked, "--data", tmp_path / "grown"))
    assert "samples served certificates before the data changed; to go on from one" in again
    assert "--resume FOLDER" in again
    resumed = ["certify", certified[0], "--data", tmp_path / "grown", "--resume", tmp_path / "one"]
    outcome = px(*resumed, "--out", tmp_path / "two", "--quiet")
    assert outcome.code == 0, outcome.err
    first, second = _content(tmp_path / "one"), _content(tmp_path / "two")
    assert second["looked_at"][: first["n"]] == first["looked_at"]
    assert "as the earlier certificate says" in px("verify", tmp_path / "two", "--quiet").out
    fixed = px("certify", certified[0], "--data", tmp_path / "grown", "--max-drop", 0.6, "--quiet")
    assert "their guarantee is spent" in fixed.out


def _grown(images: Path, root: Path) -> Path:
    """The images under other names, with as many more to hold out."""
    image_folder(root / "more", {"val": 30}, CLASSES, SIZE)
    for file in images.rglob("*.png"):
        place = root / "grown" / file.relative_to(images).parent
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / f"old-{file.name}")
    for file in (root / "more").rglob("*.png"):
        pixels = 255 - np.asarray(Image.open(file))
        Image.fromarray(pixels).save(root / "grown" / "val" / file.parent.name / file.name)
    return root / "grown"


def _reserved(data: Path) -> dict[str, tuple[str, ...]]:
    """The ids of every role, as a run draws them."""
    return load_splits(open_source(str(data)), PREPROCESSING).ids


def test_samples_that_served_in_another_role_are_never_certified_on(
    px: Px, certified: tuple[Path, Outcome], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data that have grown are cut anew: whatever chose something before is known by its content, and left out."""
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "cache"))
    grown = _grown(images, tmp_path)
    served = {name for role, ids in _reserved(images).items() if role != "certify" for name in ids}
    certify = _reserved(grown)["certify"]
    fresh = [name for name in certify if name.replace("old-", "") not in served or "old-" not in name]
    assert 0 < len(fresh) < len(certify)
    asked = ["certify", certified[0], "--data", grown, "--max-drop", 0.6]
    outcome = px(*asked, "--out", tmp_path / "out")
    assert f"{len(certify) - len(fresh)} samples are left out: the runs of these models used them" in outcome.err
    assert _content(tmp_path / "out")["reserved"] == len(fresh)
    assert px("verify", tmp_path / "out", "--quiet").code == (0 if _content(tmp_path / "out")["chosen"] else 3)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("dense.onnx", "model.onnx"):
        shutil.copy(certified[0] / name, bare)
    outcome = px("certify", bare / "dense.onnx", bare / "model.onnx", *asked[2:], "--json")
    assert f"no served.txt in '{bare}'" in outcome.err
    assert json.loads(outcome.out)["reserved"] == len(certify)


def test_all_samples_of_new_data_are_certified_on(
    px: Px, certified: tuple[Path, Outcome], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those of select; and where one image is not new, or the data have a half to train on, a share as in a run."""
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path / "cache"))
    image_folder(tmp_path, {"new": 20}, CLASSES, SIZE)
    for file in (tmp_path / "new").rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    asked = ["certify", certified[0], "--max-drop", 0.6, "--data", tmp_path / "new"]
    outcome = px(*asked, "--out", tmp_path / "out")
    everything = 20 * CLASSES
    expected = everything - round(0.15 * everything) - 2
    assert f"seen none of these data, so that {expected} of {everything} samples certify" in outcome.err
    assert f"check it with pxcompress verify {tmp_path / 'out'}" in outcome.err
    assert "give --out FOLDER to keep it" in px(*asked, "--json").err
    assert _content(tmp_path / "out")["reserved"] == expected
    assert px("verify", tmp_path / "out", "--quiet").code == (0 if _content(tmp_path / "out")["chosen"] else 3)
    share = len(_reserved(tmp_path / "new")["certify"])
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("dense.onnx", "model.onnx"):
        shutil.copy(certified[0] / name, bare)
    outcome = px("certify", bare / "dense.onnx", bare / "model.onnx", *asked[2:], "--json")
    assert json.loads(outcome.out)["reserved"] == share, "nobody knows what chose these models"
    old = images / _reserved(images)["score"][0]
    strange = next((tmp_path / "new").iterdir()) / "old.png"
    shutil.copy(old, strange)
    outcome = px(*asked, "--json")
    assert abs(json.loads(outcome.out)["reserved"] - share) <= 1
    strange.unlink()
    for role in ("score", "repair"):  # an old image that no role of the draw has
        monkeypatch.setitem(USER_LIMITS, role, 2)
    ids = _reserved(tmp_path / "new")
    unread = next(
        name for name in open_source(str(tmp_path / "new")).train.ids if name not in ids["score"] + ids["repair"]
    )
    shutil.move(tmp_path / "new" / unread, tmp_path / "aside.png")
    shutil.copy(old, tmp_path / "new" / unread)
    assert json.loads(px(*asked, "--json").out)["reserved"] == len(ids["certify"])
    shutil.move(tmp_path / "aside.png", tmp_path / "new" / unread)
    halves = tmp_path / "halves"
    shutil.copytree(tmp_path / "new", halves / "train")
    image_folder(halves, {"val": 8}, CLASSES, SIZE)
    for file in (halves / "val").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(file))[::-1]).save(file)
    assert len(_reserved(halves)["certify"]) == json.loads(px(*asked[:-1], halves, "--json").out)["reserved"]


def test_a_run_of_what_a_run_made_keeps_to_its_samples(
    px: Px, certified: tuple[Path, Outcome], images: Path, tmp_path: Path
) -> None:
    """Another seed cuts the same images in another way."""
    asked = ["run", "--model", certified[0] / "model.onnx", "--data", images, "--max-drop", 0.3, "--ratio", 0.2]
    refused = one_line(px(*asked, "--seed", 1, "--out", tmp_path / "out", "--quiet"))
    certify = load_splits(open_source(str(images), seed=1), PREPROCESSING, seed=1).ids["certify"]
    served = {name for role, ids in _reserved(images).items() if role != "certify" for name in ids}
    assert f"{len(served.intersection(certify))} samples to certify on served the run that made" in refused


def test_images_without_labels_are_known_as_well(
    px: Px, certified: tuple[Path, Outcome], images: Path, tmp_path: Path
) -> None:
    ids = _reserved(images)
    for name in (*ids["select"], *ids["test"], *ids["certify"]):
        shutil.copy(
            images / "val" / name if (images / "val" / name).exists() else images / name,
            tmp_path / "".join(name.split("/")),
        )
    outcome = px("certify", certified[0], "--unlabelled", tmp_path, "--max-drop", 0.6, "--out", tmp_path / "out")
    assert f"{len(ids['select'] + ids['test'])} samples are left out" in outcome.err
    assert json.loads((tmp_path / "out" / "request.json").read_text())["images"] == len(ids["certify"])


def test_a_run_holds_the_risk_in_every_group_of_its_table(
    px: Px, options: list[object], images: Path, tmp_path: Path
) -> None:
    table = images / "table.csv"
    with table.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "label", "camera", "split"])
        for place, image in enumerate(sorted(images.rglob("*.png"))):
            half, label, _ = image.relative_to(images).parts
            lines.writerow([image.relative_to(images), label, ("front", "back")[place % 3 == 0], half])
    asked = ["run", *options, "--data", table, "--ratio", 0.3, "--repair", "fold", "--steps", 1, "--out"]
    group = ["--max-drop", 0.5, "--group", "camera"]
    assert "'classes' is given with --group" in one_line(px(*asked, tmp_path / "no", *group, "--part", "classes"))
    assert "did you mean camera" in one_line(px(*asked, tmp_path / "no", *group[:-1], "kamera"))
    assert "'back', the smallest group" in one_line(px(*asked, tmp_path / "no", *group, "--max-drop", 0.01))
    outcome = px(*asked, tmp_path / "run", *group)
    assert outcome.code == 0, outcome.err
    told = _content(tmp_path / "run")
    assert told["group"] == "camera"
    backs = {str(row["path"]) for row in csv.DictReader(table.open()) if row["camera"] == "back"}
    ids = _reserved(table)["certify"]
    counts = {each["name"]: each["n"] for each in told["rows"][1]["classes"]}
    assert counts == {"back": sum(name in backs for name in ids), "front": sum(name not in backs for name in ids)}
    assert told["rows"][1]["p_value"] == max(each["p_value"] for each in told["rows"][1]["classes"])
    assert px("verify", tmp_path / "run", "--quiet").code == 0
    table.write_text(table.read_text().replace("back", "side"))
    assert px("verify", tmp_path / "run", "--quiet").code == 3, "a group that is another one now"
    table.unlink()


def _count_another(classes: list[dict[str, float]]) -> None:
    """One sample more where the risk is clearest: the p-value, that of the weakest class, stays."""
    clearest = min(classes, key=lambda each: each["p_value"])
    clearest["n"] += 1


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("confident", lambda told: told.update(threshold=told["threshold"] * 1.001), "confident means a softmax"),
        ("confident", lambda told: told.update(coverage=0.7), "confident means a softmax"),
        ("confident", lambda told: told.update(part="all", coverage=None, threshold=None), "on 75 samples"),
        ("confident", lambda told: told.update(part="all"), "coverage has no effect"),
        ("confident", lambda told: told.update(sentence="All is well."), "sentence"),
        ("confident", lambda told: told.update(scope="all predictions"), "sentence"),
        ("classes", lambda told: told.update(part="all"), "dense.onnx' has 0 errors on 75 samples (p = "),
        ("classes", lambda told: _count_another(told["rows"][1]["classes"]), "errors on 15 samples of 'class"),
        ("classes", lambda told: told["rows"][1]["classes"].pop(), "was not tested on the samples"),
        ("classes", lambda told: told["rows"][1]["classes"][0].update(errors=9), "is not that of its errors"),
        ("classes", lambda told: told.pop("part"), "part: it is missing"),
    ],
)
def test_verify_detects_another_part(
    px: Px, copy: Path, part: str, change: Callable[[dict[str, object]], object], said: str
) -> None:
    told = _remade(px, copy, "--max-drop", 0.5, "--part", part)
    change(told)
    (copy / "certificate.json").write_text(json.dumps(told))
    outcome = px("verify", copy, "--quiet")
    assert outcome.code == 3
    assert said in outcome.err
    assert "holds\n" not in outcome.out
    assert len(outcome.err.strip().splitlines()) == 1


def test_verify_of_a_run_that_certified_nothing_exits_3(px: Px, refused: tuple[Path, Outcome]) -> None:
    outcome = px("verify", refused[0], "--quiet")
    assert outcome.code == 3
    assert outcome.err.strip().endswith("the certificate does not hold: no smaller model is certified")


@pytest.mark.parametrize("key", ["spent", "size_unit", "sentence"])
def test_verify_of_half_a_certificate_is_one_line(px: Px, copy: Path, key: str) -> None:
    told = _content(copy)
    del told[key]
    (copy / "certificate.json").write_text(json.dumps(told))
    assert f"is not as pxcompress writes it ({key}: it is missing)" in one_line(px("verify", copy, "--quiet"), 3)


def test_verify_without_a_certificate_is_one_line(px: Px, copy: Path, tmp_path: Path) -> None:
    (copy / "certificate.json").unlink()
    assert "--max-drop makes one" in one_line(px("verify", copy, "--quiet"))
    assert "give a run folder" in one_line(px("verify", tmp_path / "nothing", "--quiet"))
