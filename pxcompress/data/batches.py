"""Batches of images that can be iterated repeatedly: kept decoded in memory if they fit, else read again each time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pxcompress.data.resizing import Resize
from pxcompress.data.samples import Integers, Numbers, Samples
from pxcompress.data.targets import Masks
from pxcompress.data.texts import Texts
from pxcompress.errors import DataError
from pxcompress.types import Batch, Preprocessing

_MEMORY_BYTES = 200_000_000  # kept in memory up to this size: 1300 images of 224 x 224, or the glyphs' train pool
_WORKERS_FROM = 256  # samples; below, starting worker processes takes longer than they save
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Number of channels of an image -> the mode in which Pillow opens it."""


class ImageBatches:
    """Batches (inputs, targets) that can be iterated repeatedly. `samples` is the number of inputs of one iteration.

    With `shuffle_seed`, every iteration has a new order, and an incomplete last batch is left out (unless it is the
    only one): BatchNorm cannot be trained on one sample.
    """

    def __init__(self, store: Store, batch_size: int, shuffle_seed: int | None = None) -> None:
        self._store = store
        self._batch_size = batch_size
        self._shuffle_seed = shuffle_seed
        self._epoch = 0
        samples_in_whole_batches = len(store) - len(store) % batch_size
        self.samples = samples_in_whole_batches if shuffle_seed is not None and samples_in_whole_batches else len(store)

    def __len__(self) -> int:
        return -(-self.samples // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.arange(len(self._store))
        if self._shuffle_seed is not None:
            rng = np.random.default_rng([self._shuffle_seed, self._epoch])
            order = torch.from_numpy(rng.permutation(len(order)))
            self._epoch += 1
        return self._store.batches(order[: self.samples].split(self._batch_size))


@dataclass(frozen=True, eq=False)
class Reading:
    """The result of reading every image once: where to get the images, and what was noticed about them.

    `damaged` are ids of those left out; `digests` are equal for equal images or texts, one for each sample of the store
    (none for other inputs); `deep` counts images with more than 8 bits a channel, `cut` texts that are longer than the
    model takes.
    """

    store: Store
    damaged: tuple[str, ...] = ()
    digests: tuple[bytes, ...] = ()
    deep: int = 0
    cut: int = 0


def read_images(samples: Samples, preprocessing: Preprocessing, skip_corrupt: bool) -> Reading:
    """Reads every image once. Raises `DataError` for a damaged image unless `skip_corrupt`."""
    if isinstance(samples.read, Numbers):
        return Reading(_numbers(samples, samples.read, preprocessing))
    if isinstance(samples.read, Texts):
        return _read_texts(samples, samples.read, preprocessing)
    images = _Images(samples, preprocessing)
    small = _fits(samples, preprocessing)
    with ThreadPoolExecutor(_cores()) as threads:
        results = list(
            threads.map(images.read_with_pixels if small else images.read_without_pixels, range(len(samples)))
        )
    errors = [(index, result) for index, result in enumerate(results) if isinstance(result, DataError)]
    if errors and not skip_corrupt:
        raise errors[0][1]
    damaged_ids = tuple(samples.ids[index] for index, _ in errors)
    image_by_index = {index: result for index, result in enumerate(results) if not isinstance(result, DataError)}
    readable_samples = samples.take(np.array(list(image_by_index), dtype=np.int64))
    store: Store = _Lazy(_Images(readable_samples, preprocessing), _Normalize(preprocessing), skip_corrupt)
    if small:
        pixels = torch.stack([image.pixels for image in image_by_index.values()]) if image_by_index else torch.empty(0)
        targets = torch.stack([image.target for image in image_by_index.values()]) if image_by_index else torch.empty(0)
        store = _Stored(readable_samples, pixels, targets, _Normalize(preprocessing))
    digests = tuple(image.digest for image in image_by_index.values())
    return Reading(store, damaged_ids, digests, sum(image.deep for image in image_by_index.values()))


def read_later(samples: Samples, preprocessing: Preprocessing, skip_corrupt: bool) -> Store:
    """Like `read_images`, but images that do not fit into memory are opened only when their batch is needed.

    Damaged ones then raise `DataError` there, or are left out of their batch.
    """
    if isinstance(samples.read, Numbers | Texts) or _fits(samples, preprocessing):
        return read_images(samples, preprocessing, skip_corrupt).store
    return _Lazy(_Images(samples, preprocessing), _Normalize(preprocessing), skip_corrupt)


def _numbers(samples: Samples, numbers: Numbers, preprocessing: Preprocessing) -> Store:
    """Inputs that are no images, in memory. Raises `DataError` where their shape is not the model's."""
    values = torch.from_numpy(numbers.values[samples.positions])
    if values.shape[1:] != preprocessing.input_size:
        actual_shape, expected_shape = (
            "x".join(map(str, shape)) for shape in (values.shape[1:], preprocessing.input_size)
        )
        raise DataError(
            f"the data have inputs of shape {actual_shape}, the model takes {expected_shape}; give other data"
        )
    finite = values.flatten(1).isfinite().all(1)
    if not finite.all():
        number = int((~finite).nonzero()[0])
        raise DataError(
            f"input {samples.ids[number]!r} holds NaN or infinity; expected finite numbers: mend or remove it"
        )
    targets = torch.stack([_target(samples, index) for index in range(len(samples))]) if len(samples) else values[:0]
    return _Stored(samples, values, targets, Tensor.float)


def _read_texts(samples: Samples, texts: Texts, preprocessing: Preprocessing) -> Reading:
    """Texts as token ids, in memory. Raises `DataError` where the model has no tokenizer."""
    if preprocessing.tokenizer is None:
        shape = "x".join(map(str, preprocessing.input_size))
        raise DataError(f"the data are texts, the model takes inputs of shape {shape}; give a model with a tokenizer")
    values = [texts.values[position] for position in samples.positions]
    tokens, cut = preprocessing.tokenizer.encode(values)
    targets = torch.stack([_target(samples, index) for index in range(len(samples))]) if values else tokens[:0]
    digests = tuple(hashlib.sha256(repr(text).encode()).digest() for text in values)
    return Reading(_Stored(samples, tokens, targets, Tensor.float), digests=digests, cut=cut)


def _target(samples: Samples, index: int, size: tuple[int, int] | None = None, resize: Resize | None = None) -> Tensor:
    """The target of sample `index`: its class, or what the data's own targets give."""
    if samples.targets is None:
        return torch.tensor(samples.labels[index])
    return samples.targets(int(samples.positions[index]), size, resize)


@dataclass(frozen=True, eq=False)
class _ImageRecord:
    """The content of one image file: its resized `pixels`, or an empty tensor if they were not asked for, its target,
    a `digest` that is equal for equal images, and whether it has more than 8 bits a channel (`deep`).
    """

    pixels: Tensor
    target: Tensor
    digest: bytes
    deep: bool


class _Images(Dataset[tuple[Tensor, Tensor] | DataError]):
    """A data set of resized and cropped images, (C, H, W) uint8, with targets.

    A damaged image is returned as its error: raised in a worker process, it would arrive with the worker's traceback as
    its message.
    """

    def __init__(self, samples: Samples, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing
        if not preprocessing.is_image:
            shape = "x".join(map(str, preprocessing.input_size))
            raise DataError(f"the model takes inputs of shape {shape}, the data are images; give other data")
        channels = preprocessing.input_size[0]
        if channels not in _MODES:
            raise DataError(f"the model takes {channels} channels; images have 1 (grey), 3 (RGB) or 4 (RGBA)")
        self.samples = samples
        self._mode = _MODES[channels]
        self._resize = Resize(preprocessing)

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, indices: Integers) -> _Images:
        """The images at `indices`, in that order."""
        return _Images(self.samples.take(indices), self._preprocessing)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | DataError:
        try:
            image = self.samples.load(index)
            target = _target(self.samples, index, image.size, self._resize)
        except DataError as error:
            return error
        return self._resize_image(image), target

    def read_with_pixels(self, index: int) -> _ImageRecord | DataError:
        """The image's record with its pixels, or the error that says why it cannot be read."""
        return self._examine(index, self._resize_image)

    def read_without_pixels(self, index: int) -> _ImageRecord | DataError:
        """The image's record without its pixels, or the error that says why it cannot be read."""
        return self._examine(index, lambda image: torch.empty(0))

    def _examine(self, index: int, pixels_of: Callable[[Image.Image], Tensor]) -> _ImageRecord | DataError:
        try:
            image, deep = self.samples.open_image(index)
            target = _target(self.samples, index, image.size, self._resize)
        except DataError as error:
            return error
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        return _ImageRecord(pixels_of(image), target, digest, deep)

    def _resize_image(self, image: Image.Image) -> Tensor:
        return self._resize.image(image.convert(self._mode))


class _Normalize:
    """Converts uint8 (n, C, H, W) to float32, (x / 255 - mean) / std, exactly as torchvision's ToTensor and
    Normalize.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._mean = torch.tensor(preprocessing.mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(preprocessing.std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)


@dataclass(frozen=True, eq=False)
class _Stored:
    """Samples in memory: decoded images, (n, C, H, W) uint8, or other inputs, and their targets, (n, ...)."""

    samples: Samples
    pixels: Tensor
    targets: Tensor
    normalize: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, indices: Integers) -> Store:
        """The samples at `indices`, in that order."""
        index = torch.from_numpy(indices)
        samples = self.samples.take(indices)
        return replace(self, samples=samples, pixels=self.pixels[index], targets=self.targets[index])

    def batches(self, chunks: Sequence[Tensor]) -> Iterator[Batch]:
        for chunk in chunks:
            yield self.normalize(self.pixels[chunk]), self.targets[chunk]


@dataclass(frozen=True, eq=False)
class _Lazy:
    """Images that are read from disk in every iteration, by worker processes where that is faster."""

    images: _Images
    normalize: _Normalize
    skip_corrupt: bool

    @property
    def samples(self) -> Samples:
        return self.images.samples

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Integers) -> Store:
        """The samples at `indices`, in that order."""
        return replace(self, images=self.images.take(indices))

    def batches(self, chunks: Sequence[Tensor]) -> Iterator[Batch]:
        loader = DataLoader(
            self.images,
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=0 if _cores() <= 2 or len(self) < _WORKERS_FROM else min(8, _cores() - 1),
            collate_fn=_collate,
            generator=torch.Generator(),  # the default would draw from the global one and so change later draws
        )
        for pixels, targets, errors in loader:
            if errors and not self.skip_corrupt:
                raise errors[0]
            if len(targets):
                yield self.normalize(pixels), targets


Store = _Stored | _Lazy


def _collate(items: Sequence[tuple[Tensor, Tensor] | DataError]) -> tuple[Tensor, Tensor, list[DataError]]:
    readable_items = [item for item in items if not isinstance(item, DataError)]
    errors = [item for item in items if isinstance(item, DataError)]
    pixels = torch.stack([pixels for pixels, _ in readable_items]) if readable_items else torch.empty(0)
    targets = torch.stack([target for _, target in readable_items]) if readable_items else torch.empty(0)
    return pixels, targets, errors


def _fits(samples: Samples, preprocessing: Preprocessing) -> bool:
    size = int(np.prod(preprocessing.input_size))
    if isinstance(samples.targets, Masks):
        size += 8 * int(np.prod(preprocessing.input_size[-2:]))
    return len(samples) * size <= _MEMORY_BYTES


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
