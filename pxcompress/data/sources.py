"""Where labelled data come from: an embedded set, a folder of images, or a data set that timm knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from pxcompress.data.arrays import is_arrays, open_arrays
from pxcompress.data.batches import ImageBatches, read_images
from pxcompress.data.boxes import FILES, open_boxes
from pxcompress.data.embedded import EMBEDDED
from pxcompress.data.factory import is_factory, open_factory
from pxcompress.data.folder import Files, open_folder, open_folder_images
from pxcompress.data.samples import LEAST_OF_A_ROLE, Integers, Layout, Samples, Source, UserData, cut_pools
from pxcompress.data.tables import SUFFIXES, open_listed, open_table
from pxcompress.data.texts import SUFFIX, open_lines
from pxcompress.data.timm_sources import PREFIXES, timm_pools
from pxcompress.errors import DataError, short, unknown
from pxcompress.models.onnx_file import Ports
from pxcompress.types import Preprocessing


def open_images(spec: str) -> Samples:
    """Every image below a folder, or listed in a table, by path. All labels are -1: unknown.

    Raises `DataError` where there are none.
    """
    return open_listed(spec) if _is_table(spec) else open_folder_images(spec)


def _is_table(spec: str) -> bool:
    return spec.lower().endswith(SUFFIXES) and not Path(spec).expanduser().is_dir()


def open_source(
    spec: str,
    *,
    skip_corrupt: bool = False,
    seed: int = 0,
    layout: Layout | None = None,
    ports: Ports | None = None,
) -> Source:
    """The data that `spec` names; with `layout` "unlabelled", any images below a folder, without targets.

    `digits`; `spiral`; `glyphs`, `glyph-masks`, `glyph-counts`, `glyph-labels`, `glyph-identities` and `dna`, also
    smaller, `glyphs:train=640,select=80,held_out=160`; a folder in
    ImageFolder layout, with or without train/ and val/; `hfds/NAME`, `torch/NAME`, `wds/NAME`, `tfds/NAME`, with
    options as in `hfds/uoft-cs/cifar10:input_key=img,val=test`; a folder with images/ and masks/, or with boxes (COCO,
    YOLO, Pascal VOC); a folder of image files; a table, .csv or .jsonl; a .txt file of one text a line;
    arrays, .npz by the names of inputs or .npy, and folders of such; `package.module:factory`, a data set of the
    user's. `ports` are the inputs of the ONNX file that arrays and factories are for.
    `seed` cuts the pools of a user's data; those of embedded data are always the same, so that a baseline trained once
    never meets its training images again. Raises `DataError`.
    """
    if layout not in (None, "unlabelled"):
        raise DataError(f"layout {layout!r}; expected 'unlabelled', or none to see from the data what they hold")
    if layout == "unlabelled" and not Path(spec).expanduser().is_dir():
        raise DataError(f"data {spec!r} is no folder; the layout 'unlabelled' takes folders of images")
    if spec.partition(":")[0] in EMBEDDED and layout is None:
        source = EMBEDDED.build(spec).source(spec)
        return replace(source, outputs=0 if source.layout == "identities" else len(source.classes))
    data = _user_data(spec, layout, ports)
    if data.layout == "classes" and len(data.classes) < 2:
        raise DataError(f"data {spec!r} has only one class ({data.classes[0]}); at least two are needed")
    cut_data = cut_pools(data.train, data.held_out, seed)
    return Source(
        name=spec,
        classes=data.classes,
        embedded=False,
        native_size=data.native_size,
        train=cut_data.train,
        select=cut_data.select,
        held_out=cut_data.held_out,
        skip_corrupt=skip_corrupt,
        notes=data.notes,
        select_from=cut_data.select_from,
        other_order=data.other_order,
        layout=data.layout,
        outputs=data.outputs,
        inputs=data.inputs,
    )


def _user_data(spec: str, layout: Layout | None, ports: Ports | None) -> UserData:
    name, _, options = spec.partition(":")
    if not Path(spec).exists() and name.partition("/")[0].lower() in PREFIXES and "/" in name:
        return _timm(name, _parse_options(spec, options))
    if spec.lower().endswith(SUFFIX) and not Path(spec).expanduser().is_dir():
        return open_lines(spec)
    if _is_table(spec):
        return open_table(spec)
    if is_factory(spec) and not Path(spec).exists():
        return open_factory(spec, ports)
    if is_arrays(spec):
        return open_arrays(spec, ports)
    path = Path(spec).expanduser()
    has_boxes = layout is None and (path.is_dir() or (path.is_file() and spec.lower().endswith(FILES)))
    data = open_boxes(spec, path) if spec and has_boxes else None
    return _folder(spec, layout) if data is None else data


def read_files(names: Sequence[str], preprocessing: Preprocessing) -> Tensor:
    """Image files as the inputs of a model, (n, channels, height, width).

    `DataError` names a file that cannot be read.
    """
    samples = Samples.of(names, np.zeros(len(names), dtype=np.int64), Files(Path(), tuple(names)))
    try:
        store = read_images(samples, preprocessing, skip_corrupt=False).store
    except DataError as error:
        raise DataError(
            f"{str(error).partition('; replace')[0]}; expected image files, such as .png or .jpg"
        ) from error
    return next(iter(ImageBatches(store, len(names))))[0]


def restrict_classes(source: Source, classes: Sequence[str], seed: int = 0) -> Source:
    """`source` with the samples of `classes` only, numbered in that order.

    What was held out stays so. Of embedded data, which baselines are trained on, every pool is the same but smaller; of
    a user's, select is cut anew where classes are left out, since its limit is meant for the classes that there are.
    Raises `DataError` for a name that `source` does not have.
    """
    if tuple(classes) == source.classes:
        return source
    check_classes(source, classes)
    number = np.full(len(source.classes), -1)
    number[[source.classes.index(name) for name in classes]] = np.arange(len(classes))
    train, select, held_out = (_renumber(pool, number) for pool in (source.train, source.select, source.held_out))
    restricted_source = replace(
        source,
        classes=tuple(classes),
        outputs=len(classes),
        train=train,
        select=select,
        held_out=held_out,
        other_order=(),
    )
    return (
        restricted_source
        if source.embedded or set(classes) == set(source.classes)
        else _cut_anew(restricted_source, seed)
    )


def extend_classes(source: Source, classes: Sequence[str]) -> Source:
    """`source` with its labels renumbered to `classes`, which contains all of its class names and further ones."""
    number = np.array([classes.index(name) for name in source.classes])
    train, select, held_out = (_renumber(pool, number) for pool in (source.train, source.select, source.held_out))
    return replace(
        source,
        classes=tuple(classes),
        outputs=len(classes),
        train=train,
        select=select,
        held_out=held_out,
        other_order=(),
    )


def keep_for_certificates(source: Source) -> Source:
    """`source` with almost all samples moved to the role certify; other roles get only the few that they need.

    That is for models that have seen none of them. Data that came with a train and a held-out split stay as they are:
    the weights may have been trained on the train split.
    """
    spare = 2 * LEAST_OF_A_ROLE
    if source.select_from != "everything" or len(source.select) < 2 * spare:
        return source
    everything = source.train.join(source.held_out)
    few = dict.fromkeys(("score", "repair", "test"), LEAST_OF_A_ROLE)
    return replace(
        source,
        train=source.select.take(np.arange(spare)),
        select=source.select.take(np.arange(spare, len(source.select))),
        held_out=everything,
        limits={**source.limits, "certify": len(everything), **few},
    )


def check_classes(source: Source, classes: Sequence[str]) -> None:
    """Raise `DataError` for a class name that `source` does not have, or if its targets are no classes."""
    if source.layout != "classes":
        raise DataError(f"data {source.name!r} hold {source.layout}, no class per image; no classes can be chosen")
    for name in classes:
        if name not in source.classes:
            raise DataError(short(unknown(f"class of data {source.name!r}:", name, source.classes), 400))


def _cut_anew(source: Source, seed: int) -> Source:
    """A user's data with a new select pool, cut from the data that the present one was cut from."""
    if source.select_from == "held-out":
        cut_data = cut_pools(source.train, source.held_out.join(source.select), seed)
    else:
        cut_data = cut_pools(source.train.join(source.select), source.held_out, seed)
    is_cut_from_everything = source.select_from == "everything" and cut_data.select_from == "train"
    return replace(
        source,
        train=cut_data.train,
        select=cut_data.select,
        held_out=cut_data.held_out,
        select_from="everything" if is_cut_from_everything else cut_data.select_from,
    )


