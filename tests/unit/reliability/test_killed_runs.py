"""Runs that are killed, that find the disk full, or another run at their place."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from command import Px, one_line
from filelock import FileLock

from pxcompress.errors import InputError
from pxcompress.run_folder.place import whole_folder

KILLS = 20


def _started(*words: str, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PXCOMPRESS_CACHE": str(cache)}
    args = [sys.executable, "-m", "pxcompress", *words]
    return subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def _visible(place: Path) -> list[str]:
    return [path.name for path in place.iterdir() if not path.name.startswith(".")]


# --- killed, disk full, read-only -------------------------------------------------------------------------------------


def test_a_killed_run_leaves_no_folder_and_the_next_one_cleans_up(
    px: Px, run_options: list[str], cache: Path, tmp_path: Path
) -> None:
    with _started("run", *run_options, "--out", str(tmp_path / "run"), cache=cache) as process:
        assert process.stderr is not None
        assert any(line.startswith("score ") for line in process.stderr)
        process.kill()
    assert _visible(tmp_path) == []
    assert list(tmp_path.iterdir()) != []  # it was killed on its way
    assert px("run", *run_options, "--out", tmp_path / "run", "--quiet").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert px("report", tmp_path / "run").code == 0


@pytest.mark.slow
def test_runs_killed_at_random_moments(px: Px, tmp_path: Path) -> None:
    """With a baseline that is trained and images that are made, and so with a cache that fills."""
    cache, out, rng = tmp_path / "cache", tmp_path / "runs" / "run", random.Random(0)
    words = [
        "run",
        "--model",
        "models:AnyClasses",
        "--data",
        "glyphs:train=640,select=80,held_out=160",
        "--ratio",
        "0.5",
    ]
    words += ["--round-to", "1", "--out", str(out), "--quiet"]
    begin = time.monotonic()
    with _started(*words, cache=cache) as process:
        assert process.wait() == 0
    whole = time.monotonic() - begin
    plan = (out / "plan.json").read_bytes()
    for kill in range(KILLS):
        if kill % 2:
            shutil.rmtree(out, ignore_errors=True)
        if kill % 5 == 0:
            shutil.rmtree(cache)
        with _started(*words, "--force", cache=cache) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, whole))
            process.kill()
        if out.exists():
            assert px("report", out).code == 0  # whole: the one before, or the new one
            assert (out / "plan.json").read_bytes() == plan
    with _started(*words, "--force", cache=cache) as process:
        _, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert (out / "plan.json").read_bytes() == plan
    assert [path.name for path in out.parent.iterdir()] == ["run"]


def test_a_file_that_cannot_be_written_ends_a_run_in_one_line(px: Px, run_options: list[str], tmp_path: Path) -> None:
    """A limit on the size of files, since a full disk takes rights to make one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        outcome = px("run", *run_options, "--out", tmp_path / "run", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "nothing was written" in one_line(outcome)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="no mounts of one's own on this machine",
)
@pytest.mark.parametrize("options", ["size=8k", "size=24k", "size=32k", "ro"])
def test_a_full_disk_and_a_read_only_one(run_options: list[str], cache: Path, tmp_path: Path, options: str) -> None:
    words = [sys.executable, "-m", "pxcompress", "run", *run_options, "--out", str(tmp_path / "run"), "--quiet"]
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && "$@"; code=$?; ls -A "$0"; exit $code'
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    args = ["unshare", "-rm", "sh", "-c", script, str(tmp_path), *words]
    done = subprocess.run(args, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


# --- two at once ------------------------------------------------------------------------------------------------------


def test_the_second_run_into_a_place_is_refused(px: Px, run_options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with whole_folder(out, force=False) as building:
        (building / "recipe.json").write_text("{}")
        assert "another run is writing" in one_line(px("run", *run_options, "--out", out, "--quiet"))
        with pytest.raises(InputError, match="another run is writing"), whole_folder(out, force=True):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in out.iterdir()] == ["recipe.json"]


def test_a_claim_that_is_made_while_another_ends_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends takes its own lock file away, never the one of whoever comes next."""
    place, release = tmp_path / "run", FileLock.release
    with ExitStack() as next_run:

        def release_and_let_the_next_one_in(lock: FileLock, force: bool = False) -> None:
            release(lock, force=force)
            monkeypatch.undo()
            next_run.enter_context(whole_folder(place, force=True))

        with whole_folder(place, force=False) as building:
            (building / "recipe.json").write_text("{}")
            monkeypatch.setattr(FileLock, "release", release_and_let_the_next_one_in)
        with pytest.raises(InputError, match="another run is writing"), whole_folder(place, force=True):
            pass


def test_a_run_that_ended_just_before_the_claim_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that was free when it was first looked at may be taken once this run has it to itself."""
    place, acquire = tmp_path / "run", FileLock.acquire

    def acquire_after_another_run(lock: FileLock) -> object:
        monkeypatch.undo()
        with whole_folder(place, force=False) as building:
            (building / "recipe.json").write_text("the first")
        return acquire(lock)

    monkeypatch.setattr(FileLock, "acquire", acquire_after_another_run)
    with pytest.raises(InputError, match="exists"), whole_folder(place, force=False):
        pass
    assert (place / "recipe.json").read_text() == "the first"


@pytest.mark.slow
def test_of_two_runs_at_once_one_wins(run_options: list[str], cache: Path, tmp_path: Path) -> None:
    words = ["run", *run_options, "--out", str(tmp_path / "run"), "--quiet"]
    both = [_started(*words, cache=cache) for _ in range(2)]
    messages = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    assert len("".join(messages).splitlines()) == 1
    assert "another run" in "".join(messages) or "exists" in "".join(messages)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
