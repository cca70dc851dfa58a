"""Describes a reshape relative to the axes of its input, so that it is valid for any batch and any width."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

Sizes = list[int | None] | None
"""What some axes become: a list of sizes, where None is computed from the rest; None alone joins them to one axis."""

HEADS = -2
"""Placeholder in a list of sizes for the number of heads, which pruning changes."""


class Regroup:
    """A reshape in segments: each is a number of axes of the input, and the sizes that they become."""

    def __init__(self, segments: Sequence[tuple[int, Sizes]]) -> None:
        self.segments = list(segments)

    def shape(self, before: Sequence[int], heads: int = 1) -> list[int]:
        """The shape after the reshape, for an input of shape `before`."""
        after: list[int] = []
        place = 0
        for count, sizes in self.segments:
            total = prod(before[place : place + count])
            place += count
            if sizes is None:
                after.append(total)
                continue
            known_sizes = [heads if size == HEADS else size for size in sizes]
            rest = prod(size for size in known_sizes if size is not None)
            after += [total // rest if size is None else size for size in known_sizes]
        return after

    def __call__(self, x: Tensor, heads: int = 1) -> Tensor:
        return x.reshape(self.shape(x.shape, heads))


def find_regroup(
    before: Sequence[int], after: Sequence[int], other: tuple[Sequence[int], Sequence[int]]
) -> Regroup | None:
    """The `Regroup` that turns shape `before` into `after`, and the first shape of `other` into its second.

    None if there is none.
    """
    segments: list[tuple[int, Sizes]] = []
    start = (0, 0)
    while start != (len(before), len(after)):
        if start[0] < len(before) and start[1] < len(after) and before[start[0]] == after[start[1]]:
            segments.append((1, None))
            start = (start[0] + 1, start[1] + 1)
            continue
        end = _end_of_segment(before, after, start)
        if end is None:
            return None
        _add_segment(segments, end[0] - start[0], list(after[start[1] : end[1]]), list(other[1][start[1] : end[1]]))
        start = end
    rule = Regroup(segments)
    fits = len(other[0]) == len(before) and rule.shape(other[0]) == list(other[1])
    return rule if fits and rule.shape(before) == list(after) else None


def _end_of_segment(before: Sequence[int], after: Sequence[int], start: tuple[int, int]) -> tuple[int, int] | None:
    """The axes behind the next segment from `start` on, which has as many elements in both shapes; else None."""
    i, j = start
    left = right = 1
    if (i < len(before) and before[i] != 1) or j >= len(after):
        left, i = before[i], i + 1
    else:
        right, j = after[j], j + 1
    while left != right:
        if left < right:
            if i >= len(before):
                return None
            left, i = left * before[i], i + 1
        else:
            if j >= len(after):
                return None
            right, j = right * after[j], j + 1
    return i, j


def _add_segment(segments: list[tuple[int, Sizes]], count: int, sizes: list[int], other: list[int]) -> None:
    """Append a segment: `count` axes that become `sizes`, or `other` for the second pair of shapes."""
    if len(sizes) == 1 and count:
        segments.append((count, None))
        return
    if not sizes and segments and segments[-1][1] is None:  # axes of size one behind another: they go with it
        segments[-1] = (segments[-1][0] + count, None)
        return
    sizes_or_none: list[int | None] = list(sizes)
    if count and sizes_or_none:  # the axis that varies is the one that follows, else the last that is not one
        varying = [place for place, size in enumerate(sizes) if place < len(other) and other[place] != size]
        longest = max((place for place, size in enumerate(sizes) if size != 1), default=len(sizes) - 1)
        sizes_or_none[varying[0] if varying else longest] = None
    segments.append((count, sizes_or_none))
