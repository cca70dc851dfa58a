"""Keeps a record of which certificates were made on which samples, and checks that samples serve no other role.

The record is in the cache folder. Every certificate holds by itself, but several that were made on the same samples
share the chance of error. So each is counted, and a user who certifies on samples again is told what that means
(`certify.spent`), also if the samples are now a part of other data.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pxcompress.cache import cache_dir, whole_file
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
    """Identifies a certify split: sha256 over the sorted sample ids, so that earlier uses of it can be found."""
    return hash_of("\n".join(sorted(ids)))


def short_hash(text: str) -> str:
    """Twelve hexadecimal digits of a sha256, by which a sample of this content is recognised."""
    return hash_of(text)[:12]


@dataclass(frozen=True)
class Use:
    """One certificate's use of a split.

    It looked at samples from `begins` up to `ends`, and lost so much of the error budget. A test of fixed size looks at
    all of them.
    """

    certificate: str
    begins: int = 0
    ends: int = sys.maxsize
    lost: float = 0.0

    def overlaps(self, other: Use) -> bool:
        """Whether this use and another one of the same split have looked at a common sample."""
        return self.begins < other.ends and other.begins < self.ends


@dataclass(frozen=True)
class Split:
    """A split's samples, as short hashes of content in the order of the test, and the certificates made on them.

    Files of earlier versions have no samples.
    """

    samples: tuple[str, ...] = ()
    uses: tuple[Use, ...] = ()

    def list_seen(self, use: Use) -> tuple[str, ...]:
        """The samples that a certificate has looked at."""
        return self.samples[use.begins : use.ends]


def add_use(data: str, split: str, samples: Iterable[str], use: Use) -> int:
    """Record a certificate's use of a split; returns how many other certificates have looked at any of its samples.

    `data` is what was given as --data: the same ids in another folder are another split. `split` is the hash of the
    ids, `samples` are short hashes of content in the order of the test. Other splits are looked through for the same
    content, since data that have grown are a new split. The same certificate made again, or with more answers, takes
    the place of what it was. Raises `InputError`.
    """
    path, key = cache_dir() / FILE, _key(data, split)
    record = _read(path)
    others = tuple(each for each in record.get(key, Split()).uses if each.certificate != use.certificate)
    record[key] = Split(tuple(samples), (*others, use))
    with whole_file(path) as beside:
        beside.write_text(json.dumps({name: asdict(each) for name, each in record.items()}), encoding="utf-8")
    seen = set(record[key].list_seen(use))
    elsewhere = [(part, each) for name, part in record.items() if name != key for each in part.uses]
    return sum(each.overlaps(use) for each in others) + sum(
        each.certificate != use.certificate and not seen.isdisjoint(part.list_seen(each)) for part, each in elsewhere
    )


def uses_of(data: str, split: str) -> tuple[Use, ...]:
    """The certificates that were made on a split so far."""
    return _read(cache_dir() / FILE).get(_key(data, split), Split()).uses


def count_seen_elsewhere(data: str, split: str, samples: Iterable[str]) -> int:
    """How many of the samples were looked at by certificates on other splits, as when data have grown since."""
    record = _read(cache_dir() / FILE)
    record.pop(_key(data, split), None)
    seen = {sample for part in record.values() for use in part.uses for sample in part.list_seen(use)}
    return len(seen.intersection(samples))


def _key(data: str, split: str) -> str:
    place = str(Path(data).resolve()) if Path(data).exists() else data
    return hash_of(f"{place}\n{split}")


def _read(path: Path) -> dict[str, Split]:
    if not path.exists():
        return {}
    try:
        return {name: _split(content) for name, content in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"the record of used splits {str(path)!r} is damaged ({error}); remove it, and take every split as used"
        ) from error


def _split(content: Any) -> Split:
    """One split from the JSON of the record; earlier versions wrote a list of uses, or of hashes of tests."""
    record = content if isinstance(content, dict) else {"uses": content}
    uses = tuple(Use(each) if isinstance(each, str) else Use(**each) for each in record["uses"])
    return Split(tuple(record.get("samples", ())), uses)


def hash_of(text: str) -> str:
    """sha256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
