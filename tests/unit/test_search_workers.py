"""Several processes on one search: no trial is lost or done twice, and that of a dead worker is done again."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from command import image_folder
from models import CLASSES, FlattenCNN
from safetensors.torch import save_file

from pxcompress.search.storage import open_storage
from pxcompress.search.study import JOB, quiet
from pxcompress.state import seeded

pytestmark = pytest.mark.slow

TRIALS, DEADLY, SIZE = 30, 9, 16

WORKER = f"""
DEADLY = {DEADLY}
import os, signal, sys
from pxcompress import cli
from pxcompress.search import run, storage, study
study.HEARTBEAT = storage.HEARTBEAT = 1
study.GRACE = storage.GRACE = 15
measure = run.Search.measure
def once(self, trial, recipe, **more):
    if trial.user_attrs[study.JOB] == DEADLY and trial.study.study_name.count("-") == 1:
        try:
            os.close(os.open(os.environ["MARK"], os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
    return measure(self, trial, recipe, **more)
run.Search.measure = once
cli.main()
"""
"""The command with quick heartbeats. Who begins one certain job first is gone in that moment, as by `kill -9`."""


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("workers")
    images = image_folder(folder / "images", {"train": 24, "val": 12}, CLASSES, SIZE)
    weights = folder / "flatten.safetensors"
    with seeded(1):
        save_file(FlattenCNN().state_dict(), weights)
    args = ["--model", "models:FlattenCNN", "--ratio", "0.5", "--round-to", "1", "--data", str(images)]
    return [*args, "--checkpoint", str(weights), "--input-size", str(SIZE), "--sampler", "random"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a database of a PostgreSQL server that lives as long as this module's tests."""
    programs = {name: shutil.which(name) for name in ("initdb", "pg_ctl")}
    if None in programs.values():
        pytest.skip("no PostgreSQL server here: initdb or pg_ctl is not on the PATH")
    pytest.importorskip("psycopg", reason="psycopg, which reaches PostgreSQL, is not installed")
    names = [entry.pw_name for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody")]
    user = names[0] if os.geteuid() == 0 and names else None  # the server refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="pxcompress-postgres-"))
    if user:
        shutil.chown(folder, user)
    port, data = _free_port(), folder / "data"

    def call(*words: str) -> None:
        subprocess.run(words, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, timeout=120)

    call(str(programs["initdb"]), "-D", str(data), "-U", "px", "-A", "trust", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    try:
        call(str(programs["pg_ctl"]), "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
        yield f"postgresql+psycopg://px@127.0.0.1:{port}/postgres"
    finally:
        call(str(programs["pg_ctl"]), "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder)


def _start(subject: list[str], out: Path, storage: str) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, str(Path(tests).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "MARK": str(out.parent / "one-has-died")}
    words = [sys.executable, "-c", WORKER, "search", *subject, "--trials", str(TRIALS), "--json", "--out", str(out)]
    words += ["--storage", storage]
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _check(storage: str, contents: list[dict[str, Any]]) -> None:
    """Each job once, the dead worker's twice, and all workers with the same result."""
    with quiet():
        kept = open_storage(storage)
    for summary in optuna.get_all_study_summaries(kept):
        trials = optuna.load_study(study_name=summary.study_name, storage=kept).trials
        done = [each.user_attrs[JOB] for each in trials if each.state.is_finished() and each.values]
        is_search = summary.study_name.count("-") == 1
        others = 6 if summary.study_name.endswith("-baselines") else len(contents[0]["finals"])
        assert sorted(done) == list(range(TRIALS if is_search else others))
        lost = [each for each in trials if each.state == optuna.trial.TrialState.FAIL and JOB in each.user_attrs]
        assert [each.user_attrs[JOB] for each in lost] == ([DEADLY] if is_search else [])
        for each in lost:
            again = next(other for other in trials if other.values and other.user_attrs[JOB] == each.user_attrs[JOB])
            assert again.params == each.params
    assert all(content[key] == contents[0][key] for content in contents for key in ("trials", "finals", "best"))


@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgres"])
def test_three_workers_one_of_which_dies(
    subject: list[str], tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    places = {"sqlite": f"sqlite:///{tmp_path}/shared.db", "journal": f"journal:{tmp_path}/shared.log"}
    storage = places.get(kind) or request.getfixturevalue("postgres")
    workers = [_start(subject, tmp_path / str(place), storage) for place in range(3)]
    ends = [worker.communicate(timeout=400) for worker in workers]
    assert sorted(worker.returncode for worker in workers) == [-signal.SIGKILL, 0, 0], ends
    _check(storage, [json.loads(out) for out, _ in ends if out])


@pytest.mark.parametrize("kind", ["sqlite:///{}/alone.db", "journal:{}/alone.log"])
def test_a_killed_search_goes_on(subject: list[str], tmp_path: Path, kind: str) -> None:
    storage = kind.format(tmp_path)
    first = _start(subject, tmp_path / "out", storage)
    first.communicate(timeout=400)
    assert first.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "composite.json").exists()
    second = _start(subject, tmp_path / "out", storage)
    out, err = second.communicate(timeout=400)
    assert second.returncode == 0, err
    _check(storage, [json.loads(out)])
