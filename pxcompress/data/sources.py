"""Where labelled data come from: an embedded set, a folder of images, or a data set that timm knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pxcompress.data import dna, glyphs, spiral
from pxcompress.data.batches import ImageBatches, read_images
from pxcompress.data.folder import Files, open_folder
from pxcompress.data.samples import Integers, Numbers, Samples, Source, UserData, cut, pools
from pxcompress.data.timm_sources import PREFIXES, timm_pools
from pxcompress.errors import DataError, short, unknown
from pxcompress.types import Preprocessing

# 1797 digits: 1000 to train on, 150 to select with, the rest held out.
_DIGITS_SIZES = (1000, 150, 647)
_DIGITS_LIMITS = {"score": 256, "repair": 512, "select": 150, "certify": 150}
_GLYPHS_SIZES = {"train": 16000, "select": 1000, "held_out": 4000}
_GLYPHS_LIMITS = {"score": 512, "repair": 1024, "select": 1000, "certify": 2000}
_DNA_SIZES = {"train": 12000, "select": 1000, "held_out": 4000}
_SPIRAL_SIZES = (40000, 2000, 8000)
_EMBEDDED_SIZE = 32


def open_source(spec: str, *, skip_corrupt: bool = False, seed: int = 0) -> Source:
    """The data that `spec` names.

    `digits`; `spiral`; `glyphs` and `dna`, also smaller, `glyphs:train=640,select=80,held_out=160`; a folder in
    ImageFolder layout, with or without train/ and val/; `hfds/NAME`, `torch/NAME`, `wds/NAME`, `tfds/NAME`, with
    options as in `hfds/uoft-cs/cifar10:input_key=img,val=test`. `seed` cuts the pools of a user's data; those of
    embedded data are always the same, so that a baseline trained once never meets its training images again. Raises
    `DataError`.
    """
    name, _, options = spec.partition(":")
    if name in _EMBEDDED:
        return _EMBEDDED[name](spec, _parse_options(spec, options))
    if not Path(spec).exists() and name.partition("/")[0].lower() in PREFIXES and "/" in name:
        data = _timm(name, _parse_options(spec, options))
    else:
        data = _folder(spec)
    if len(data.classes) < 2:
        raise DataError(f"data {spec!r} has only one class ({data.classes[0]}); at least two are needed")
    cut_data = pools(data.train, data.held_out, seed)
    return Source(
        name=spec,
        classes=data.classes,
        embedded=False,
        native_size=None,
        train=cut_data.train,
        select=cut_data.select,
        held_out=cut_data.held_out,
        skip_corrupt=skip_corrupt,
        notes=data.notes,
        select_from=cut_data.select_from,
        other_order=data.other_order,
    )


def is_embedded(spec: str) -> bool:
    """Whether `spec` names data that come with the package, so that they cannot be elsewhere."""
    return spec.partition(":")[0] in _EMBEDDED


def read_files(names: Sequence[str], preprocessing: Preprocessing) -> Tensor:
    """Image files as a model's inputs, (n, channels, height, width); `DataError` names one that cannot be read."""
    samples = Samples.of(names, np.zeros(len(names), dtype=np.int64), Files(Path(), tuple(names)))
    try:
        store = read_images(samples, preprocessing, skip_corrupt=False).store
    except DataError as error:
        raise DataError(
            f"{str(error).partition('; replace')[0]}; expected image files, such as .png or .jpg"
        ) from error
    return next(iter(ImageBatches(store, len(names))))[0]


def restricted(source: Source, classes: Sequence[str], seed: int = 0) -> Source:
    """`source` with only `classes`, which are numbered in that order.

    What was held out stays so. Of embedded data, which baselines are trained on, every pool is the same but smaller; of
    a user's, select is cut anew where classes are left out, since its limit is meant for the classes that there are.
    Raises `DataError` for a name that `source` does not have.
    """
    if tuple(classes) == source.classes:
        return source
    check_classes(source, classes)
    number = np.full(len(source.classes), -1)
    number[[source.classes.index(name) for name in classes]] = np.arange(len(classes))
    train, select, held_out = (_renumbered(pool, number) for pool in (source.train, source.select, source.held_out))
    smaller = replace(source, classes=tuple(classes), train=train, select=select, held_out=held_out, other_order=())
    return smaller if source.embedded or set(classes) == set(source.classes) else _cut_anew(smaller, seed)


def check_classes(source: Source, classes: Sequence[str]) -> None:
    """Raise `DataError` for a name that `source` does not have."""
    for name in classes:
        if name not in source.classes:
            raise DataError(short(unknown(f"class of data {source.name!r}:", name, source.classes), 400))


def _cut_anew(source: Source, seed: int) -> Source:
    """A user's data with another select pool, cut from where the present one came from."""
    if source.select_from == "held-out":
        cut_data = pools(source.train, source.held_out.joined(source.select), seed)
    else:
        cut_data = pools(source.train.joined(source.select), source.held_out, seed)
    whole = source.select_from == "everything" and cut_data.select_from == "train"
    return replace(
        source,
        train=cut_data.train,
        select=cut_data.select,
        held_out=cut_data.held_out,
        select_from="everything" if whole else cut_data.select_from,
    )


