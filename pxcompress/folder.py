"""A run folder is written whole or not at all: built beside its final place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pxcompress.errors import InputError


def safe_name(text: str) -> str:
    """`text` with everything that a file may not be called turned into "_"."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)


MARK = "recipe.json"
"""The file by which a folder is known as one of ours, so that only such a folder is ever replaced."""


def check_place(path: Path, force: bool) -> None:
    """Raise `InputError`, before any work, where the run folder `path` could not be put."""
    if path.exists():
        if not force:
            raise InputError(
                f"output folder {str(path)!r} exists; add --force to replace it, or choose another with --out"
            )
        if not path.is_dir() or (any(path.iterdir()) and not (path / MARK).is_file()):
            raise InputError(f"{str(path)!r} is not a run folder, so --force does not replace it; choose another --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pxcompress-", dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {str(path.parent)!r} ({error.strerror}); choose another place with --out"
        ) from error


def _readable(folder: Path) -> None:
    """Give a temporary folder and the files in it the modes that others would have got."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextmanager
def whole_folder(path: Path, force: bool) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends well and vanishes, Ctrl-C included, when it does not."""
    check_place(path, force)
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield building
        _readable(building)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
            path.rename(old / path.name)
            building.rename(path)
            shutil.rmtree(old)
        else:
            building.rename(path)
    finally:
        shutil.rmtree(building, ignore_errors=True)
