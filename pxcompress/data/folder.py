"""A folder of images, with or without train/ and val/: every real file is one sample.

One sub-folder is a class; images/ beside masks/ have a mask each; image files alone have no targets.

Links are followed. A file is known by its device and inode, so that a folder which links to itself, or two links to one
image, do not count it twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from pxcompress.data.masks import Pair, class_names, pair_masks
from pxcompress.data.samples import Layout, Samples, UserData
from pxcompress.data.targets import Masks
from pxcompress.errors import DataError, suggest_path, unknown

# Names of the folders with the training and the held-out split, most usual first; compared in lower case.
TRAIN_FOLDERS = ("train", "training")
HELD_OUT_FOLDERS = ("val", "valid", "validation", "eval", "evaluation", "test", "testing")

_Identity = tuple[int, int] | str
"""What makes a file the same one under two paths: its device and inode; the path itself for a broken link."""


@dataclass(frozen=True, eq=False)
class Files:
    """Reads images from files whose paths are relative to `root`."""

    root: Path
    names: tuple[str, ...]

    def __call__(self, position: int) -> Image.Image:
        with Image.open(self.root / self.names[position]) as image:
            image.load()
        return image


def open_folder(spec: str, others: Sequence[str], layout: Layout | None = None) -> UserData:
    """The images of the folder `spec`, in the layout that it shows; `layout` "unlabelled" takes all, without targets.

    `others` are names of data that are no folders, for the error message.
    """
    root = Path(spec).expanduser()
    _check_folder(spec, root, others)
    inner = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    train = next((inner[name] for name in TRAIN_FOLDERS if name in inner), None)
    held_out = [inner[name] for name in HELD_OUT_FOLDERS if name in inner]
    splits = [split for split in (train, *held_out[:1]) if split is not None]
    scan = _Scan(spec, root)
    if len(splits) == 2:
        scan.notes += [f"{path.name}/ is not used; {splits[1].name}/ is the held-out split" for path in held_out[1:]]
    splits = splits or [root]  # without train/ and val/, the roles are cut from all images
    readers = {"classes": _read_classes, "masks": _read_masks, "unlabelled": _read_unlabelled}
    data = readers[layout or _layout_of(splits[0])](scan, splits)
    return replace(data, notes=(*scan.notes, *scan.links_note()))


def _layout_of(split: Path) -> Layout:
    """The layout of a folder: images/ with masks/, one sub-folder for each class, or image files alone."""
    entries = list(_entries(split))
    folders = {entry.name for entry in entries if os.path.isdir(entry)}
    if "images" in folders and ("masks" in folders or folders == {"images"}):
        return "masks"
    flat = not folders and any(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in entries)
    return "unlabelled" if flat else "classes"


def _read_classes(scan: _Scan, splits: Sequence[Path]) -> UserData:
    classes, train = scan.read_split(splits[0])
    held_out = scan.read_split(splits[1], classes)[1] if len(splits) == 2 else None
    natural = tuple(sorted(classes, key=natural_key))
    other_order = () if natural == classes else natural
    return UserData(classes, train, held_out, other_order=other_order, outputs=len(classes))


def _read_masks(scan: _Scan, splits: Sequence[Path]) -> UserData:
    pairs = []
    for split in splits:
        for name in ("images", "masks"):
            if not (split / name).is_dir():
                raise DataError(f"'{split}' has no folder {name}/; expected images/, and masks/ with a PNG for each")
        pairs.append(pair_masks(scan.images(split, "images"), split))
        if not pairs[-1]:
            raise DataError(f"no images in '{split / 'images'}'; expected images with a PNG each in masks/")
    classes = class_names(scan.spec, scan.root, [mask for split in pairs for _, mask in split])
    train, *held_out = (_open_masked(scan.root, split, len(classes)) for split in pairs)
    return UserData(classes, train, held_out[0] if held_out else None, layout="masks", outputs=len(classes))


def _open_masked(root: Path, pairs: Sequence[Pair], classes: int) -> Samples:
    images, masks = (tuple(pair[side].relative_to(root).as_posix() for pair in pairs) for side in (0, 1))
    labels = np.zeros(len(images), dtype=np.int64)
    return Samples.of(images, labels, Files(root, images), Masks(root, masks, images, classes))


def _read_unlabelled(scan: _Scan, splits: Sequence[Path]) -> UserData:
    """All images below the `splits`, without targets; only those of images/ if masks/ lies beside it."""
    parts = []
    for split in splits:
        has_masks = (split / "images").is_dir() and (split / "masks").is_dir()
        paths = scan.images(split, "images" if has_masks else ".")
        if not paths:
            raise DataError(f"no images below '{split}'; expected files with one of: {' '.join(IMG_EXTENSIONS)}")
        ids = tuple(path.relative_to(scan.root).as_posix() for path in paths)
        parts.append(Samples.of(ids, np.zeros(len(ids), dtype=np.int64), Files(scan.root, ids)))
    train, *held_out = parts
    return UserData((), train, held_out[0] if held_out else None, layout="unlabelled")


def open_folder_images(spec: str) -> Samples:
    """Every image at or below the folder `spec`, by path; ids are relative paths. All labels are -1: unknown.

    Raises `DataError` where there are none, and if `spec` is no folder.
    """
    root = Path(spec).expanduser()
    if not root.is_dir():
        raise DataError(
            f"{spec!r} is no folder; give one with images, in any folders below it, or a table: .csv, .jsonl"
        )
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
        raise DataError(
            f"data {spec!r} is a file; expected a folder with one folder of images per class, or a table: .csv, .jsonl"
        )
    where = "" if root.is_absolute() else f" in {str(Path.cwd())!r}"
    suggestion = suggest_path(root)
    if os.sep in spec or spec.startswith((".", "~")):
        raise DataError(
            f"data folder {spec!r} does not exist{where}; give a folder, or one of: {', '.join(others)}{suggestion}"
        )
    raise DataError(f"{unknown('data', spec, others)} (nor is there a folder of that name{where}{suggestion})")


@dataclass(eq=False)
class _Scan:
    """The state of reading the folder `root`: which files were met so far, and where.

    `places` says where each real file was first met, as (the split's folder, class, path); `repeated` counts links to
    files that were met before.
    """

    spec: str
    root: Path
    notes: list[str] = field(default_factory=list)
    repeated: int = 0
    places: dict[_Identity, tuple[Path, str, Path]] = field(default_factory=dict)

    def read_split(self, split: Path, classes: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], Samples]:
        """Class names and samples of a folder with one sub-folder for each class; ids are paths relative to `root`.

        With `classes` given, a folder that is not among them is an error. Raises `DataError`, also if there are no
        images.
        """
        folders = sorted(path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))
        images = {name: self.images(split, name) for name in folders}
        names = classes or tuple(name for name in folders if images[name])
        if not any(images.values()):
            extensions = " ".join(IMG_EXTENSIONS)
            raise DataError(
                f"no images in class folders below '{split}'; expected CLASS/IMAGE with one of: {extensions}"
            )
        strange = [name for name in folders if images[name] and name not in names]
        if strange:
            raise DataError(
                f"class {strange[0]!r} of '{split}' has no images to learn from; the splits need the same classes"
            )
        if classes is None:
            empty_classes = [name for name in folders if not images[name]]
            self.notes += [
                f"class folder {name!r} of {self.spec!r} has no images and is left out" for name in empty_classes
            ]
        files = [(path, label) for label, name in enumerate(names) for path in images.get(name, ())]
        ids = tuple(path.relative_to(self.root).as_posix() for path, _ in files)
        labels = np.array([label for _, label in files], dtype=np.int64)
        return names, Samples.of(ids, labels, Files(self.root, ids))

    def links_note(self) -> list[str]:
        """A note on how many links lead to images that are read anyway; empty if there are none."""
        links = "1 link" if self.repeated == 1 else f"{self.repeated} links"
        text = f"{links} below {self.spec!r} to images that are there anyway: every image counts once"
        return [text] if self.repeated else []

    def images(self, split: Path, name: str) -> list[Path]:
        """Image files at or below the folder `name` of a split's folder, sorted.

        A file that several links lead to is listed once: under its own path, or under one of the links where its own
        path lies elsewhere.
        """
        paths: dict[_Identity, Path] = {}
        for identity, path in self.walk(split / name, set()):
            first_path = paths.setdefault(identity, path)
            if first_path is path:
                self._claim(identity, split, name, path)
                continue
            self.repeated += 1
            if first_path.is_symlink() and not path.is_symlink():
                paths[identity] = path
        return sorted(paths.values())

    def _claim(self, identity: _Identity, split: Path, name: str, path: Path) -> None:
        """Record which class and split a file belongs to. Raises `DataError` if it belongs to another one already."""
        other_split, other_name, other_path = self.places.setdefault(identity, (split, name, path))
        if (other_split, other_name) != (split, name):
            places = f"both {other_split.name}/ and {split.name}/" if other_split != split else "two classes"
            path_text = " and ".join(repr(each.relative_to(self.root).as_posix()) for each in (other_path, path))
            raise DataError(f"data {self.spec!r}: {path_text} are one file, in {places}; remove one of the links")

    def walk(self, folder: Path, entered: set[_Identity]) -> Iterator[tuple[_Identity, Path]]:
        """Image files at or below `folder`; each folder is entered once. Hidden files (macOS's ._NAME) are skipped."""
        device, inode = _status(folder)
        if (device, inode) in entered:
            self.repeated += 1
            return
        entered.add((device, inode))
        _check_name(folder)
        for entry in _entries(folder):
            path = folder / entry.name
            if os.path.isdir(entry):
                yield from self.walk(path, entered)
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                _check_name(path)
                yield (_resolve_link(path) if entry.is_symlink() else (device, entry.inode())), path


def _check_name(path: Path) -> None:
    """Raise `DataError` for a name that is no text, which no report could show."""
    try:
        path.name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the name of {str(path)!r} is not in UTF-8; rename it") from error


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    """Visible entries of `folder`, sorted, with real files and folders before links. Raises `DataError`."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"data folder '{folder}' cannot be read ({error.strerror}); make it readable") from error
    return sorted(visible, key=lambda entry: (entry.is_symlink(), entry.name))


def _status(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _resolve_link(link: Path) -> _Identity:
    """The identity of the file that a link leads to.

    The link's own path if it is broken, so that reading it fails later.
    """
    try:
        return _status(link)
    except OSError:
        return str(link)
