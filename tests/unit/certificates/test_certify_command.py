"""`certify` on files and folders: by hand, in order, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from certified import SIZE, read_certificate
from command import Outcome, Px, image_folder, one_line
from models import CLASSES
from PIL import Image
from scipy.stats import binom

from pxcompress.deploy.runtime import explain_failure, open_session
from pxcompress.recipe import Recipe
from pxcompress.run_folder.certificate import choose_provider
from pxcompress.state import seeded
from pxcompress.workload import load_workload


def test_files_are_tested_in_order(px: Px, certified: tuple[Path, Outcome], images: Path) -> None:
    dense, model = certified[0] / "dense.onnx", certified[0] / "model.onnx"
    more = ["--data", images, "--max-drop", 0.3]
    outcome = px("certify", dense, model, *more, "--json")
    assert outcome.code == 0, outcome.err
    told, run = json.loads(outcome.out), read_certificate(certified[0])
    assert [row["name"] for row in told["rows"]] == [str(dense), str(model)]
    assert told["rows"][1]["errors"] == run["rows"][run["chosen"]]["errors"]
    assert told["rows"][1]["p_value"] == run["rows"][run["chosen"]]["p_value"]
    assert told["hashes"]["split"] == run["hashes"]["split"]
    assert told["chosen_name"] == str(model)
    assert "With 95 % confidence" in px("certify", dense, model, *more).out
    assert "path out of order" in one_line(px("certify", model, dense, *more))
    assert "given twice" in one_line(px("certify", dense, dense, *more))
    assert "expected a run folder" in one_line(px("certify", model, *more))
    assert "--data" in one_line(px("certify", dense, model, "--max-drop", 0.3))
    assert "data that the models are for" in one_line(
        px("certify", dense, model, "--data", "digits", "--max-drop", 0.3)
    )
    assert "needs at least 299" in one_line(px("certify", dense, model, "--data", images, "--max-drop", 0.01))
    assert "nothing.onnx" in one_line(px("certify", dense, "nothing.onnx", *more))


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
    guarantee = ["--max-drop", 0.3, "--risk", "disagreement", "--part", "confident", "--coverage", 0.6]
    told = json.loads(px("certify", certified[0], *guarantee, "--json").out)
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
    guarantee = ["--max-drop", 0.35, "--risk", "disagreement", "--part", "classes"]
    told = json.loads(px("certify", certified[0], *guarantee, "--json").out)
    logits, labels = _outputs(certified[0], images)
    differ = logits["dense certify"].argmax(1) != logits["model certify"].argmax(1)
    expected = [(f"class{place}", 15, differ[labels["certify"] == place].sum()) for place in range(CLASSES)]
    assert [(each["name"], each["n"], each["errors"]) for each in told["rows"][1]["classes"]] == expected
    worst = max(expected, key=lambda each: each[2])
    assert told["rows"][1]["p_value"] == pytest.approx(binom.cdf(worst[2], 15, 0.35))
    assert f"in each of the {CLASSES} classes" in told["sentence"]
    table = px("certify", certified[0], *guarantee)
    assert table.code == (0 if told["chosen"] else 3)
    assert f"{worst[2]} of 15 in '{worst[0]}'" in table.out
    assert f"the weakest of {CLASSES} classes (by true label)" in table.out


def test_an_anytime_test_leaves_samples_to_the_next(
    px: Px, certified: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PXCOMPRESS_CACHE", str(tmp_path))
    command = ["certify", certified[0], "--max-drop", 0.6, "--anytime"]
    first, second = (json.loads(px(*command, "--json").out) for _ in range(2))
    assert (first["bound"], first["delta"], first["budget"]["lost"]) == ("e-process", 0.025, False)
    assert 0 < first["n"] == first["budget"]["ends"] == second["budget"]["begins"] < 75
    assert "'confident' is given with --anytime" in one_line(px(*command, "--part", "confident"))
    assert "no table" in one_line(px(*command, "--group", "camera"))
    assert "LEFT for other tests" in px(*command[:2], "--max-drop", 0.7, "--anytime").out


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
    guarantee = ["--max-drop", 0.4, "--part", "confident", "--coverage", 0.1]
    outcome = px("certify", certified[0], "--data", tmp_path, *guarantee)
    assert outcome.code == 3
    assert "Not certified: the dense model stays." in outcome.out
    assert "lost 0 of 0 samples (p = 1; it takes at least 6 samples)" in outcome.out


@pytest.mark.parametrize(
    ("provider", "expected"), [("auto", "cpu"), ("cpu", "cpu"), ("cuda", "cpu"), ("openvino", "openvino")]
)
def test_certificates_are_made_on_a_cpu_that_everybody_has(provider: str, expected: str) -> None:
    """Whatever else times were measured on: `verify` has to find the same losses on any machine."""
    if provider != "auto" and explain_failure(provider):
        pytest.skip(f"{provider} is not here")
    assert choose_provider(provider) == expected
