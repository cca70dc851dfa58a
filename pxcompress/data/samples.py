"""Pools of samples, and how the parts of the data are drawn from them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pxcompress.data.targets import Targets
from pxcompress.deploy.predict import eight_bits
from pxcompress.errors import DataError
from pxcompress.tasks.task import Layout as Layout
from pxcompress.types import Input

Integers = NDArray[np.int64]

# What Pillow raises for damaged files; it has no common base class for it.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

USER_LIMITS = {"score": 512, "repair": 1024, "select": 1000, "certify": 5000}
LEAST_OF_A_ROLE = 2
"""Fewest samples that each role (score, repair, select, certify, test) needs."""
MIN_HELD_OUT_TO_SPLIT = 500
"""Number of held-out samples from which on the select pool is cut from them; with fewer it is cut from `train`."""

Origin = Literal["held-out", "train", "everything"]
"""Where the select pool was cut from: held-out data, training data, or data that came in one piece."""


@dataclass(frozen=True, eq=False)
class Numbers:
    """Inputs that are no images: an array `values` (n, ...), from which samples are taken by position, unchanged."""

    values: NDArray[np.generic]
    noun: ClassVar[str] = "samples"

    def __call__(self, position: int) -> Image.Image:
        raise DataError(f"inputs of shape {self.values.shape[1:]} are no images; read their values")


@dataclass(frozen=True, eq=False)
class Samples:
    """A list of inputs and labels. `ids[i]` is unique within the data, `labels[i]` a class number, (n,) int64.

    `read(positions[i])` opens image i in whatever mode it has; `Numbers` hold inputs that are no images. `targets`
    gives the target of a sample where it is no class; labels are zeros then.
    """

    ids: tuple[str, ...]
    labels: Integers
    read: Callable[[int], Image.Image]
    positions: Integers
    targets: Targets | None = None

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        labels: Integers,
        read: Callable[[int], Image.Image],
        targets: Targets | None = None,
    ) -> Samples:
        """Samples for all positions 0, 1, ... that `read` can open, one for each id."""
        return cls(tuple(ids), labels, read, np.arange(len(ids)), targets)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def noun(self) -> str:
        """Word for the inputs in messages, such as "images"."""
        noun: str = getattr(self.read, "noun", "images")
        return noun

    def take(self, indices: Integers) -> Samples:
        """The samples at `indices`, in that order."""
        ids = tuple(self.ids[index] for index in indices)
        return replace(self, ids=ids, labels=self.labels[indices], positions=self.positions[indices])

    def join(self, other: Samples) -> Samples:
        """These samples, then those of `other`, which are read in the same way."""
        labels = np.concatenate([self.labels, other.labels])
        positions = np.concatenate([self.positions, other.positions])
        return replace(self, ids=self.ids + other.ids, labels=labels, positions=positions)

    def load(self, index: int) -> Image.Image:
        """Image `index`, decoded, RGB or RGBA. Raises `DataError` where it cannot be read."""
        return self.open_image(index)[0]

    def open_image(self, index: int) -> tuple[Image.Image, bool]:
        """Image `index` as RGB or RGBA, and whether it had more than 8 bits a channel. Raises as `load` does."""
        try:
            image = self.read(int(self.positions[index]))
            return eight_bits(image), image.mode[0] in "IF"
        except _UNREADABLE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"image {self.ids[index]!r} cannot be read ({reason}); "
                "replace it, or leave such images out with --skip-corrupt"
            ) from error


@dataclass(frozen=True, eq=False)
class UserData:
    """A user's data before they are cut into pools; fields named as in `Source` mean the same."""

    classes: tuple[str, ...]
    train: Samples
    held_out: Samples | None
    notes: tuple[str, ...] = ()
    other_order: tuple[str, ...] = ()
    layout: Layout = "classes"
    outputs: int | None = None
    native_size: tuple[int, ...] | None = None
    inputs: tuple[Input, ...] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """Data in three disjoint pools, before anything is known about the model.

    `train`: score and repair are drawn from it, and baselines are trained on it; `select`: as it is; `held_out`:
    certify and test. `embedded` data comes without a model, so that a baseline gets trained; it is meant for inputs of
    `native_size`: the side of an image in pixels, or the shape of an input that is none. `limits`: samples per role
    where the caller asks for nothing else; test has no limit. `mask` gives, by sample id, the positions of an input
    that make its class, where the data know them; `letters` are what the channels of one-hot inputs stand for.
    `other_order` has the classes as timm numbers those of a folder, where that differs from `classes`. `layout` says
    what the targets are, `classes` what they are named: classes, labels or columns; `outputs` is how many outputs a
    model needs for them, where the data tell. `inputs` are several that are packed in every sample.
    """

    name: str
    classes: tuple[str, ...]
    embedded: bool
    native_size: int | tuple[int, ...] | None
    train: Samples
    select: Samples
    held_out: Samples
    limits: Mapping[str, int] = field(default_factory=lambda: dict(USER_LIMITS))
    skip_corrupt: bool = False
    notes: tuple[str, ...] = ()
    mask: Callable[[str], NDArray[np.bool_]] | None = None
    letters: str = ""
    select_from: Origin = "held-out"
    other_order: tuple[str, ...] = ()
    layout: Layout = "classes"
    outputs: int | None = None
    inputs: tuple[Input, ...] = ()


