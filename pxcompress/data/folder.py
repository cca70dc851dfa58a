"""A folder of images, one sub-folder a class, with or without train/ and val/: every real file is one sample.

Links are followed. A file is known by its device and inode, so that a folder which links to itself, or two links to one
image, do not count it twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from pxcompress.data.samples import Samples, UserData
from pxcompress.errors import DataError, unknown

# Folder names of the two halves, most usual first; compared in lower case.
_TRAIN_FOLDERS = ("train", "training")
_HELD_OUT_FOLDERS = ("val", "valid", "validation", "eval", "evaluation", "test", "testing")

_Identity = tuple[int, int] | str
"""Device and inode of a file or folder; its path where a link leads nowhere."""


@dataclass(frozen=True, eq=False)
class Files:
    """Reads images from files below `root`."""

    root: Path
    names: tuple[str, ...]

    def __call__(self, position: int) -> Image.Image:
        with Image.open(self.root / self.names[position]) as image:
            image.load()
        return image


def open_folder(spec: str, others: Sequence[str]) -> UserData:
    """The images of folder `spec`; `others` are names of data that are no folders, for the error message."""
    root = Path(spec).expanduser()
    _check_folder(spec, root, others)
    inner = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    train = next((inner[name] for name in _TRAIN_FOLDERS if name in inner), None)
    held_out = [inner[name] for name in _HELD_OUT_FOLDERS if name in inner]
    halves = [half for half in (train, *held_out[:1]) if half is not None]
    scan = _Scan(spec, root)
    classes, train_samples = scan.half(halves[0] if halves else root)
    held_out_samples = None  # one half alone is cut like a folder without halves
    if len(halves) == 2:
        _, held_out_samples = scan.half(halves[1], classes)
        scan.notes += [f"{path.name}/ is not used; {halves[1].name}/ is the held-out half" for path in held_out[1:]]
    if scan.repeated:
        links = "1 link" if scan.repeated == 1 else f"{scan.repeated} links"
        scan.notes.append(f"{links} below {spec!r} to images that are there anyway: every image counts once")
    natural = tuple(sorted(classes, key=natural_key))
    other_order = () if natural == classes else natural
    return UserData(classes, train_samples, held_out_samples, tuple(scan.notes), other_order)


def open_images(spec: str) -> Samples:
    """Every image at or below the folder `spec`, by path; ids are paths relative to it. Their labels, -1, say nothing.

    Raises `DataError` where there are none.
    """
    root = Path(spec).expanduser()
    if not root.is_dir():
        raise DataError(f"{spec!r} is no folder; give one with images, in any folders below it")
    paths: dict[_Identity, Path] = {}
    for identity, path in _Scan(spec, root).walk(root, set()):
        paths.setdefault(identity, path)
    ids = tuple(sorted(path.relative_to(root).as_posix() for path in paths.values()))
    if not ids:
        raise DataError(f"no images in {spec!r}; expected files with one of: {' '.join(IMG_EXTENSIONS)}")
    return Samples.of(ids, np.full(len(ids), -1, dtype=np.int64), Files(root, ids))


def _check_folder(spec: str, root: Path, others: Sequence[str]) -> None:
    if spec and root.is_dir():
        if not any(root.iterdir()):
            raise DataError(f"data folder {spec!r} is empty; expected one folder of images per class")
        return
    if spec and root.exists():
        raise DataError(f"data {spec!r} is a file; expected a folder with one folder of images per class")
    if os.sep in spec or spec.startswith((".", "~")):
        raise DataError(f"data folder {spec!r} does not exist; give a folder, or one of: {', '.join(others)}")
    raise DataError(f"{unknown('data', spec, others)} (nor is there a folder of that name)")


@dataclass(eq=False)
class _Scan:
    """What has been read of the folder `root` so far.

    `places` says where each real file was first met, as (half, class, path); `repeated` counts links to such files.
    """

    spec: str
    root: Path
    notes: list[str] = field(default_factory=list)
    repeated: int = 0
    places: dict[_Identity, tuple[Path, str, Path]] = field(default_factory=dict)

    def half(self, half: Path, classes: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], Samples]:
        """Classes and samples of a folder whose folders are classes; ids are paths relative to `root`.

        With `classes` given, a folder that is not among them is an error.
        """
        folders = sorted(path.name for path in half.iterdir() if path.is_dir() and not path.name.startswith("."))
        images = {name: self._images(half, name) for name in folders}
        names = classes or tuple(name for name in folders if images[name])
        if not any(images.values()):
            extensions = " ".join(IMG_EXTENSIONS)
            raise DataError(
                f"no images in class folders below '{half}'; expected CLASS/IMAGE with one of: {extensions}"
            )
        strange = [name for name in folders if images[name] and name not in names]
        if strange:
            raise DataError(
                f"class {strange[0]!r} of '{half}' has no images to learn from; the halves need the same classes"
            )
        if classes is None:
            empty = [name for name in folders if not images[name]]
            self.notes += [f"class folder {name!r} of {self.spec!r} has no images and is left out" for name in empty]
        files = [(path, label) for label, name in enumerate(names) for path in images.get(name, ())]
        ids = tuple(path.relative_to(self.root).as_posix() for path, _ in files)
        labels = np.array([label for _, label in files], dtype=np.int64)
        return names, Samples.of(ids, labels, Files(self.root, ids))

    def _images(self, half: Path, name: str) -> list[Path]:
        """Image files of the class `name`, each real file once, sorted; files rather than links to them."""
        paths: dict[_Identity, Path] = {}
        for identity, path in self.walk(half / name, set()):
            first = paths.setdefault(identity, path)
            if first is path:
                self._claim(identity, half, name, path)
                continue
            self.repeated += 1
            if first.is_symlink() and not path.is_symlink():
                paths[identity] = path
        return sorted(paths.values())

    def _claim(self, identity: _Identity, half: Path, name: str, path: Path) -> None:
        """Record where a file belongs; `DataError` where it belongs elsewhere already."""
        other_half, other_name, other = self.places.setdefault(identity, (half, name, path))
        if (other_half, other_name) != (half, name):
            where = f"both {other_half.name}/ and {half.name}/" if other_half != half else "two classes"
            shown = " and ".join(repr(each.relative_to(self.root).as_posix()) for each in (other, path))
            raise DataError(f"data {self.spec!r}: {shown} are one file, in {where}; remove one of the links")

    def walk(self, folder: Path, entered: set[_Identity]) -> Iterator[tuple[_Identity, Path]]:
        """Image files at or below `folder`, each folder entered once. Hidden ones (macOS's ._NAME) are no images."""
        device, inode = _status(folder)
        if (device, inode) in entered:
            self.repeated += 1
            return
        entered.add((device, inode))
        for entry in _entries(folder):
            path = folder / entry.name
            if os.path.isdir(entry):
                yield from self.walk(path, entered)
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                yield (_resolved(path) if entry.is_symlink() else (device, entry.inode())), path


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    """What lies in `folder` and is not hidden, sorted: files and folders before links to them."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"data folder '{folder}' cannot be read ({error.strerror}); make it readable") from error
    return sorted(visible, key=lambda entry: (entry.is_symlink(), entry.name))


def _status(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _resolved(link: Path) -> _Identity:
    """The file that a link leads to; the link itself where there is none, so that it is found when it is read."""
    try:
        return _status(link)
    except OSError:
        return str(link)
