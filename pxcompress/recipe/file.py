"""Reads recipes from files, .json, .toml or .yaml."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from pxcompress.checks import check_keys
from pxcompress.errors import InputError
from pxcompress.recipe.bench import Bench
from pxcompress.recipe.guarantee import Guarantee
from pxcompress.recipe.recipe import Recipe

_READERS: Mapping[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
}
"""Ending of a recipe file -> the function that parses it; all other files are JSON."""


ALIASES = {"score": "scorer"}
"""Names of options on the command line -> their fields, where they differ."""

PARTS: Mapping[str, type] = {"bench": Bench, "guarantee": Guarantee}
"""Keys of a recipe that hold records of options -> their classes."""


def read_recipe(path: Path) -> dict[str, Any]:
    """Keys and values of a recipe file, .json, .toml or .yaml, unchecked.

    Options may also stand as on the command line, without their parts. Raises `InputError` for other content.
    """
    parse = _READERS.get(path.suffix.lower(), json.loads)
    try:
        content = parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"config {str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"config {str(path)!r} is not a recipe ({reason}); expected .json, .toml or .yaml") from error
    if not isinstance(content, dict):
        raise InputError(f"config {str(path)!r} holds a {type(content).__name__}; expected keys as in recipe.json")
    return _arrange({str(key).removeprefix("--").replace("-", "_"): value for key, value in content.items()})


def _arrange(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name as keys of a recipe: those of its parts stand in the parts, and `score` is `scorer`."""
    content = {ALIASES.get(name, name): value for name, value in options.items()}
    for key, cls in PARTS.items():
        names = [field.name for field in fields(cls) if field.name in content]
        part = {name: content.pop(name) for name in names}
        if part and isinstance(content.setdefault(key, {}), dict):
            content[key] = {**content[key], **part}
    return check_keys(Recipe, content)
