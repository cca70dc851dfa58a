"""The command line as a user meets it: one run on the user's own images, and every wrong input in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from command import Outcome, Px, call_once, image_folder, one_line
from models import CLASSES, FlattenCNN
from safetensors.torch import load_file, save_file

import pxcompress
from pxcompress.commands.options import recipe_of
from pxcompress.deploy.converters import CONVERTERS, Predict, Source
from pxcompress.deploy.runtime import open_session
from pxcompress.errors import InputError
from pxcompress.report.build import from_json
from pxcompress.state import seeded

MODEL = "models:FlattenCNN"
SIZE = 16
ADVICE = "ask for less speed, or measure on a quiet machine"


ARTEFACTS = {
    "model.onnx",
    "dense.onnx",
    "model.safetensors",
    "recipe.json",
    "plan.json",
    "scores.safetensors",
    "served.txt",
    "report.json",
    "report.html",
    "SHA256SUMS",
    "predict.py",
}


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with train/ and val/: noise around a colour of the class."""
    return image_folder(tmp_path_factory.mktemp("images"), {"train": 24, "val": 12}, CLASSES, SIZE)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a `FlattenCNN`."""
    path = tmp_path_factory.mktemp("weights") / "flatten.safetensors"
    with seeded(1):
        save_file(FlattenCNN().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, images: Path, checkpoint: Path) -> tuple[Path, Outcome]:
    """One whole run."""
    out = tmp_path_factory.mktemp("runs") / "slim"
    options = ["--model", MODEL, "--ratio", 0.5, "--round-to", 1, "--data", images, "--checkpoint", checkpoint]
    return out, call_once("run", *options, "--input-size", SIZE, "--out", out)


def test_a_run_ends_with_a_verdict_and_a_whole_folder(finished: tuple[Path, Outcome]) -> None:
    folder, outcome = finished
    assert outcome.code == 0, outcome.err
    verdict, following = outcome.out.strip().splitlines()[-2:]
    assert verdict.endswith(f"{folder / 'model.onnx'}")
    assert following.startswith("next: ")
    assert {path.name for path in folder.iterdir()} == ARTEFACTS
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}
    assert "fold" in outcome.err
    assert "Traceback" not in outcome.err


def test_the_report_says_what_happened(finished: tuple[Path, Outcome]) -> None:
    folder, _ = finished
    report = from_json((folder / "report.json").read_text())
    assert report.schema_version == 1
    assert report.weights == "checkpoint"
    assert report.parity.passed
    assert report.parity.agreement == 1.0
    assert report.recipe.budget == report.plan.budget == "macs"
    assert 0.4 < report.ratios.macs <= 0.5
    assert report.pruned.params < report.dense.params
    assert report.pruned.macs < report.dense.macs
    assert report.pruned.onnx_bytes == (folder / "model.onnx").stat().st_size
    assert [stage.name for stage in report.stages][-3:] == ["export", "measure", "compare explanations"]
    assert report.explanations is not None
    assert report.explanations.samples == report.data.select
    assert {stage.name for stage in report.stages if stage.quality_after is not None} >= {"weights", "prune", "fold"}
    assert report.data.test + report.data.certify == 12 * CLASSES
    assert report.provider.got == "CPUExecutionProvider"
    assert report.provider.nodes_on_provider == report.provider.nodes_total > 0


def test_load_gives_the_model_that_was_exported(finished: tuple[Path, Outcome]) -> None:
    folder, _ = finished
    model = pxcompress.load(folder)
    inputs = torch.randn(3, 3, SIZE, SIZE)
    expected = open_session(folder / "model.onnx", "cpu").predict(inputs)
    with torch.no_grad():
        np.testing.assert_allclose(model(inputs).numpy(), expected, atol=1e-4)


def test_the_artefact_says_where_it_comes_from(finished: tuple[Path, Outcome]) -> None:
    folder, _ = finished
    facts = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
    recipe = pxcompress.Recipe.from_json((folder / "recipe.json").read_text())
    assert facts["recipe_sha256"] == recipe.hash
    assert facts["plan_sha256"] == hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
    assert (facts["pxcompress"], facts["model"], facts["pruned"]) == (pxcompress.__version__, MODEL, "yes")
    assert json.loads(facts["classes"]) == [f"class{label}" for label in range(CLASSES)]
    assert json.loads(facts["input_size"]) == [3, SIZE, SIZE]
    for key in ("input_mean", "input_std"):
        assert len(json.loads(facts[key])) == 3
    assert facts["interpolation"]
    assert 0 < json.loads(facts["crop"]) <= 1
    opset = onnx.load(folder / "model.onnx").opset_import[0].version
    assert from_json((folder / "report.json").read_text()).environment.onnx_opset == opset


@pytest.mark.slow
def test_a_run_for_a_fixed_batch(px: Px, finished: tuple[Path, Outcome], tmp_path: Path) -> None:
    """All files take four images and no other number; what is measured of them is what is measured of any batch."""
    folder, _ = finished
    place, options = tmp_path / "fixed", ["--fixed-batch", "--batch-size", 4, "--targets", "fp16,int8"]
    outcome = px("run", "--config", folder / "recipe.json", *options, "--out", place, "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    report, free = json.loads(outcome.out), json.loads((folder / "report.json").read_text())
    for name in ("dense", "model", "model.fp16", "model.int8"):
        assert open_session(place / f"{name}.onnx", "cpu").input.shape == (4, 3, SIZE, SIZE)
    for model in ("dense", "pruned"):
        assert report[model]["batch_size"] == 4
        assert report[model]["quality"] == free[model]["quality"]
    rows = json.loads(px("bench", place, "--provider", "cpu", "--json").out)
    assert [(row["batch_size"], row["precision"]) for row in rows] == [(4, p) for p in ("fp32", "fp32", "fp16", "int8")]


@dataclasses.dataclass(frozen=True)
class Copies:
    """An ecosystem whose files are ONNX files."""

    title: ClassVar[str] = "Copies"
    package: ClassVar[str] = "copies"
    suffix: ClassVar[str] = ".copy"
    round_to: ClassVar[int] = 32
    reads_onnx: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-3

    def explain_failure(self) -> str:
        return ""

    def convert(self, source: Source, path: Path) -> None:
        path.write_bytes(source.onnx.read_bytes())

    def open(self, path: Path) -> Predict:
        session = open_session(path, "cpu", threads=1)
        return lambda inputs: [session.predict(inputs)]


def test_a_run_is_handed_on_to_another_ecosystem(
    px: Px, finished: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(CONVERTERS, "_classes", {name: CONVERTERS.get(name) for name in CONVERTERS})
    CONVERTERS.register("copies")(Copies)
    folder, out = str(finished[0]), tmp_path / "handed.on"
    done = px("convert", folder, "--to", "copies", "--out", str(out), "--batch-size", "2")
    assert done.code == 0, done.err
    assert out.read_bytes() == (finished[0] / "model.onnx").read_bytes()
    assert f"input 2x3x{SIZE}x{SIZE} float32" in done.out
    assert "from PyTorch on 8 random inputs" in done.out
    assert "no multiple of 32, as Copies likes them; prune with --round-to 32 for it" in done.err
    content = json.loads(px("convert", folder, "--to", "copies", "--out", str(out), "--force", "--json").out)
    assert content["parity"]["passed"] is True
    assert content["bytes"] == out.stat().st_size
    for words, expected in (
        (("copies", "--out", str(out)), "exists; add --force"),
        (("copies", "--out", str(tmp_path / "x"), "--precision", "int8"), "run --targets int8"),
        (("copied",), "unknown ecosystem 'copied'; did you mean copies"),
    ):
        assert expected in one_line(px("convert", folder, "--to", *words))
    assert "give a run folder" in one_line(px("convert", str(tmp_path), "--to", "copies"))


def test_widths_may_be_as_an_ecosystem_likes_them() -> None:
    assert recipe_of({"model": "m", "ratio": 0.5, "round_to": "coreml"}, None).round_to == 32
    assert recipe_of({"model": "m", "ratio": 0.5, "round_to": "4"}, None).round_to == 4
    with pytest.raises(InputError, match="expected a whole number, or where the model goes: coreml, "):
        recipe_of({"model": "m", "ratio": 0.5, "round_to": "core"}, None)


def test_the_recipe_of_a_run_reproduces_it_also_where_a_goal_of_speed_is_missed(
    px: Px, finished: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same plan, scores, weights and network; metadata as well, since the recipe is the same.

    A missed goal is exit code 3 beside a whole folder and the table; when one is missed stands in test_measure.py.
    """
    folder, _ = finished
    again, missed = tmp_path / "again", "1.8x faster, 2x was asked for"
    monkeypatch.setattr("pxcompress.run_folder.results._describe_missed_goal", lambda goal, comparison: missed)
    outcome = px("run", "--config", folder / "recipe.json", "--out", again, "--quiet")
    assert (outcome.code, outcome.err) == (3, f"pxcompress: the goal is missed: {missed}; {ADVICE}\n")
    report = from_json((again / "report.json").read_text())
    assert report.missed == missed
    assert report.verdict in outcome.out
    for name in ("recipe.json", "plan.json", "dense.onnx", "model.onnx", "predict.py"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    for name in ("scores.safetensors", "model.safetensors"):
        tensors, expected = load_file(again / name), load_file(folder / name)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_the_same_seed_gives_the_same_plan_and_json_on_stdout_and_class_scores_come_along(
    px: Px, finished: tuple[Path, Outcome], images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder, _ = finished
    options = ["--model", MODEL, "--ratio", 0.5, "--round-to", 1, "--data", images, "--checkpoint", checkpoint]
    again = tmp_path / "again"
    outcome = px(
        "run",
        *options,
        "--input-size",
        SIZE,
        "--out",
        again,
        "--json",
        "--quiet",
        "--class-scores",
        "--targets",
        "fp16",
    )
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    report = json.loads(outcome.out)
    assert report["schema_version"] == 1
    assert (again / "plan.json").read_bytes() == (folder / "plan.json").read_bytes()
    assert {path.name for path in again.iterdir()} == {*ARTEFACTS, "class_scores.safetensors", "model.fp16.onnx"}
    scores, by_class = load_file(again / "scores.safetensors"), load_file(again / "class_scores.safetensors")
    assert {name: values.shape for name, values in by_class.items()} == {
        name: (CLASSES, len(values)) for name, values in scores.items()
    }
    assert [row["name"] for row in report["class_shares"]] == list(report["data"]["classes"])
    assert sum(row["samples"] for row in report["class_shares"]) == report["data"]["score"]
    assert all(0 < row["removed"] < 1 for row in report["class_shares"])
    assert [row["file"] for row in report["targets"]] == ["dense.onnx", "model.onnx", "model.fp16.onnx"]
    for row, headline in zip(report["targets"], (report["dense"], report["pruned"]), strict=False):
        assert row["latency_ms"] == headline["latency_ms"]  # measured once
    assert report["targets"][1]["speedup"] == report["speedup"]
    assert report["speedup"]["ratio"] == pytest.approx(report["ratios"]["speedup_p50"])


def test_an_existing_folder_is_refused_and_a_foreign_one_is_never_replaced(
    px: Px, finished: tuple[Path, Outcome], tmp_path: Path
) -> None:
    folder, _ = finished
    before = sorted(path.name for path in folder.iterdir())
    assert "--force" in one_line(px("run", "--model", MODEL, "--ratio", 0.5, "--out", folder, "--quiet"))
    assert sorted(path.name for path in folder.iterdir()) == before
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "not a run folder" in one_line(
        px("run", "--model", MODEL, "--ratio", 0.5, "--out", tmp_path, "--force", "--quiet")
    )
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet5O", "--ratio", 0.5], "resnet50"),
        (["--model", "resnet18", "--ratio", 1.5], "between 0 and 1"),
        (["--model", "resnet18", "--ratio", 0], "between 0 and 1"),
        (["--model", "resnet18", "--ratio", "nan"], "between 0 and 1"),
        (["--model", "resnet18", "--ratio", 0.5, "--score", "lpr"], "lrp"),
        (["--model", "resnet18", "--ratio", 0.5, "--score", "magnitude:q=1"], "'q'"),
        (["--model", "resnet18", "--ratio", 0.5, "--score", "lrp:composite=epsilonn"], "epsilon"),
        (["--model", "resnet18", "--ratio", 0.5, "--budget", "flops"], "macs"),
        (["--model", "resnet18", "--ratio", 0.5, "--repair", "prayer"], "fold"),
        (["--model", "resnet18", "--ratio", 0.5, "--normalise", "median"], "mean"),
        (["--model", "resnet18", "--ratio", 0.5, "--round-to", -1], "round-to"),
        (["--model", "resnet18", "--ratio", 0.5, "--batch-size", 0], "batch-size"),
        (["--model", "resnet18", "--ratio", 0.5, "--data", "/no/such/folder"], "/no/such/folder"),
        (["--model", "resnet18", "--ratio", 0.5, "--checkpoint", "/no/weights.pth"], "/no/weights.pth"),
        (["--model", "models:nothing", "--ratio", 0.5], "nothing"),
    ],
)
def test_wrong_input_getsone_line(px: Px, tmp_path: Path, options: list[object], message: str) -> None:
    assert message in one_line(px("run", *options, "--out", tmp_path / "out", "--quiet"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused_before_any_work(px: Px, tmp_path: Path) -> None:
    options = ["--model", "resnet50", "--ratio", 0.5, "--provider", "cuda", "--out", tmp_path / "out"]
    assert "cuda" in one_line(px("run", *options)).lower()
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_with_code_is_refused(px: Px, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap()))
    options = ["--model", "resnet18", "--ratio", 0.5, "--checkpoint", tmp_path / "trap.pth", "--quiet"]
    assert "code" in one_line(px("run", *options, "--out", tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"trap.pth"}


def test_an_unreachable_ratio_exits_3_with_the_largest_reachable_one(
    px: Px, images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    options = ["--model", MODEL, "--ratio", 0.999, "--data", images, "--checkpoint", checkpoint, "--quiet"]
    line = one_line(px("run", *options, "--input-size", SIZE, "--out", tmp_path / "out"), code=3)
    assert "largest reachable ratio" in line
    size = ["--only", "conv1", "--max-bytes", "2kB", *options[:2], *options[4:], "--input-size", SIZE]
    line = one_line(px("run", *size, "--out", tmp_path / "out"), code=3)
    whole = 4 * sum(value.numel() for value in FlattenCNN().parameters())
    numbers = re.search(r"leaves ([\d,]+) of ([\d,]+) bytes .*not to be, take ([\d,]+) alone", line)
    assert numbers, line
    least, dense, rest = (int(number.replace(",", "")) for number in numbers.groups())
    assert 2000 < rest < least < dense == whole
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said_at_once(px: Px, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in one_line(
        px("run", "--model", "resnet18", "--ratio", 0.5, "--out", tmp_path / "file" / "out", "--quiet")
    )


@pytest.mark.parametrize(
    ("number", "stage", "code", "word"),
    [(signal.SIGINT, "export", 130, "interrupted"), (signal.SIGTERM, "load", 143, "terminated")],
)
def test_runs_ended_by_a_signal_leave_nothing(
    tmp_path: Path, images: Path, checkpoint: Path, number: int, stage: str, code: int, word: str
) -> None:
    args = [sys.executable, "-m", "pxcompress", "run", "--model", MODEL, "--ratio", "0.5", "--data", str(images)]
    args += ["--checkpoint", str(checkpoint), "--input-size", str(SIZE), "--out", str(tmp_path / "runs" / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(f"{stage} ..."):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"pxcompress: {word}; no result was written; trials of a search")
    assert list((tmp_path / "runs").iterdir()) == []


def test_bench_times_any_classifier(px: Px, finished: tuple[Path, Outcome]) -> None:
    folder, _ = finished
    outcome = px("bench", folder / "model.onnx", folder / "dense.onnx", "--batch-size", "1,2", "--json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)
    assert [row["batch_size"] for row in rows] == [1, 1, 2, 2]
    assert "p50" in px("bench", folder / "model.onnx").out
    assert "whole numbers" in one_line(px("bench", folder / "model.onnx", "--batch-size", "two"))
    assert "nothing.onnx" in one_line(px("bench", "nothing.onnx"))
