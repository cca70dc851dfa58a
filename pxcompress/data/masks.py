"""Folders `images/` and `masks/`, with or without train/ and val/ around them: one PNG mask beside every image."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pxcompress.data.targets import IGNORED, read_mask
from pxcompress.errors import DataError, list_some

_SHOWN = 3  # names in a message

Pair = tuple[Path, Path]
"""Paths of an image and of its mask."""


def pair_masks(images: Sequence[Path], split: Path) -> list[Pair]:
    """Match images below `split`/images to masks that have the same relative path but for the ending.

    Raises `DataError` where one has no partner.
    """
    folder = split / "masks"
    masks = {_stem(path, folder): path for path in sorted(folder.rglob("*")) if _is_mask(path)}
    stems = {path: _stem(path, split / "images") for path in images}
    _check_partners([path for path, stem in stems.items() if stem not in masks], "image", "PNG mask", split)
    _check_partners([path for stem, path in masks.items() if stem not in stems.values()], "mask", "image", split)
    return [(path, masks[stem]) for path, stem in stems.items()]


def class_names(spec: str, root: Path, masks: Sequence[Path]) -> tuple[str, ...]:
    """Class names: the lines of classes.txt, or "0", "1", ... up to the largest value in any mask, `IGNORED` aside.

    Raises `DataError` for fewer than two.
    """
    class_file = root / "classes.txt"
    if class_file.exists():
        names = tuple(line.strip() for line in class_file.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    else:
        with ThreadPoolExecutor() as threads:
            largest = max(threads.map(lambda path: _largest(path, path.relative_to(root).as_posix()), masks))
        names = tuple(str(number) for number in range(largest + 1))
    if len(names) < 2:
        source = (
            "classes.txt names" if class_file.exists() else f"the masks hold (beside {IGNORED}, which does not count)"
        )
        raise DataError(f"data {spec!r}: {source} fewer than two classes; expected values 0, 1, ... in the masks")
    return names


def _largest(path: Path, name: str) -> int:
    mask = read_mask(path, name)
    return int(mask.max(initial=0, where=mask != IGNORED))


def _check_partners(unpaired: Sequence[Path], kind: str, partner: str, split: Path) -> None:
    if unpaired:
        names = list_some([repr(path.relative_to(split).as_posix()) for path in unpaired], _SHOWN)
        raise DataError(f"no {partner} of the same name in '{split}' for {kind} {names}; add or remove them")


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _is_mask(path: Path) -> bool:
    return path.suffix.lower() == ".png" and not path.name.startswith(".")
