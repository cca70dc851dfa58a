"""Imports a user's own objects by name, "package.module:name"; the current folder can be imported from."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from pxcompress.errors import ModelError, describe, find_similar
from pxcompress.guard import Terminated


def find_object(name: str, purpose: str) -> Any:
    """Import the object "package.module:name"; `purpose` is a word for messages. Raises `ModelError`, with advice."""
    module_name, _, path = name.partition(":")
    if module_name.partition(".")[0] in sys.stdlib_module_names:  # a run folder that is not ours may say os:abort
        raise ModelError(
            f"{purpose} {name!r} refused: {module_name!r} belongs to Python; expected a module of your own"
        )
    try:
        with own_code():
            target: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module may fail in any way
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        advice = f"; put the folder that holds {module_name.partition('.')[0]} on PYTHONPATH" if missing else ""
        raise ModelError(f"{purpose} {name!r}: importing {module_name!r} failed: {describe(error)}{advice}") from error
    for part in path.split("."):
        if not hasattr(target, part):
            close_names = find_similar(part, dir(target))
            hint = f"did you mean {' or '.join(close_names)}?" if close_names else "expected an object of this name"
            if module_name == "__main__":
                hint = (
                    "it was given in a script or notebook; define it there first, or in a module that can be imported"
                )
            raise ModelError(f"{purpose} {name!r}: {module_name!r} has no {path!r}; {hint}")
        target = getattr(target, part)
    return target


@contextmanager
def own_code() -> Iterator[None]:
    """A context for code of the user's own, which can import from the current folder.

    What it prints goes to stderr, since stdout is for results; where it ends the process, `RuntimeError` is raised.
    """
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        importlib.invalidate_caches()
        with redirect_stdout(sys.stderr):
            yield
    except Terminated:
        raise
    except SystemExit as error:
        raise RuntimeError(
            f"it ends the process with exit code {error.code}; put what a script does under: if __name__ == '__main__'"
        ) from error
    finally:
        sys.path.remove(folder)
