"""The command line as tests call it, in this process, with what it returned and printed; and images to give it."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from pxcompress import cli
from pxcompress.run_folder.sums import SUMS, find_altered_files


@dataclass(frozen=True)
class Outcome:
    """What a command returned and printed."""

    code: int
    out: str
    err: str


Px = Callable[..., Outcome]


def caller(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Px:
    """A function that runs the command line with its arguments."""

    def call(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pxcompress", *map(str, args)])
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        signal.signal(signal.SIGTERM, handler)
        out, err = capfd.readouterr()
        return Outcome(int(stop.value.code or 0), out, err)

    return call


def call_once(*args: object) -> Outcome:
    """The command line for a fixture that outlives a test, as pytest's `capfd` does not."""
    out, err = io.StringIO(), io.StringIO()

    class Captured:
        def readouterr(self) -> tuple[str, str]:
            return out.getvalue(), err.getvalue()

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        return caller(patch, Captured())(*args)  # type: ignore[arg-type]


def one_line(outcome: Outcome, code: int = 2) -> str:
    """The one line of a command that failed with `code` and printed nothing else."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("pxcompress: ")
    return lines[0]


def check_sums(folder: Path) -> None:
    """Every file of a run folder has its digest, and one byte more in any of them is noticed."""
    files = {path for path in folder.rglob("*") if path.is_file()} - {folder / SUMS}
    names = {file.relative_to(folder).as_posix() for file in files}
    assert {line.partition("  ")[2] for line in (folder / SUMS).read_text().splitlines()} == names
    assert find_altered_files(folder) == []
    for file in files:
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        assert find_altered_files(folder) == [file.relative_to(folder).as_posix()]
        file.write_bytes(before)


def image_folder(root: Path, counts: Mapping[str, int], classes: int, size: int) -> Path:
    """Fill `root` with images: part -> images of each class, noise around a colour of the class."""
    rng = np.random.default_rng(0)
    for part, count in counts.items():
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal(40 + 40 * label, 20, (size, size, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def shared_folder(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder that the first of pytest's workers to come here fills, and that all of them read."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, whole = root / name, root / f"{name}.whole"
    with FileLock(root / f"{name}.lock"):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fill(folder)
            whole.touch()
    return folder
