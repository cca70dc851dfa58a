"""A reshape said relative to the axes it reads, so that it holds for any batch and any width."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

Sizes = list[int | None] | None
"""What some axes become: sizes, of which the one that is None follows; None alone where they are joined to one axis."""

HEADS = -2
"""Placeholder among sizes for the number of heads, which pruning changes."""


class Regroup:
    """Each segment is a number of axes of the input, and what they become."""

    def __init__(self, segments: Sequence[tuple[int, Sizes]]) -> None:
        self.segments = list(segments)

    def shape(self, before: Sequence[int], heads: int = 1) -> list[int]:
        """The shape after, for one before."""
        after: list[int] = []
        place = 0
        for count, sizes in self.segments:
            total = prod(before[place : place + count])
            place += count
            if sizes is None:
                after.append(total)
                continue
            told = [heads if size == HEADS else size for size in sizes]
            rest = prod(size for size in told if size is not None)
            after += [total // rest if size is None else size for size in told]
        return after

    def __call__(self, x: Tensor, heads: int = 1) -> Tensor:
        return x.reshape(self.shape(x.shape, heads))


def find_regroup(
    before: Sequence[int], after: Sequence[int], other: tuple[Sequence[int], Sequence[int]]
) -> Regroup | None:
    """How `before` becomes `after` axis by axis, such that it holds for the `other` pair too; None if it does not."""
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
    """The axes behind the next stretch, from `start` on, in which both shapes have equally many elements; else None."""
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
    """Add `count` axes that become `sizes`, in a second case `other`."""
    if len(sizes) == 1 and count:
        segments.append((count, None))
        return
    if not sizes and segments and segments[-1][1] is None:  # axes of size one behind another: they go with it
        segments[-1] = (segments[-1][0] + count, None)
        return
    told: list[int | None] = list(sizes)
    if count and told:  # the axis that varies is the one that follows, else the last that is not one
        varying = [place for place, size in enumerate(sizes) if place < len(other) and other[place] != size]
        longest = max((place for place, size in enumerate(sizes) if size != 1), default=len(sizes) - 1)
        told[varying[0] if varying else longest] = None
    segments.append((count, told))
