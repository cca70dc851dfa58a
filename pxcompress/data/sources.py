"""Where labelled data come from: an embedded set, a folder of images, or a data set that timm knows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from pxcompress.data.batches import ImageBatches, read_images
from pxcompress.data.embedded import EMBEDDED
from pxcompress.data.samples import Integers, Samples, Source, pools
from pxcompress.data.timm_sources import PREFIXES, timm_pools
from pxcompress.errors import DataError, short, unknown
from pxcompress.types import Preprocessing

# Folder names of the two halves, most usual first; compared in lower case.
_TRAIN_FOLDERS = ("train", "training")
_HELD_OUT_FOLDERS = ("val", "valid", "validation", "eval", "evaluation", "test", "testing")


def open_source(spec: str, *, skip_corrupt: bool = False, seed: int = 0) -> Source:
    """The data that `spec` names.

    `digits`; `spiral`; `glyphs` and `dna`, also smaller, `glyphs:train=640,select=80,held_out=160`; a folder in
    ImageFolder layout, with or without train/ and val/; `hfds/NAME`, `torch/NAME`, `wds/NAME`, `tfds/NAME`, with
    options as in `hfds/uoft-cs/cifar10:input_key=img,val=test`. `seed` cuts the pools of a user's data; those of
    embedded data are always the same, so that a baseline trained once never meets its training images again. Raises
    `DataError`.
    """
    name, _, options = spec.partition(":")
    if name in EMBEDDED:
        return EMBEDDED.build(spec).source(spec)
    if not Path(spec).exists() and name.partition("/")[0].lower() in PREFIXES and "/" in name:
        found = _timm(name, _parse_options(spec, options))
    else:
        found = _folder(spec)
    if len(found.classes) < 2:
        raise DataError(f"data {spec!r} has only one class ({found.classes[0]}); at least two are needed")
    train, select, held_out = pools(found.train, found.held_out, seed)
    return Source(
        name=spec,
        classes=found.classes,
        embedded=False,
        native_size=None,
        train=train,
        select=select,
        held_out=held_out,
        skip_corrupt=skip_corrupt,
        notes=found.notes,
    )


def read_files(names: Sequence[str], preprocessing: Preprocessing) -> Tensor:
    """Image files as a model's inputs, (n, channels, height, width); `DataError` names one that cannot be read."""
    samples = Samples.of(names, np.zeros(len(names), dtype=np.int64), _Files(Path(), tuple(names)))
    try:
        store, _ = read_images(samples, preprocessing, skip_corrupt=False)
    except DataError as error:
        raise DataError(
            f"{str(error).partition('; replace')[0]}; expected image files, such as .png or .jpg"
        ) from error
    return next(iter(ImageBatches(store, len(names))))[0]


def restricted(source: Source, classes: Sequence[str], seed: int = 0) -> Source:
    """`source` with only `classes`, which are numbered in that order.

    What was held out stays so. Of embedded data, which baselines are trained on, every pool is the same but smaller; a
    user's train and select pools are cut anew, since the limit of select is meant for the classes that there are.
    Raises `DataError` for a name that `source` does not have.
    """
    if tuple(classes) == source.classes:
        return source
    for name in classes:
        if name not in source.classes:
            raise DataError(short(unknown(f"class of data {source.name!r}:", name, source.classes), 400))
    number = np.full(len(source.classes), -1)
    number[[source.classes.index(name) for name in classes]] = np.arange(len(classes))
    train, select, held_out = (_renumbered(pool, number) for pool in (source.train, source.select, source.held_out))
    if not source.embedded:
        train, select, held_out = pools(train.joined(select), held_out, seed)
    return replace(source, classes=tuple(classes), train=train, select=select, held_out=held_out)


def _renumbered(samples: Samples, number: Integers) -> Samples:
    """Samples whose label has a `number` (classes,), under it; the others have -1."""
    kept = samples.take(np.flatnonzero(number[samples.labels] >= 0))
    return replace(kept, labels=number[kept.labels])


