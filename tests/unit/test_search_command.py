"""The search command as a user meets it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from command import Outcome, Px, image_folder, one_line
from models import CLASSES, FlattenCNN
from safetensors.torch import save_file

from pxcompress import pipeline
from pxcompress.commands.options import recipe_of
from pxcompress.errors import ResultError
from pxcompress.recipe import Recipe
from pxcompress.search.study import load_optuna
from pxcompress.state import seeded
from pxcompress.types import Batch

SIZE = 16


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A model with weights and images for it."""
    folder = tmp_path_factory.mktemp("search")
    images = image_folder(folder / "images", {"train": 24, "val": 12}, CLASSES, SIZE)
    weights = folder / "flatten.safetensors"
    with seeded(1):
        save_file(FlattenCNN().state_dict(), weights)
    fixed = ["--model", "models:FlattenCNN", "--ratio", "0.5", "--round-to", "1", "--budget", "macs"]
    return [*fixed, "--data", images, "--checkpoint", weights, "--input-size", SIZE]


def _search(px: Px, args: Sequence[object], out: Path, *more: object) -> Outcome:
    outcome = px("search", *args, "--out", out, *more)
    assert outcome.code == 0, outcome.err
    return outcome


def test_a_search_ends_with_a_table_and_a_composite_that_run_takes(px: Px, args: list[object], tmp_path: Path) -> None:
    out = tmp_path / "found"
    outcome = _search(px, args, out, "--trials", 14, "--sampler", "random")
    assert {path.name for path in out.iterdir()} == {"composite.json", "search.json", "search.html", "search.sqlite3"}
    content = json.loads((out / "search.json").read_text())
    best = content["best"]
    assert best["value"] == max(trial["value"] for trial in content["trials"])
    assert [trial["trial"] for trial in content["trials"]] == list(range(14))
    assert content["default"] == content["trials"][0]
    assert "repaired by fold, batchnorm; `run` measures the best one" in outcome.out
    assert re.search(r"trial 14: \d+\.\d\d%", outcome.err)
    command = shlex.split(outcome.out.strip().splitlines()[-1].removeprefix("next: "))
    assert command[:2] == ["pxcompress", "run"]
    assert command[command.index("--score") + 1] == f"@{out / 'composite.json'}"
    recipe = recipe_of({"model": "m", "ratio": 0.5, "scorer": f"@{out / 'composite.json'}"}, None)
    assert recipe.scorer == best["scorer"]
    page = (out / "search.html").read_text()
    assert page.isascii()
    assert page.count("<img") in (1, 2)
    assert not re.search(r"(src|href)=.(?!#|data:)", page)
    again = json.loads(_search(px, args, out, "--trials", 14, "--sampler", "random", "--json").out)
    assert again == content, "nothing is measured again"


class _Forbidden:
    def __iter__(self) -> Iterator[Batch]:
        raise RuntimeError("a search reads test or certify")


def test_test_and_certify_are_never_read(
    px: Px, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.load_workload

    def guarded(recipe: Recipe) -> Any:
        workload = real(recipe)
        splits = dataclasses.replace(workload.splits, test=_Forbidden(), certify=_Forbidden())
        return dataclasses.replace(workload, splits=splits)

    monkeypatch.setattr(pipeline, "load_workload", guarded)
    _search(px, args, tmp_path / "a", "--trials", 1)
    assert (tmp_path / "a" / "composite.json").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--objective", "px"], "did you mean pxp"),
        (["--sampler", "bayes"], "known: gp, random, tpe"),
        (["--trials", 0], "1 or more"),
        (["--score", "@nowhere.json"], "cannot be read"),
        (["--score", f"@{__file__}"], "composite.json"),
    ],
)
def test_wrong_input_is_one_line_before_any_work(
    px: Px, args: list[object], tmp_path: Path, more: list[object], message: str
) -> None:
    out = tmp_path / "never"
    assert message in one_line(px("search", *args, "--out", out, *more))
    assert not out.exists()


def test_places_and_storages_that_cannot_be_used(px: Px, args: list[object], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "something else" in one_line(px("search", *args, "--out", tmp_path))
    places = ["postgresql+psycopg://u:secret@127.0.0.1:1/none", "nonsense", "sqlite:////no/such/folder/x.db"]
    for storage in [*places, "oracle+nodriver://u:secret@h/x"]:
        line = one_line(px("search", *args, "--quiet", "--out", tmp_path / "o", "--storage", storage))
        assert "cannot be used" in line
        assert "secret" not in line
    config = tmp_path / "recipe.toml"
    config.write_text("rounds = 3\n")
    assert "--rounds" in one_line(px("search", *args, "--config", config, "--out", tmp_path / "o"))


def test_a_search_whose_trials_all_fail_says_why(
    px: Px, args: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> float:
        raise ResultError("it did not fit")

    monkeypatch.setattr("pxcompress.search.study.shipped_quality", fail)
    outcome = px("search", *args, "--quiet", "--out", tmp_path / "o", "--trials", 2)
    assert "no trial was measured to the end: it did not fit" in one_line(outcome)


WORKER = """
import os, signal
from pxcompress import cli
from pxcompress.search import study
study.BEAT, study.GRACE = 1, 10
measure = study.shipped_quality
def once(bench, recipe):
    if "zplus" in recipe.scorer:
        try:
            os.close(os.open(os.environ["MARK"], os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
    return measure(bench, recipe)
study.shipped_quality = once
cli.main()
"""
"""The command with quick heartbeats; who tries z+ first is gone in that moment, as by `kill -9`."""


@pytest.mark.slow
def test_the_trial_of_a_worker_that_died_is_done_again(args: list[object], tmp_path: Path) -> None:
    """Two workers go on after one was killed: they take up its trial, and all three share one study."""
    storage, trials = f"sqlite:///{tmp_path}/shared.db", 40
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, str(Path(tests).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "MARK": str(tmp_path / "one-has-died")}
    words = [sys.executable, "-c", WORKER, "search", *map(str, args), "--trials", str(trials), "--storage", storage]

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*words, "--sampler", "random", "--out", str(tmp_path / name)], env=environment)

    assert start("first").wait(timeout=400) == -signal.SIGKILL
    time.sleep(11)  # one second longer than a silent worker counts as alive
    assert [worker.wait(timeout=400) for worker in (start("second"), start("third"))] == [0, 0]
    with load_optuna(storage):
        (summary,) = optuna.get_all_study_summaries(storage)
        done = optuna.load_study(study_name=summary.study_name, storage=storage).trials
        again = [optuna.storages.RetryHeartbeatStaleTrialCallback.retried_trial_number(trial) for trial in done]
    (lost,) = [number for number in again if number is not None]
    retry = done[again.index(lost)]
    assert (done[lost].state.name, retry.state.name) == ("FAIL", "COMPLETE")
    assert retry.params == done[lost].params
    assert trials <= sum(trial.state.is_finished() for trial in done) <= trials + 2