def _renumbered(samples: Samples, number: Integers) -> Samples:
    """Samples whose label has a `number` (classes,), under it; the others have -1."""
    kept = samples.take(np.flatnonzero(number[samples.labels] >= 0))
    return replace(kept, labels=number[kept.labels])


@dataclass(frozen=True, eq=False)
class _Arrays:
    """Reads images from memory, (n, height, width, 3) uint8."""

    images: NDArray[np.uint8]

    def __call__(self, position: int) -> Image.Image:
        return Image.fromarray(self.images[position])


def _parse_options(spec: str, text: str) -> dict[str, str]:
    """ "a=1,b=2" as a mapping."""
    options: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, sign, value = part.partition("=")
        if not sign or not value or key in options:
            raise DataError(f"data {spec!r}: cannot read option {part!r}; expected each option once, as NAME=VALUE")
        options[key] = value
    return options


def _digits(spec: str, options: Mapping[str, str]) -> Source:
    _no_options(spec, options)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = (bunch.images * (255 / 16)).round().astype(np.uint8)
    ids = [f"digits/{index}" for index in range(len(grey))]
    everything = Samples.of(ids, bunch.target.astype(np.int64), _Arrays(np.repeat(grey[..., None], 3, axis=3)))
    train, select, held_out = cut(everything, _DIGITS_SIZES, np.random.default_rng(0))
    classes = tuple(str(name) for name in bunch.target_names)
    return Source(spec, classes, True, _EMBEDDED_SIZE, train, select, held_out, limits=_DIGITS_LIMITS)


def _spiral(spec: str, options: Mapping[str, str]) -> Source:
    _no_options(spec, options)
    points, labels = spiral.spiral_arrays()
    everything = Samples.of([f"spiral/{index}" for index in range(len(points))], labels, Numbers(points))
    train, select, held_out = cut(everything, _SPIRAL_SIZES, np.random.default_rng(0))
    return Source(spec, spiral.CLASSES, True, points.shape[1:], train, select, held_out, limits=_GLYPHS_LIMITS)


def _glyphs(spec: str, options: Mapping[str, str]) -> Source:
    def part(name: str, count: int) -> Samples:
        images, labels = glyphs.glyph_arrays(name, count)
        return Samples.of([f"glyphs/{name}/{index}" for index in range(count)], labels, _Arrays(images))

    train, select, held_out = (part(name, count) for name, count in _sizes(spec, options, _GLYPHS_SIZES))
    shape = _EMBEDDED_SIZE
    return Source(
        spec, glyphs.CLASSES, True, shape, train, select, held_out, limits=_GLYPHS_LIMITS, mask=glyphs.covered
    )


def _dna(spec: str, options: Mapping[str, str]) -> Source:
    def part(name: str, count: int) -> Samples:
        letters, labels = dna.dna_arrays(name, count)
        return Samples.of([f"dna/{name}/{index}" for index in range(count)], labels, Numbers(letters))

    train, select, held_out = (part(name, count) for name, count in _sizes(spec, options, _DNA_SIZES))
    return Source(
        spec,
        dna.CLASSES,
        True,
        (4, dna.LENGTH),
        train,
        select,
        held_out,
        limits=_GLYPHS_LIMITS,
        mask=dna.planted,
        letters=dna.LETTERS,
    )


def _no_options(spec: str, options: Mapping[str, str]) -> None:
    if options:
        raise DataError(f"data {spec.partition(':')[0]!r} has no options; given: {spec!r}")


def _sizes(spec: str, options: Mapping[str, str], usual: Mapping[str, int]) -> list[tuple[str, int]]:
    """Parts of data that are made to measure, as their makers name them, and how many samples of each are wanted."""
    name = spec.partition(":")[0]
    for key, value in options.items():
        if key not in usual:
            raise DataError(str(unknown(f"option of data {name!r}:", key, usual)))
        if not value.isdecimal() or int(value) < 1:
            raise DataError(f"option {key!r} of data {name!r} is {value!r}; expected a whole number from 1")
    return [(key.replace("_", "-"), int(options.get(key, count))) for key, count in usual.items()]


_EMBEDDED: dict[str, Callable[[str, Mapping[str, str]], Source]] = {
    "digits": _digits,
    "glyphs": _glyphs,
    "spiral": _spiral,
    "dna": _dna,
}


def _folder(spec: str) -> UserData:
    return open_folder(spec, [*_EMBEDDED, *(f"{prefix}/NAME" for prefix in PREFIXES)])


def _timm(name: str, options: Mapping[str, str]) -> UserData:
    if name.lower() in ("torch/image_folder", "torch/folder"):
        if list(options) != ["root"]:
            raise DataError(f"data {name!r} takes one option, its folder; expected {name}:root=DIR")
        return _folder(options["root"])  # timm would take the whole folder for both halves without val/
    classes, train, held_out, notes = timm_pools(name, options)
    return UserData(classes, train, held_out, notes)
