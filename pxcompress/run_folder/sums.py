"""SHA256SUMS: the sha256 of every file in a run folder, in the format of `sha256sum --check SHA256SUMS`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pxcompress.cache import whole_file
from pxcompress.checks import read_text
from pxcompress.errors import InputError
from pxcompress.report.build import sha256_of

SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS with the sha256 of all files in and below `folder`."""
    _write(folder, {_name(folder, file): sha256_of(file) for file in folder.rglob("*") if file.is_file()})


def update_sums(folder: Path, files: Iterable[Path]) -> None:
    """Update SHA256SUMS for files that a later command wrote; does nothing if the folder has no SHA256SUMS.

    Other files keep their recorded digests, so that changes to them still show; files that are missing are left out.
    """
    if not (folder / SUMS).is_file():
        return
    digests = {name: digest for name, digest in _read(folder).items() if (folder / name).is_file()}
    _write(folder, digests | {_name(folder, file): sha256_of(file) for file in files})


def find_altered_files(folder: Path) -> list[str]:
    """Names of existing files that differ from their sha256 in SHA256SUMS. Raises `InputError`."""
    digests = _read(folder)
    return [name for name in digests if (folder / name).is_file() and sha256_of(folder / name) != digests[name]]


def find_missing_files(folder: Path) -> list[str]:
    """Names of the files in SHA256SUMS that no longer exist. Raises `InputError`."""
    return [name for name in _read(folder) if not (folder / name).is_file()]


def _name(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _write(folder: Path, digests: dict[str, str]) -> None:
    lines = [f"{digests[name]}  {name}\n" for name in sorted(digests) if name != SUMS]
    with whole_file(folder / SUMS) as beside:
        beside.write_text("".join(lines), encoding="utf-8")


def _read(folder: Path) -> dict[str, str]:
    text = read_text(folder / SUMS, "altered files cannot be told")
    lines = [line.partition("  ") for line in text.removesuffix("\n").split("\n")]
    if not text.endswith("\n") or not all(len(digest) == 64 and name for digest, _, name in lines):
        raise InputError(f"{SUMS} of {str(folder)!r} is not as pxcompress writes it; altered files cannot be told")
    return {name: digest for digest, _, name in lines}
