"""Names of a model's classes, and whether data name some of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from timm.data.imagenet_info import ImageNetInfo

_WORDNET_ID = re.compile(r"n\d{8}")

IMAGENET_1K = 1000
"""Classes of the ImageNet that most weights are for."""


def are_wordnet_ids(names: Sequence[str]) -> bool:
    """Whether all names are such as ImageNet's folders have, n01440764; False for none."""
    return bool(names) and all(_WORDNET_ID.fullmatch(name) for name in names)


def imagenet_classes(count: int, names: Sequence[str]) -> tuple[str, ...]:
    """The classes of ImageNet in the order of its weights' outputs, if a model of `count` classes has them.

    It is taken to where the data's `names` are all among them; else there are none.
    """
    if count != IMAGENET_1K or not are_wordnet_ids(names):
        return ()
    classes = tuple(ImageNetInfo().label_names())
    return classes if set(names) <= set(classes) else ()


def are_output_numbers(names: Sequence[str], count: int) -> bool:
    """Whether `names` are whole numbers that number some of `count` outputs, from 0, but not all of them."""
    if not names or not all(name.isdecimal() for name in names):
        return False
    numbers = set(map(int, names))
    return len(numbers) == len(names) < count and max(numbers) < count


def is_part(names: Sequence[str], classes: Sequence[str]) -> bool:
    """Whether `names` are some of `classes`, upper and lower case alike, but not all of them."""
    some, every = ({name.casefold() for name in each} for each in (names, classes))
    return bool(some) and some < every
