"""Writes a run folder whole or not at all: it is built beside its final place by one process, then renamed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pxcompress.errors import InputError
from pxcompress.run_folder.names import RECIPE


def check_place(path: Path, force: bool) -> None:
    """Raise `InputError`, before any work, if the run folder cannot be written at `path`."""
    if path.exists():
        if not force:
            raise InputError(
                f"output folder {str(path)!r} exists; add --force to replace it, or choose another with --out"
            )
        if not path.is_dir() or (any(path.iterdir()) and not (path / RECIPE).is_file()):
            raise InputError(f"{str(path)!r} is not a run folder, so --force does not replace it; choose another --out")
    with name_unwritable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        _try_writing(path.parent)


def check_folder(folder: Path) -> None:
    """Raise `InputError`, before any work, if files cannot be added to `folder`, which need not exist.

    Nor may it be a run folder: its files have digests that would no longer be theirs.
    """
    if (folder / RECIPE).is_file():
        raise InputError(f"{str(folder)!r} is a run folder, to which nothing is added; choose another folder")
    with name_unwritable(folder):
        _try_writing(next(place for place in (folder, *folder.parents) if place.exists()))


@contextmanager
def name_unwritable(folder: Path) -> Iterator[None]:
    """A context that turns errors of the operating system into an `InputError`: `folder` cannot be written to."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {str(folder)!r} ({error.strerror}); choose another place, or make room there"
        ) from error


def _try_writing(folder: Path) -> None:
    """Make a folder in `folder`, and remove it. Raises `OSError`."""
    with tempfile.TemporaryDirectory(prefix=".pxcompress-", dir=folder):
        pass


@contextmanager
def whole_folder(path: Path, force: bool) -> Iterator[Path]:
    """A context with a folder to fill: renamed to `path` if the block ends well, removed if it does not.

    Ctrl-C counts as not well. What a killed process left is removed by the next one. Raises `InputError` if another
    process is writing `path`.
    """
    check_place(path, force)
    with _claim(path):
        check_place(path, force)  # again: another run may have ended before this one had the place to itself
        building, replaced = (path.with_name(f".{path.name}.{kind}") for kind in ("building", "old"))
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            yield building
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                path.rename(replaced)
            building.rename(path)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _claim(path: Path) -> Iterator[None]:
    """A context in which no other process may write `path`; raises `InputError` if one already does."""
    lock = FileLock(path.with_name(f".{path.name}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another run is writing {str(path)!r}; wait until it has ended, or choose another place with --out"
        ) from error
    except OSError:  # some file systems of clusters have no locks; a single run must work there, too
        pass
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
