"""Are the samples fresh: do they serve no other role, and which certificates were made on them before.

The record of used splits is kept in the cache folder. Every certificate holds by itself; several made on the same
samples share the chance of error. So each is counted, and whoever uses a split again is told (`certify.spent`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from pxcompress.cache import cache_dir
from pxcompress.errors import DataError, InputError

FILE = "used_splits.json"


def check_disjoint(certify_ids: Iterable[str], other_ids: Mapping[str, Iterable[str]]) -> None:
    """Raise `DataError` where a certify sample is given twice or also serves another role (role -> ids)."""
    own = list(certify_ids)
    ids = set(own)
    if len(ids) < len(own):
        raise DataError(
            f"{len(own) - len(ids)} certify samples are given twice; expected independent samples: drop them"
        )
    for role, others in other_ids.items():
        if both := sorted(ids.intersection(others)):
            problem = f"{len(both)} certify samples also serve {role!r}, such as {both[0]!r}"
            raise DataError(f"{problem}; certify on samples of their own")


def split_hash(ids: Iterable[str]) -> str:
    """sha256 over the sorted sample ids: tells whether a certify split was used before."""
    return _hash("\n".join(sorted(ids)))


def record_use(data: str, split: str, certificate: str) -> int:
    """Add a certificate to the record; returns how many others were made on the same samples before.

    `data` is what was given as --data: the same ids in another folder are other samples. `split` is the hash of the
    ids, `certificate` the text of the certificate: the same one made again is no new use. Raises `InputError`.
    """
    path = cache_dir() / FILE
    record = _read(path)
    place = str(Path(data).resolve()) if Path(data).exists() else data
    certificates = record.setdefault(_hash(f"{place}\n{split}"), [])
    this = _hash(certificate)
    others = [each for each in certificates if each != this]
    if len(others) == len(certificates):
        certificates.append(this)
        beside = path.with_name(f".{FILE}.{os.getpid()}")
        beside.write_text(json.dumps(record, indent=1))
        beside.replace(path)
    return len(others)


def _read(path: Path) -> dict[str, list[str]]:
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        return {str(split): [str(each) for each in certificates] for split, certificates in record.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"the record of used splits {str(path)!r} is damaged ({error}); remove it, and take every split as used"
        ) from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