def _renumber(samples: Samples, number: Integers) -> Samples:
    """The samples whose old class has a new number, relabelled: `number` (classes,) has -1 for classes to drop."""
    samples_kept = samples.take(np.flatnonzero(number[samples.labels] >= 0))
    return replace(samples_kept, labels=number[samples_kept.labels])


def _parse_options(spec: str, text: str) -> dict[str, str]:
    """ "a=1,b=2" as a mapping. Raises `DataError`."""
    options: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, sign, value = part.partition("=")
        if not sign or not value or key in options:
            raise DataError(f"data {spec!r}: cannot read option {part!r}; expected each option once, as NAME=VALUE")
        options[key] = value
    return options


def _folder(spec: str, layout: Layout | None = None) -> UserData:
    return open_folder(spec, [*EMBEDDED, *(f"{prefix}/NAME" for prefix in PREFIXES)], layout)


def _timm(name: str, options: Mapping[str, str]) -> UserData:
    if name.lower() in ("torch/image_folder", "torch/folder"):
        if list(options) != ["root"]:
            raise DataError(f"data {name!r} takes one option, its folder; expected {name}:root=DIR")
        return _folder(options["root"])  # timm would take the whole folder for both splits without val/
    classes, train, held_out, notes = timm_pools(name, options)
    return UserData(classes, train, held_out, notes, outputs=len(classes))
