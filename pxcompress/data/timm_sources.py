"""Data sets by timm's names: torch/NAME, hfds/NAME (Hugging Face), wds/NAME (WebDataset), tfds/NAME (TensorFlow).

Options: root (folder or URL the data lies at), train and val (names of the splits), input_key and target_key (columns).
"""

from __future__ import annotations

import importlib.util
import io
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.dataset_factory import create_dataset

from pxcompress.cache import cache_dir
from pxcompress.data.samples import Integers, Samples
from pxcompress.errors import DataError, unknown

# Prefix -> the package that reads it.
PREFIXES = {
    "hfds": "datasets",
    "hfids": "datasets",
    "tfds": "tensorflow_datasets",
    "torch": "torchvision",
    "wds": "webdataset",
}
_STREAMS = ("hfids", "tfds", "wds")
_OPTIONS = ("root", "train", "val", "input_key", "target_key")
# Small enough to be fetched without asking; of the others `root` has to hold the files.
_FETCHED = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_HELD_OUT_SPLITS = ("validation", "val", "test")
_FAILURES = (OSError, RuntimeError, ValueError, AssertionError, KeyError, ImportError)

STREAM_LIMIT = 10_000
"""Most samples read from each split of a stream, which has no random access, so that they are copied to a file."""

_Pools = tuple[tuple[str, ...], Samples, Samples | None, tuple[str, ...]]


def timm_pools(name: str, options: Mapping[str, str]) -> _Pools:
    """Class names, train samples, held-out samples (None without such a split) and notes of the data set PREFIX/NAME.

    Raises `DataError` where an option is unknown, the reader's package is missing, or the data cannot be had.
    """
    prefix, _, dataset_name = name.partition("/")
    prefix = prefix.lower()
    for key in options:
        if key not in _OPTIONS:
            raise DataError(str(unknown(f"option of data {name!r}:", key, _OPTIONS)))
    package = PREFIXES[prefix]
    if importlib.util.find_spec(package) is None:
        raise DataError(f"data {name!r} needs the package {package!r}; install it with: pip install {package}")
    settings: dict[str, Any] = {key: options[key] for key in ("input_key", "target_key") if key in options}
    settings["root"] = options.get("root") or (str(cache_dir() / "datasets") if prefix == "torch" else None)
    if prefix == "wds" and settings["root"] is None:
        raise DataError(f"data {name!r} needs the folder or URL of its shards; expected {name}:root=DIR")
    if prefix == "torch" and dataset_name.lower() in _FETCHED:
        settings["download"] = True
    train = _open(name, options.get("train", "train"), settings)
    held_out = _open_held_out(name, options, settings)
    read_samples = _read_stream if prefix in _STREAMS else _read_indexed
    with _explain_errors(name, "train"):
        train_samples, classes = read_samples(train, f"{name}/train")
    with _explain_errors(name, "held-out"):
        held_out_samples = None if held_out is None else read_samples(held_out, f"{name}/held-out")[0]
    labels = [train_samples.labels, *([] if held_out_samples is None else [held_out_samples.labels])]
    names = _class_names(name, np.concatenate(labels), classes)
    notes = {
        f"data {name!r} is a stream: at most {STREAM_LIMIT} samples of a split are used": prefix in _STREAMS,
        f"data {name!r} has no split {', '.join(_HELD_OUT_SPLITS)}: all roles are cut from 'train'": held_out is None,
    }
    return names, train_samples, held_out_samples, tuple(note for note, applies in notes.items() if applies)


@dataclass(frozen=True, eq=False)
class _Items:
    """Reads images from a data set with random access.

    timm's own indexing would replace damaged ones without a word.
    """

    dataset: Any

    def __call__(self, position: int) -> Image.Image:
        reader = getattr(self.dataset, "reader", None)
        if reader is None:
            image: Image.Image = self.dataset[position][0]
            return image
        with reader[position][0] as file, Image.open(file) as image:
            image.load()
        return image


class _Spool:
    """Reads images that were written as PNG one after another into a file, which is deleted with this object."""

    def __init__(self, path: Path, ends: Sequence[int]) -> None:
        self.path, self.ends = path, ends
        weakref.finalize(self, path.unlink, missing_ok=True)

    def __call__(self, position: int) -> Image.Image:
        start = self.ends[position - 1] if position else 0
        with self.path.open("rb") as file:
            file.seek(start)
            image = Image.open(io.BytesIO(file.read(self.ends[position] - start)))
        image.load()
        return image


def _open(name: str, split: str, settings: Mapping[str, Any]) -> Any:
    with _explain_errors(name, split):
        return create_dataset(name, split=split, **settings)


@contextmanager
def _explain_errors(name: str, split: str) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data {name!r}, split {split!r}, cannot be had ({reason}); check the name, options such as "
            f"{name}:root=DIR,train=SPLIT,val=SPLIT, and the connection"
        ) from error


def _open_held_out(name: str, options: Mapping[str, str], settings: Mapping[str, Any]) -> Any:
    """The split that the option `val` names, else the first of the usual ones that exists, else None."""
    if "val" in options:
        return _open(name, options["val"], settings)
    for split in _HELD_OUT_SPLITS:
        try:
            return _open(name, split, settings)
        except DataError:
            continue
    return None


def _read_indexed(dataset: Any, prefix: str) -> tuple[Samples, tuple[str, ...]]:
    """Samples of a torchvision or Hugging Face data set; labels are read without opening images."""
    reader = getattr(dataset, "reader", None)
    labels = dataset.targets if reader is None else reader.dataset[reader.label_key]
    classes = dataset.classes if reader is None else sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    ids = [f"{prefix}/{index}" for index in range(len(dataset))]
    return Samples.of(ids, np.array(labels, dtype=np.int64), _Items(dataset)), tuple(classes)


def _read_stream(dataset: Iterable[tuple[Image.Image, int]], prefix: str) -> tuple[Samples, tuple[str, ...]]:
    """The first `STREAM_LIMIT` samples of a stream, copied to a temporary file."""
    ends: list[int] = []
    labels: list[int] = []
    handle, path = tempfile.mkstemp(prefix="pxcompress-", suffix=".png-spool")
    with os.fdopen(handle, "wb") as file:
        spool = _Spool(Path(path), ends)
        for image, label in islice(dataset, STREAM_LIMIT):
            image.save(file, "PNG", compress_level=1)
            ends.append(file.tell())
            labels.append(int(label))
    ids = [f"{prefix}/{index}" for index in range(len(ends))]
    mapping: Mapping[str, int] = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    return Samples.of(ids, np.array(labels, dtype=np.int64), spool), tuple(sorted(mapping, key=mapping.__getitem__))


def _class_names(name: str, labels: Integers, classes: tuple[str, ...]) -> tuple[str, ...]:
    """`classes` if given, else numbers up to the largest label.

    Raises `DataError` for labels outside of the classes.
    """
    if not len(labels):
        raise DataError(f"data {name!r} has no images; give other splits as {name}:train=SPLIT,val=SPLIT")
    low, high = int(labels.min()), int(labels.max())
    names = tuple(str(item) for item in classes) or tuple(str(index) for index in range(high + 1))
    if low < 0 or high >= len(names):
        raise DataError(
            f"data {name!r} has labels from {low} to {high} for {len(names)} classes (-1: a split without labels); "
            f"give a labelled split as {name}:val=SPLIT"
        )
    return names
