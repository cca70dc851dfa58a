"""SHA256SUMS: the digests of all files of a run folder, as `sha256sum --check SHA256SUMS` reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pxcompress.cache import whole_file
from pxcompress.checks import read_text
from pxcompress.errors import InputError
from pxcompress.report.build import sha256_of

SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Write the digests of all files in and below `folder`."""
    _write(folder, {_name(folder, file): sha256_of(file) for file in folder.rglob("*") if file.is_file()})


def update_sums(folder: Path, files: Iterable[Path]) -> None:
    """Enter files below `folder` that a later command wrote; nothing where the folder has no digests.

    Files that were altered otherwise keep the digest that they had.
    """
    if not (folder / SUMS).is_file():
        return
    digests = {name: digest for name, digest in _read(folder).items() if (folder / name).is_file()}
    _write(folder, digests | {_name(folder, file): sha256_of(file) for file in files})


def find_altered_files(folder: Path) -> list[str]:
    """Names of the files that are not those with these digests; some may be missing. Raises `InputError`."""
    digests = _read(folder)
    return [name for name in digests if (folder / name).is_file() and sha256_of(folder / name) != digests[name]]


def find_missing_files(folder: Path) -> list[str]:
    """Names of the files that have a digest and are not there any more. Raises `InputError`."""
    return [name for name in _read(folder) if not (folder / name).is_file()]


def _name(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _write(folder: Path, digests: dict[str, str]) -> None:
    lines = [f"{digests[name]}  {name}\n" for name in sorted(digests) if name != SUMS]
    with whole_file(folder / SUMS) as beside:
        beside.write_text("".join(lines))


def _read(folder: Path) -> dict[str, str]:
    text = read_text(folder / SUMS, "altered files cannot be told")
    lines = [line.partition("  ") for line in text.removesuffix("\n").split("\n")]
    if not text.endswith("\n") or not all(len(digest) == 64 and name for digest, _, name in lines):
        raise InputError(f"{SUMS} of {str(folder)!r} is not as pxcompress writes it; altered files cannot be told")
    return {name: digest for digest, _, name in lines}