def choose_layout(possible: Sequence[Layout], wanted: Sequence[Layout]) -> Layout:
    """The first possible layout of some targets that is wanted; the first of all if none is."""
    return next((layout for layout in possible if layout in wanted), possible[0])


def draw_order(labels: Integers, rng: np.random.Generator, *, balanced: bool) -> Integers:
    """A random order of samples whose every beginning has the classes mixed well.

    `balanced`: every class equally often for as long as it lasts; else every class by its share of the samples.
    """
    permutation = rng.permutation(len(labels))
    labels_in_order = labels[permutation]
    key = np.empty(len(labels))
    for label in np.unique(labels_in_order):
        members = np.flatnonzero(labels_in_order == label)
        ranks = np.arange(len(members))
        key[members] = ranks if balanced else (ranks + rng.uniform()) / len(members)
    return permutation[np.argsort(key, kind="stable")]


def cut(
    samples: Samples, sizes: Sequence[int], rng: np.random.Generator, *, balanced: bool = False
) -> tuple[Samples, ...]:
    """Disjoint random parts of the given sizes, each stratified by class.

    If `sizes` exceed the samples, the last parts overlap.
    """
    order = draw_order(samples.labels, rng, balanced=balanced)
    ends = np.minimum(np.cumsum(sizes), len(order))
    return tuple(samples.take(order[max(0, end - size) : end]) for size, end in zip(sizes, ends, strict=True))


@dataclass(frozen=True, eq=False)
class Pools:
    """A user's data in disjoint pools; `select_from` says where the select pool comes from, as in `Source`."""

    train: Samples
    select: Samples
    held_out: Samples
    select_from: Origin


def cut_pools(train: Samples, held_out: Samples | None, seed: int) -> Pools:
    """Train, select and held-out pools of a user's data; without held-out data everything comes from `train`.

    Select gets 20 % of the held-out data where these are `MIN_HELD_OUT_TO_SPLIT` samples or more, else 15 % of
    `train`; at most 1000. Held-out data, where it has to be cut, gets 40 % of the rest.
    """
    rng = np.random.default_rng(seed)
    if held_out is not None and len(held_out) >= MIN_HELD_OUT_TO_SPLIT:
        select = min(USER_LIMITS["select"], round(0.2 * len(held_out)))
        train_pool, select_pool = cut(held_out, (len(held_out) - select, select), rng)
        return Pools(train, select_pool, train_pool, "held-out")
    select = min(USER_LIMITS["select"], round(0.15 * len(train)))
    if held_out is not None:
        train_pool, select_pool = cut(train, (len(train) - select, select), rng)
        return Pools(train_pool, select_pool, held_out, "train")
    held_out_size = int(0.4 * (len(train) - select))
    train_pool, select_pool, kept_back = cut(train, (len(train) - select - held_out_size, select, held_out_size), rng)
    return Pools(train_pool, select_pool, kept_back, "everything")
