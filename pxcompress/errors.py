"""All errors that pxcompress raises on purpose; other exceptions become a `StageError` (see `guard`).

PxError
├── InputError          what the user gave is wrong              exit code 2
│   ├── ModelError      model name, checkpoint, factory, tracing
│   │   └── NoClassifierError  features, where class scores are expected
│   └── DataError       data spec, folders, images, sample counts
└── ResultError         the result fails its own check           exit code 3
    ├── BudgetError     no plan reaches the asked ratio
    ├── ParityError     the exported file disagrees with PyTorch
    ├── ProcessError    another process of the same run is gone
    ├── OutOfMemoryError  a stage does not fit into memory
    └── StageError      something that is not ours failed within a stage

Messages are one line: what was given, what was expected, what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

FEW = 12
"""Most known names that a message lists in full."""


class PxError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(PxError):
    """Something that the user gave cannot be used."""

    exit_code = 2


class ModelError(InputError):
    """The model cannot be found, loaded or traced."""


class NoClassifierError(ModelError):
    """The model returns features, where class scores are expected."""


class DataError(InputError):
    """The data cannot be found, read or split."""


class ResultError(PxError):
    """The result does not pass its own check."""

    exit_code = 3


class BudgetError(ResultError):
    """No plan reaches the asked ratio; the message names the largest reachable one."""


class ParityError(ResultError):
    """The exported file does not compute what the PyTorch model computes."""


class ProcessError(ResultError):
    """Another process of the same run ended too early."""


class OutOfMemoryError(ResultError):
    """A stage does not fit into the memory of this machine."""


class StageError(ResultError):
    """A stage failed with an unexpected exception, which is `__cause__`; the message has its first line."""


def unknown(kind: str, name: str, names: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not among `names`; it suggests similar names, or lists all if they are few."""
    names = sorted(names)
    similar_names = find_similar(name, names)
    hints = [f"did you mean {' or '.join(similar_names)}?"] if similar_names else []
    if not similar_names or len(names) <= FEW:
        hints.append(f"known: {', '.join(names)}")
    return InputError(f"unknown {kind} {name!r}; {' '.join(hints)}")


def suggest_path(path: Path) -> str:
    """Words that ask for the files and folders beside a missing `path` that are spelt like it; "" if there are none."""
    path = path.expanduser()
    try:
        names = [] if path.exists() else find_similar(path.name, [each.name for each in path.parent.iterdir()])
    except OSError:
        return ""
    return f"; did you mean {' or '.join(repr(str(path.with_name(name))) for name in names)}?" if names else ""


def find_similar(name: str, names: Iterable[str]) -> list[str]:
    """At most three of `names` that are spelt like `name`, the most similar first, whether upper or lower case."""
    name_by_lower = {each.lower(): each for each in names}
    return [name_by_lower[lower] for lower in difflib.get_close_matches(name.lower(), name_by_lower, n=3)]


def short(text: object, limit: int = 200) -> str:
    """`text` on one line of at most `limit` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def list_some(names: Sequence[str], most: int) -> str:
    """The first `most` names, and how many more there are: "a, b and 7 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def describe(error: BaseException) -> str:
    """Class and first line of an exception, without terminal colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()
    line = next(filter(str.strip, lines), "")
    return f"{type(error).__name__}: {short(line)}" if line else type(error).__name__
