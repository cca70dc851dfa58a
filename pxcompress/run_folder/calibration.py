"""Inputs on which an ONNX file is calibrated: images, or texts and several inputs for a file that pxcompress wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from pxcompress.data import open_source
from pxcompress.data.batches import ImageBatches, read_images
from pxcompress.data.samples import cut
from pxcompress.deploy.feeds import get_image_shape
from pxcompress.deploy.session import Session
from pxcompress.errors import InputError
from pxcompress.models.onnx_file import read_ports
from pxcompress.models.signature import perturbed_rows, read_signature
from pxcompress.run_folder.saved import preprocessing_of
from pxcompress.types import Batches, Preprocessing

CALIBRATION_IMAGES = 128
"""Number of calibration images, the same number of each class; with more, ranges of activations hardly change."""

_AT_ONCE = 16


def read_calibration(session: Session, data: str, input_size: tuple[int, int, int] | None) -> Batches:
    """Calibration inputs for `session`, in batches that it takes: samples of `data`, or random numbers without data.

    Images for a file that does not describe its preprocessing are normalised as ImageNet models expect. Raises
    `InputError` for fewer samples than the fixed batch of the file.
    """
    several = bool(read_signature(session.metadata).inputs)
    shape = tuple(json.loads(session.metadata["input_size"])) if several else get_image_shape(session, input_size)
    size = session.inputs[0].shape[0] or _AT_ONCE
    if not data:
        return [(inputs, torch.zeros(size, dtype=torch.int64)) for inputs in _draw_inputs(session, (size, *shape))]
    source = open_source(data, ports=read_ports(str(session.path)) if several else None)
    (samples,) = cut(source.train, (CALIBRATION_IMAGES,), np.random.default_rng(0), balanced=True)
    store = read_images(samples, _preprocessing(session, shape), source.skip_corrupt).store
    full_batches = [(inputs, labels) for inputs, labels in ImageBatches(store, size) if len(inputs) == size]
    if not full_batches:
        raise InputError(f"data {data!r} has fewer samples than the fixed batch of {session.path}, {size}; give more")
    return full_batches


def _draw_inputs(session: Session, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Random inputs in batches of `shape`; several inputs are packed in it, with whole numbers in their ranges.

    Texts have no padding.
    """
    signature = read_signature(session.metadata)
    draw = torch.Generator().manual_seed(0)
    for _ in range(CALIBRATION_IMAGES // shape[0] or 1):
        if not signature.inputs:
            yield torch.randn(shape, generator=draw)
            continue
        rows = signature.parts(signature.blank(shape[1:], shape[0]))
        pairs = zip(signature.inputs, rows, strict=True)
        yield signature.join([perturbed_rows(each, part, draw) for each, part in pairs])


def _preprocessing(session: Session, shape: tuple[int, ...]) -> Preprocessing:
    if "input_mean" in session.metadata:
        return preprocessing_of(session.metadata, session.path.parent)
    return Preprocessing(shape, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
