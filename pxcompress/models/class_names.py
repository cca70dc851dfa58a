"""Names of a model's classes, and tests of how the names in data relate to them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from timm.data.imagenet_info import ImageNetInfo

_WORDNET_ID = re.compile(r"n\d{8}")

IMAGENET_1K = 1000
"""Number of classes of the usual ImageNet."""


def are_wordnet_ids(names: Sequence[str]) -> bool:
    """Whether all names look like ImageNet's folders, n01440764; False for no names."""
    return bool(names) and all(_WORDNET_ID.fullmatch(name) for name in names)


def imagenet_classes(count: int, names: Sequence[str]) -> tuple[str, ...]:
    """ImageNet's class names in the order of the outputs, if the model has `count` classes as ImageNet.

    It is assumed only if the data's `names` are all among them; else the result is empty.
    """
    if count != IMAGENET_1K or not are_wordnet_ids(names):
        return ()
    classes = tuple(ImageNetInfo().label_names())
    return classes if set(names) <= set(classes) else ()


def are_output_numbers(names: Sequence[str], count: int) -> bool:
    """Whether `names` are numbers of outputs, from 0, for some but not all of `count` outputs."""
    if not names or not all(name.isdecimal() for name in names):
        return False
    numbers = set(map(int, names))
    return len(numbers) == len(names) < count and max(numbers) < count


def is_part(names: Sequence[str], classes: Sequence[str]) -> bool:
    """Whether `names` are some, but not all, of `classes`, ignoring case."""
    some, every = ({name.casefold() for name in each} for each in (names, classes))
    return bool(some) and some < every
