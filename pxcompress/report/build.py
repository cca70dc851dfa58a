"""report.json: the report's fields as they are named in `proof.Report`, nested records as objects."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pxcompress.errors import InputError, short, unknown
from pxcompress.proof import Report

SCHEMA_VERSION = 1

_PLAIN: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), float: (int, float), bool: (bool,)}
"""What JSON may hold where a field has this type."""

_SHARES = ("top1", "top1_after", "agreement", "top1_agreement", "removed")
_SIGNED = ("top1_drop", "cosine", "rank_correlation", "unrelated")
"""Fields with a number from 0 to 1, and with one that may be below 0, as no other may."""


def to_json(report: Report) -> str:
    """report.json as ASCII text, `schema_version` first. Raises `ValueError` for NaN and infinity: JSON lacks them."""
    content = {"schema_version": report.schema_version, **dataclasses.asdict(report)}
    return json.dumps(content, indent=1, allow_nan=False)


def from_json(text: str) -> Report:
    """The report that `to_json` wrote. `InputError` names the key that is unknown, missing or of the wrong type."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is not a report.json ({error}); give one that pxcompress wrote") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"schema_version is {version!r}; expected {SCHEMA_VERSION}: read it with the pxcompress that wrote it"
        )
    report: Report = _decode(Report, content, "report")
    return report


def read_report(folder: Path) -> Report:
    """The report of a run folder. Raises as `from_json` does, and where there is none."""
    try:
        return from_json((folder / "report.json").read_text())
    except OSError as error:
        raise InputError(f"{str(folder)!r} is not a run folder ({error.strerror}: report.json); give one") from error
    except UnicodeDecodeError as error:
        raise InputError(f"report.json of {str(folder)!r} is no text ({error.reason}); run again") from error


@contextmanager
def as_written(*folders: Path, file: str = "report.json") -> Iterator[None]:
    """Raise `InputError` where a view fails on a report's recipe, plan or certificate, which nobody checks before."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{file} of {' or '.join(map(repr, map(str, folders)))} is not as a run wrote it "
            f"({type(error).__name__}: {error}); run again"
        ) from error


def check_files(folder: Path, sha256: Mapping[str, str]) -> None:
    """Raise `InputError` where a file of a run folder is not the one that had this hash; files may be missing."""
    for name, digest in sha256.items():
        file = folder / name
        if file.parent != folder:
            raise InputError(f"report.json of {str(folder)!r} names {name!r}, which is not in the folder; run again")
        if file.is_file() and sha256_of(file) != digest:
            raise InputError(
                f"{str(file)!r} is not the file that the run wrote: its sha256 is not that in report.json; run again"
            )


def sha256_of(path: Path) -> str:
    """Hash of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _decode(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`: records and tuples of them; everything else stays as JSON gave it."""
    if isinstance(hint, types.UnionType):  # something or None
        return None if value is None else _decode(typing.get_args(hint)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        _expect(value, (list,), where)
        element = typing.get_args(hint)[0]
        return tuple(_decode(element, item, f"{where}[{place}]") for place, item in enumerate(value))
    if typing.get_origin(hint) is Mapping:
        _expect(value, (dict,), where)
    if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
        raise unknown(where, str(value), typing.get_args(hint))
    if hint in _PLAIN:
        _expect(value, _PLAIN[hint], where)
    return value


def _record(cls: type, value: Any, where: str) -> Any:
    _expect(value, (dict,), where)
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in hints:
            raise unknown(f"key of {where}", key, hints)
    for field in dataclasses.fields(cls):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in value:
            raise InputError(f"{where} lacks {field.name!r}; expected a report.json that pxcompress wrote")
    values = {key: _decode(hints[key], item, f"{where}.{key}") for key, item in value.items()}
    for key, item in values.items():
        if isinstance(item, int | float):
            _expect_range(key, item, f"{where}.{key}")
    return cls(**values)


def _expect_range(key: str, value: float, where: str) -> None:
    """Raise `InputError` for a number that no run writes under this key."""
    low, high = -math.inf if key in _SIGNED else 0, 1 if key in _SHARES else math.inf
    if not (low <= value <= high and abs(value) <= sys.float_info.max):
        expected = "a share from 0 to 1" if key in _SHARES else "a number" if key in _SIGNED else "0 or more"
        raise InputError(f"{where} is {short(value, 20)}; expected {expected}, as pxcompress writes it")


def _expect(value: Any, kinds: tuple[type, ...], where: str) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{where} is {type(value).__name__}; expected {expected} as pxcompress writes it")
