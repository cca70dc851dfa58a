"""Checks of records made of plain values, such as recipes read from a file."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pxcompress.errors import InputError, unknown


def check_types(record: Any) -> None:
    """Raise `InputError` for a field whose value is not of its declared type; whole numbers pass as floats."""
    hints = typing.get_type_hints(type(record))
    for name in (field.name for field in fields(record)):
        value, hint = getattr(record, name), hints[name]
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not any(_is_a(value, kind) for kind in allowed):
            expected = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in allowed)
            raise InputError(f"{name.replace('_', '-')} is {value!r}; expected {expected}")


def _is_a(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def known_keys(cls: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` as a dict; `InputError` for a key that the dataclass `cls` has no field for."""
    known = [field.name for field in fields(cls)]
    for key in content:
        if key not in known:
            raise unknown("recipe key", key, known)
    return dict(content)


def safe_name(text: str) -> str:
    """`text` with everything that a file may not be called turned into "_"."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)