@dataclass(frozen=True, eq=False)
class _Found:
    """A user's data as it lies there."""

    classes: tuple[str, ...]
    train: Samples
    held_out: Samples | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Files:
    """Reads images from files below `root`."""

    root: Path
    names: tuple[str, ...]

    def __call__(self, position: int) -> Image.Image:
        with Image.open(self.root / self.names[position]) as image:
            image.load()
        return image


def _parse_options(spec: str, text: str) -> dict[str, str]:
    """ "a=1,b=2" as a mapping."""
    options: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, sign, value = part.partition("=")
        if not sign or not value or key in options:
            raise DataError(f"data {spec!r}: cannot read option {part!r}; expected each option once, as NAME=VALUE")
        options[key] = value
    return options


def _timm(name: str, options: Mapping[str, str]) -> _Found:
    if name.lower() in ("torch/image_folder", "torch/folder"):
        if list(options) != ["root"]:
            raise DataError(f"data {name!r} takes one option, its folder; expected {name}:root=DIR")
        return _folder(options["root"])  # timm would take the whole folder for both halves without val/
    classes, train, held_out, notes = timm_pools(name, options)
    return _Found(classes, train, held_out, notes)


def _folder(spec: str) -> _Found:
    root = Path(spec).expanduser()
    _check_folder(spec, root)
    inner = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    train = next((inner[name] for name in _TRAIN_FOLDERS if name in inner), None)
    held_out = [inner[name] for name in _HELD_OUT_FOLDERS if name in inner]
    halves = [half for half in (train, *held_out[:1]) if half is not None]
    if len(halves) < 2:  # one half alone is cut like a folder without halves
        classes, samples, notes = _scan(spec, root, halves[0] if halves else root, None)
        return _Found(classes, samples, None, notes)
    classes, samples, notes = _scan(spec, root, halves[0], None)
    _, held_out_samples, _ = _scan(spec, root, halves[1], classes)
    notes += tuple(f"{path.name}/ is not used; {halves[1].name}/ is the held-out half" for path in held_out[1:])
    return _Found(classes, samples, held_out_samples, notes)


def _check_folder(spec: str, root: Path) -> None:
    if spec and root.is_dir():
        if not any(root.iterdir()):
            raise DataError(f"data folder {spec!r} is empty; expected one folder of images per class")
        return
    if spec and root.exists():
        raise DataError(f"data {spec!r} is a file; expected a folder with one folder of images per class")
    known = [*EMBEDDED, *(f"{prefix}/NAME" for prefix in PREFIXES)]
    if os.sep in spec or spec.startswith((".", "~")):
        raise DataError(f"data folder {spec!r} does not exist; give a folder, or one of: {', '.join(known)}")
    raise DataError(f"{unknown('data', spec, known)} (nor is there a folder of that name)")


def _scan(
    spec: str, root: Path, half: Path, classes: tuple[str, ...] | None
) -> tuple[tuple[str, ...], Samples, tuple[str, ...]]:
    """Classes, samples and notes of a folder whose folders are classes; ids are paths relative to `root`.

    With `classes` given, a folder that is not among them is an error.
    """
    folders = sorted(path.name for path in half.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {name: _images(half / name) for name in folders}
    names = classes or tuple(name for name in folders if found[name])
    if not any(found.values()):
        extensions = " ".join(IMG_EXTENSIONS)
        raise DataError(f"no images in class folders below '{half}'; expected CLASS/IMAGE with one of: {extensions}")
    strange = [name for name in folders if found[name] and name not in names]
    if strange:
        raise DataError(
            f"class {strange[0]!r} of '{half}' has no images to learn from; the halves need the same classes"
        )
    files = [(path, label) for label, name in enumerate(names) for path in found.get(name, ())]
    ids = tuple(path.relative_to(root).as_posix() for path, _ in files)
    labels = np.array([label for _, label in files], dtype=np.int64)
    notes = [f"class folder {name!r} of {spec!r} has no images and is left out" for name in folders if not found[name]]
    return names, Samples.of(ids, labels, _Files(root, ids)), tuple(notes)


def _images(folder: Path) -> list[Path]:
    """Image files below a class folder, sorted; hidden ones (such as macOS's ._NAME) are no images."""
    paths = (
        Path(parent) / name
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
    )
    return sorted(paths)
