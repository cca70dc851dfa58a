"""The folder where pxcompress keeps what it can make again: generated images, trained baselines, checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pxcompress.errors import InputError


def cache_dir() -> Path:
    """The cache folder: the environment variable `PXCOMPRESS_CACHE`, else `~/.cache/pxcompress`. It is made if missing.

    Raises `InputError` where the folder cannot be made.
    """
    cache_setting = os.environ.get("PXCOMPRESS_CACHE")
    folder = Path(cache_setting) if cache_setting else Path.home() / ".cache" / "pxcompress"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the cache folder '{folder}' ({error.strerror}); "
            "set PXCOMPRESS_CACHE to a folder that can be written"
        ) from error
    return folder


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A context with a temporary path beside `path`: renamed to `path` if the block ends well, else deleted.

    The folder of `path` is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary_path
        temporary_path.replace(path)
    finally:
        temporary_path.unlink(missing_ok=True)
