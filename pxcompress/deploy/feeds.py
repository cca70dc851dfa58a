"""Random inputs for any ONNX file, of its own shapes and types; the user gives the sizes that the file leaves open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from pxcompress.deploy.session import Array, Port, Session
from pxcompress.errors import InputError
from pxcompress.models.signature import read_signature

_NUMBERS = 128
"""Upper bound for random bytes of an image."""


@dataclass(frozen=True)
class Sizes:
    """Sizes for open axes of files: (channels, height, width) for images, and the shape of one sample by input name."""

    image: tuple[int, int, int] | None = None
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, image: tuple[int, int, int] | None, text: str) -> Sizes:
        """Sizes from options: `image`, and a text like "ids:128,image:3x224x224".

        Raises `InputError` for other text.
        """
        inputs: dict[str, tuple[int, ...]] = {}
        for part in filter(None, (each.strip() for each in text.split(","))):
            name, _, sizes = part.rpartition(":")
            numbers = sizes.split("x")
            if not name or name in inputs or not all(number.isdecimal() and int(number) for number in numbers):
                raise InputError(
                    f"shapes has {part!r}; expected each input once, as NAME:SIZES of one sample, such as ids:128 or "
                    "image:3x224x224"
                )
            inputs[name] = tuple(map(int, numbers))
        return cls(image, inputs)

    def check_used(self, sessions: list[Session]) -> None:
        """Raise `InputError` for an input name that none of the files has."""
        names = {port.name for session in sessions for port in session.inputs}
        for name in self.inputs:
            if name not in names:
                known_names = ", ".join(sorted(names))
                raise InputError(f"shapes names {name!r}, an input that no file has; expected: {known_names}")


def get_image_shape(session: Session, image: tuple[int, int, int] | None) -> tuple[int, ...]:
    """Shape of one sample, channels first, of a file with one input: from the file, else from `image`.

    Raises `InputError`.
    """
    shape = get_sample_shape(session, session.input, Sizes(image))
    return (shape[-1], *shape[:-1]) if session.takes_channels_last(session.input) else shape


def get_sample_shape(session: Session, port: Port, sizes: Sizes) -> tuple[int, ...]:
    """Shape of one sample of an input, such as (channels, height, width): from the file, else from `sizes`.

    An image whose last axis alone is as short as a number of channels is taken as height, width, channels. Raises
    `InputError` if a size stays open, or does not fit the file.
    """
    if None not in port.shape[1:]:
        return tuple(int(size or 0) for size in port.shape[1:])
    if port.name in sizes.inputs:
        sample = sizes.inputs[port.name]
        if not port.fits((1, *sample)):
            text = "x".join(map(str, sample))
            raise InputError(f"shapes gives {port.name!r} samples of {text}; {session.path} takes {port}")
        return sample
    if sizes.image is None and (recorded := _find_recorded_shape(session, port)):
        return recorded
    if read_signature(session.metadata).is_open:  # texts, of the length that costs are counted for
        length = json.loads(session.metadata["input_size"])[-1]
        return tuple(size or length for size in port.shape[1:])
    if (
        sizes.image is None and len(port.shape) == 4 and "input_size" in session.metadata
    ):  # what our files were made for
        channels, height, width = json.loads(session.metadata["input_size"])
        sizes = replace(sizes, image=(channels, height, width))
    if len(port.shape) != 4:
        open_ports = [each for each in session.inputs if None in each.shape[1:] and len(each.shape) != 4]
        option = ",".join(f"{each.name}:{'x'.join(str(size or 128) for size in each.shape[1:])}" for each in open_ports)
        raise InputError(f"{session.path} takes {port.name!r} of any size {port}; say which: --shapes {option}")
    if sizes.image is None or min(sizes.image) < 1:
        raise InputError(f"{session.path} takes images of any size {port}; say which: --input-size 224")
    channels_last = session.takes_channels_last(port)
    sample = (*sizes.image[1:], sizes.image[0]) if channels_last else sizes.image
    return tuple(int(size_in_file or size) for size_in_file, size in zip(port.shape[1:], sample, strict=True))


def _find_recorded_shape(session: Session, port: Port) -> tuple[int, ...]:
    """Shape of one sample of an input from the metadata that pxcompress writes for several inputs.

    Empty if there is none.
    """
    inputs = read_signature(session.metadata).inputs
    shape = next((each.shape for each in inputs if each.name == port.name), ())
    sample = tuple(size for size in shape if size)
    return sample if len(sample) == len(shape) and port.fits((1, *sample)) else ()


def make_feed(session: Session, shapes: Mapping[str, tuple[int, ...]], batch_size: int) -> dict[str, Array]:
    """Random arrays for every input; `shapes` has the shape of one sample by input name."""
    rng = np.random.default_rng(0)
    feed = {}
    for port in session.inputs:
        rows = (port.shape[0] or batch_size,) if port.shape else ()
        feed[port.name] = _draw(port, (*rows, *shapes[port.name]), rng)
    return feed


def _draw(port: Port, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Random numbers for one input.

    Floats are around 0; whole numbers are bytes as in an image, or 0 and 1, which any table of embeddings has; masks
    are 1, since nothing is padded.
    """
    if np.issubdtype(port.dtype, np.floating):
        return np.asarray(rng.standard_normal(shape, dtype=np.float32), dtype=port.dtype)
    if "mask" in port.name.lower():
        return np.ones(shape, port.dtype)
    image = len(shape) == 4 and port.dtype != np.bool_
    return np.asarray(rng.integers(0, _NUMBERS if image else 2, shape), dtype=port.dtype)
