"""A run folder is written whole or not at all: built beside its final place by one process alone, then renamed."""

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
    """Raise `InputError`, before any work, where the run folder `path` could not be put."""
    if path.exists():
        if not force:
            raise InputError(
                f"output folder {str(path)!r} exists; add --force to replace it, or choose another with --out"
            )
        if not path.is_dir() or (any(path.iterdir()) and not (path / RECIPE).is_file()):
            raise InputError(f"{str(path)!r} is not a run folder, so --force does not replace it; choose another --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pxcompress-", dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {str(path.parent)!r} ({error.strerror}); choose another place with --out"
        ) from error


@contextmanager
def whole_folder(path: Path, force: bool) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends well and vanishes, Ctrl-C included, when it does not.

    What a killed process left goes with the next one. Raises `InputError` where another one is writing `path`.
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
    """One process at a time has `path`; the claim of one that was killed ends with it. `InputError` for the others."""
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
