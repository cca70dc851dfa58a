"""Reads and writes report.json, whose keys are the fields of `record.Report`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pxcompress.checks import not_as_written, read_record, read_text
from pxcompress.errors import InputError
from pxcompress.report.record import Report


def to_json(report: Report) -> str:
    """The text of report.json, ASCII, `schema_version` first. Raises `ValueError` for NaN and infinity."""
    content = {"schema_version": report.schema_version, **dataclasses.asdict(report)}
    return json.dumps(content, indent=1, allow_nan=False)


def from_json(text: str, source: str = "report.json") -> Report:
    """Read a report that `to_json` wrote.

    `InputError` names the `source` of the text, and the key that is unknown, missing or of the wrong type.
    """
    report = read_record(Report, text, source)
    if report.metric.unit == "share":
        for name, quality in _list_qualities(report).items():
            if not 0 <= quality <= 1:
                raise not_as_written(source, f"{name}.quality.value: expected a share from 0 to 1, not {quality}")
    return report


def _list_qualities(report: Report) -> dict[str, float]:
    """The quality of every model in the report, by its key in the file."""
    qualities = {"dense": report.dense.quality, "pruned": report.pruned.quality}
    qualities |= {f"targets.{place}": of.quality for place, of in enumerate(report.targets)}
    return {name: quality.value for name, quality in qualities.items()}


def read_report(folder: Path) -> Report:
    """The report of a run folder. Raises as `from_json` does, and if there is none."""
    path = folder / "report.json"
    return from_json(read_text(path, "give a run folder"), repr(str(path)))


def check_files(folder: Path, sha256: Mapping[str, str]) -> None:
    """Raise `InputError` for a file of a run folder whose hash is not the recorded one; files may be missing."""
    for name, digest in sha256.items():
        file = folder / name
        if file.parent != folder:
            raise InputError(f"report.json of {str(folder)!r} names {name!r}, which is not in the folder; run again")
        if file.is_file() and sha256_of(file) != digest:
            raise InputError(
                f"{str(file)!r} is not the file that the run wrote: its sha256 is not that in report.json; run again"
            )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
