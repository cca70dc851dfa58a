"""Are the samples fresh: do they serve no other role, and which certificates were made on them before.

The record of used splits is kept in the cache folder. Every certificate holds by itself; several made on the same
samples share the chance of error. So each is counted, and whoever uses a split again is told (`certify.spent`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pxcompress.cache import cache_dir
from pxcompress.errors import DataError, InputError

FILE = "used_splits.json"


def check_disjoint(certify_ids: Iterable[str], other_ids: Mapping[str, Iterable[str]]) -> None:
    """Raise `DataError` where a certify sample is given twice or also serves another role (role -> ids)."""
    sample_ids = list(certify_ids)
    ids = set(sample_ids)
    if len(ids) < len(sample_ids):
        raise DataError(
            f"{len(sample_ids) - len(ids)} certify samples are given twice; expected independent samples: drop them"
        )
    for role, others in other_ids.items():
        if shared_ids := sorted(ids.intersection(others)):
            problem = f"{len(shared_ids)} certify samples also serve {role!r}, such as {shared_ids[0]!r}"
            raise DataError(f"{problem}; certify on samples of their own")


def split_hash(ids: Iterable[str]) -> str:
    """sha256 over the sorted sample ids: tells whether a certify split was used before."""
    return hash_of("\n".join(sorted(ids)))


@dataclass(frozen=True)
class Use:
    """One certificate's use of a split: it looked at samples from `begins` up to `ends`, and lost so much of the error
    budget. A test of fixed size looks at all of them.
    """

    certificate: str
    begins: int = 0
    ends: int = sys.maxsize
    lost: float = 0.0

    def overlaps(self, other: Use) -> bool:
        """Whether both have looked at a sample."""
        return self.begins < other.ends and other.begins < self.ends


def record_use(data: str, split: str, certificate: str) -> int:
    """Add a certificate to the record; returns how many others were made on the same samples before.

    `data` is what was given as --data: the same ids in another folder are other samples. `split` is the hash of the
    ids, `certificate` the text of the certificate: the same one made again is no new use. Raises
    `InputError`.
    """
    return add_use(data, split, Use(hash_of(certificate)))


def add_use(data: str, split: str, use: Use) -> int:
    """As `record_use`; the same certificate with more answers takes the place of what it was."""
    path = cache_dir() / FILE
    record = _read(path)
    others = [each for each in record.get(_key(data, split), []) if each.certificate != use.certificate]
    record[_key(data, split)] = [*others, use]
    beside = path.with_name(f".{FILE}.{os.getpid()}")
    beside.write_text(json.dumps({key: [asdict(each) for each in uses] for key, uses in record.items()}, indent=1))
    beside.replace(path)
    return sum(each.overlaps(use) for each in others)


def uses_of(data: str, split: str) -> list[Use]:
    """The certificates that were made on a split so far."""
    return _read(cache_dir() / FILE).get(_key(data, split), [])


def _key(data: str, split: str) -> str:
    place = str(Path(data).resolve()) if Path(data).exists() else data
    return hash_of(f"{place}\n{split}")


def _read(path: Path) -> dict[str, list[Use]]:
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        # An earlier version kept the hashes of certificates only, all of tests of fixed size.
        return {
            split: [Use(each) if isinstance(each, str) else Use(**each) for each in uses]
            for split, uses in record.items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"the record of used splits {str(path)!r} is damaged ({error}); remove it, and take every split as used"
        ) from error


def hash_of(text: str) -> str:
    """sha256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
