"""Reads recipes from files, .json, .toml or .yaml."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from pxcompress.checks import check_keys
from pxcompress.errors import InputError
from pxcompress.recipe.recipe import Recipe

_READERS: Mapping[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
}
"""Ending of a recipe file -> the function that parses it; all other files are JSON."""


def read_recipe(path: Path) -> dict[str, Any]:
    """Keys and values of a recipe file, .json, .toml or .yaml, unchecked. Raises `InputError` for other content."""
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
    return check_keys(Recipe, {str(key).replace("-", "_"): value for key, value in content.items()})
