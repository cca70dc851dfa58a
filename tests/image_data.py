"""Images to read, the roles that they are drawn for, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from pxcompress.data import open_source
from pxcompress.errors import InputError
from pxcompress.types import Preprocessing

ROLES = ("score", "repair", "select", "certify", "test")
SMALL = Preprocessing((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def save_images(root, counts, size=(12, 10), start=0):
    """Images whose colours differ, `counts[name]` in folder `name`."""
    for offset, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            noise = np.random.default_rng([start, offset, index]).integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(noise).save(root / name / f"{index}.png")
    return root


def labels_of(batches):
    return torch.cat([labels for _, labels in batches])


def inputs_of(batches):
    return torch.cat([inputs for inputs, _ in batches])


def error_of(spec, **options):
    with pytest.raises(InputError) as caught:
        open_source(str(spec), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
