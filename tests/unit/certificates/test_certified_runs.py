"""A guarantee that ships with the model: `run --max-drop` on a tiny model."""

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
from certified import SIZE, draw_roles, read_certificate
from command import Outcome, Px, one_line
from models import CLASSES, FlattenCNN
from safetensors.torch import save_file
from scipy.stats import binom

import pxcompress
from pxcompress import pipeline
from pxcompress.certify.learn_then_test import fixed_sequence
from pxcompress.certify.used import FILE
from pxcompress.deploy.runtime import open_session
from pxcompress.errors import DataError
from pxcompress.proof import Warning
from pxcompress.recipe import Guarantee, Recipe
from pxcompress.report.build import from_json, to_json
from pxcompress.run_folder.certificate import check_certifiable
from pxcompress.state import seeded
from pxcompress.types import Batch
from pxcompress.workload import Workload, load_workload


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


# --- run ------------------------------------------------------------------------------------------------------------


def test_the_smallest_model_that_passes_is_what_the_folder_holds(certified: tuple[Path, Outcome]) -> None:
    folder, outcome = certified
    assert outcome.code == 0, outcome.err
    told = read_certificate(folder)
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
    told = read_certificate(folder)
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
    assert plain["cost_planned"] == read_certificate(certified[0])["rows"][-1]["size"]
    assert not (tmp_path / "plain" / "certificate.json").exists()
    assert json.loads((tmp_path / "plain" / "report.json").read_text())["certificate"] is None


def test_a_path_that_always_fails_returns_the_dense_model_and_exit_code_3(refused: tuple[Path, Outcome]) -> None:
    folder, outcome = refused
    assert outcome.code == 3
    assert outcome.err.startswith("pxcompress: not certified")
    assert len(outcome.err.strip().splitlines()) == 1
    told = read_certificate(folder)
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
    guarantee = [
        "--max-drop",
        0.3,
        "--risk",
        "top1-error",
        "--part",
        "classes",
        "--steps",
        1,
        "--out",
        tmp_path / "out",
    ]
    outcome = px(
        "run", *options, "--ratio", 0.5, "--repair", "none", "--checkpoint", tmp_path / "random.safetensors", *guarantee
    )
    assert outcome.code == 3
    told = read_certificate(tmp_path / "out")
    assert told["part"] == "classes"
    assert [each["n"] for each in told["rows"][0]["classes"]] == [15] * CLASSES
    assert told["chosen"] is None
    assert told["certified"] == [False, False]
    assert str(told["sentence"]).startswith("Not certified; the dense model stays.")
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["removed"] == {}
    assert "<strong>Not certified: </strong>" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("guarantee", "message"),
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
    px: Px,
    options: list[object],
    tmp_path: Path,
    guarantee: list[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*args: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(pipeline, "with_baseline", work)
    assert message in one_line(px("run", *options, "--ratio", 0.5, *guarantee, "--out", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


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


# --- the reserved samples -------------------------------------------------------------------------------------------


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
    uses = sorted(read_certificate(folder)["uses_before"] for folder, _ in (certified, refused))
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
    more = ["--ratio", 0.2, "--repair", "fold", "--max-drop", 0.32, "--steps", 1, "--out", tmp_path / "out"]
    outcome = px("run", *told, *more, "--part", "confident")
    assert outcome.code == 0, outcome.err
    _check_confident(px, tmp_path / "out")
    message = str(read_certificate(tmp_path / "out")["spent"])
    assert "guarantee is spent" in message
    assert message in outcome.err
    assert message in outcome.out
    assert Warning("spent", message) in from_json((tmp_path / "out" / "report.json").read_text()).notes


def _check_confident(px: Px, folder: Path) -> None:
    """What is left of a run with --part confident."""
    told = read_certificate(folder)
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


def test_a_run_holds_the_risk_in_every_group_of_its_table(
    px: Px, options: list[object], images: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(images, tmp_path / "images"))
    table = images / "table.csv"
    with table.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "label", "camera", "split"])
        for place, image in enumerate(sorted(images.rglob("*.png"))):
            half, label, _ = image.relative_to(images).parts
            lines.writerow([image.relative_to(images), label, ("front", "back")[place % 3 == 0], half])
    command = ["run", *options, "--data", table, "--ratio", 0.3, "--repair", "fold", "--steps", 1, "--out"]
    group = ["--max-drop", 0.5, "--group", "camera"]
    assert "'classes' is given with --group" in one_line(px(*command, tmp_path / "no", *group, "--part", "classes"))
    assert "did you mean camera" in one_line(px(*command, tmp_path / "no", *group[:-1], "kamera"))
    assert "'back', the smallest group" in one_line(px(*command, tmp_path / "no", *group, "--max-drop", 0.01))
    outcome = px(*command, tmp_path / "run", *group)
    assert outcome.code == 0, outcome.err
    told = read_certificate(tmp_path / "run")
    assert told["group"] == "camera"
    backs = {str(row["path"]) for row in csv.DictReader(table.open()) if row["camera"] == "back"}
    ids = draw_roles(table)["certify"]
    counts = {each["name"]: each["n"] for each in told["rows"][1]["classes"]}
    assert counts == {"back": sum(name in backs for name in ids), "front": sum(name not in backs for name in ids)}
    assert told["rows"][1]["p_value"] == max(each["p_value"] for each in told["rows"][1]["classes"])
    assert px("verify", tmp_path / "run", "--quiet").code == 0
    table.write_text(table.read_text().replace("back", "side"))
    assert px("verify", tmp_path / "run", "--quiet").code == 3, "a group that is another one now"
    table.unlink()
