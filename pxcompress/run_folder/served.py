"""Records which samples a run used in a role other than certify, so that no certificate of its models uses them.

They are known again by their content, under whatever name: data that have grown are cut into parts anew, and those that
chose a repair, or told the user what to ask for, could be among the samples to certify on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pxcompress.certify.used import short_hash
from pxcompress.errors import InputError
from pxcompress.notes import Note
from pxcompress.types import Splits

SERVED = "served.txt"
"""Name of the file with short hashes of the samples in all roles but certify, one on each line."""

LEFT_OUT = "samples are left out: the runs of these models used them, or copies of them, for something else"


def write_served(folder: Path, splits: Splits) -> None:
    """Write which samples of a run have a role other than certify; nothing for batches given in Python."""
    hashes = {role: set(map(short_hash, contents)) for role, contents in splits.contents.items()}
    hashes.pop("certify", None)
    if hashes:
        served = sorted(set().union(*hashes.values()))
        (folder / SERVED).write_text("".join(f"{each}\n" for each in served), encoding="utf-8")


@dataclass(frozen=True)
class ServedSamples:
    """A function that tells from a sample's content hash whether runs used it in another role.

    `hashes` are short ones of those that were used; `complete` says whether every run has a list of them.
    """

    hashes: frozenset[str]
    complete: bool

    def __call__(self, content: str) -> bool:
        return short_hash(content) in self.hashes


def read_served(files: Sequence[Path], note: Note) -> ServedSamples:
    """The samples used by the runs that made `files`, from the lists beside them.

    `note` is told about a file without a list. Raises `InputError` for a list that cannot be read.
    """
    served: set[str] = set()
    complete = True
    for folder in dict.fromkeys(file.parent for file in files):
        try:
            served.update((folder / SERVED).read_text(encoding="utf-8").split())
        except FileNotFoundError:
            complete = False
            note(f"no {SERVED} in {str(folder)!r}: samples that chose its models can be told only by how data are cut")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{SERVED} of {str(folder)!r} cannot be read ({error}); put it back") from error
    return ServedSamples(frozenset(served), complete)
