"""The files of a search: what `run --score @...` and `--from` take, all rows, and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pxcompress.cache import whole_file
from pxcompress.errors import InputError
from pxcompress.report.search import front_file, search_page
from pxcompress.search.results import CHOICE, Row
from pxcompress.search.space import Value

COMPOSITE, RESULT, PAGE, STORAGE = "composite.json", "search.json", "search.html", "search.sqlite3"

_MADE_BY = ("version", "objective", "ratios", "labels", "sampler", "weights", "samples", "study", "recipe")


def write(out: Path, content: Mapping[str, Any]) -> None:
    """Every file whole, from what search.json holds; several workers write the same."""
    out.mkdir(parents=True, exist_ok=True)
    composite = out / COMPOSITE
    front = [] if content["pareto"] is None else content["pareto"]["front"]
    files = {composite: _composite(content["best"], content)}
    files |= {out / front_file(place): _composite(row, content) for place, row in enumerate(front, 1)}
    files |= {out / RESULT: _json(content), out / PAGE: search_page(content, str(composite))}
    for path, text in files.items():
        with whole_file(path) as beside:
            beside.write_text(text)
    for path in set(out.glob("front-*.json")) - set(files):  # of an earlier, longer front
        path.unlink(missing_ok=True)


def _composite(row: Row, content: Mapping[str, Any]) -> str:
    """A choice, what it measured, and the search that made it."""
    made_by = {key: content[key] for key in _MADE_BY}
    return _json({key: row[key] for key in (*CHOICE, "parameters", "value", "cost")} | {"made_by": made_by})


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False)


def read_start(path: Path) -> dict[str, Value]:
    """The parameters that a composite.json holds; `InputError` where it holds none."""
    try:
        parameters = {str(key): value for key, value in json.loads(path.read_text())["parameters"].items()}
    except OSError as error:
        raise InputError(f"--from {str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"--from {str(path)!r} holds no choice of a search; expected a composite.json that one wrote"
        ) from error
    if not parameters:
        raise InputError(f"--from {str(path)!r} holds a scorer without rules; nothing to begin with, leave it out")
    return parameters
