"""Checks of records made of plain values: recipes, and what is read back from JSON."""

from __future__ import annotations

import csv
import functools
import io
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pxcompress.errors import InputError, short, unknown
from pxcompress.registry import as_text

T = TypeVar("T")


def read_record(cls: type[T], text: str, source: str) -> T:
    """An instance of the dataclass `cls`, read from a JSON `text`; every key must be one of its fields.

    Raises `InputError`, which names `source` and the key whose value is missing, unknown or of another type.
    """
    try:
        return TypeAdapter(cls).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in details["loc"])
        value = "" if details["type"] == "missing" or not place else f", not {short(repr(details['input']), 40)}"
        problem = f"{place or 'the text'}: {_plain(details['msg'])}{value}"
        raise not_as_written(source, problem) from error


def read_text(path: Path, advice: str) -> str:
    """The text of a file in UTF-8; `InputError`, which ends in `advice`, where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r} cannot be read ({reason}); {advice}") from error


def split_csv(text: str) -> Iterator[list[str]]:
    """The cells of every line of a CSV text, also where spreadsheets separate columns by semicolons or tabs."""
    header = text.partition("\n")[0]
    return csv.reader(io.StringIO(text), delimiter=max(",;\t", key=header.count))


def read_record_file(cls: type[T], path: Path, advice: str) -> T:
    """The record that the JSON file `path` holds; raises as `read_text` and `read_record` do."""
    return read_record(cls, read_text(path, advice), repr(str(path)))


def not_as_written(file_name: str, problem: str) -> InputError:
    """The error for a file `file_name` whose content was changed, or is of another version."""
    return InputError(f"{file_name} is not as pxcompress writes it ({problem}); give another, or make it anew")


def check_types(record: Any, part: type | None = None) -> None:
    """Raise `InputError` for a field whose value is not of its declared type; whole numbers are accepted as floats.

    With `part`, a base class, only the fields of that class are checked. A list becomes a tuple, so that the record can
    be hashed, and a method that is given as an object becomes its text.
    """
    cls = part or type(record)
    hints = typing.get_type_hints(cls)
    for name in (field.name for field in fields(cls)):
        value = getattr(record, name)
        value = tuple(map(as_text, value)) if isinstance(value, list | tuple) else as_text(value)
        object.__setattr__(record, name, value)
        try:
            _adapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            expectation = _plain(error.errors(include_url=False)[0]["msg"])
            raise InputError(f"{name.replace('_', '-')} is {value!r}; {expectation}") from error


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def _plain(message: str) -> str:
    """A message of pydantic in the words of this package."""
    return message.replace("Input should be", "expected").replace("Field required", "it is missing")


def check_keys(cls: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` as a dict; `InputError` for a key that the dataclass `cls` has no field for."""
    names = [field.name for field in fields(cls)]
    for key in content:
        if key not in names:
            raise unknown("recipe key", key, names)
    return dict(content)


def make_file_name(text: str) -> str:
    """`text` with every character that may be unsafe in a file name replaced by "_"."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)
