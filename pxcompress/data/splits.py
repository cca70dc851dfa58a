"""Five disjoint parts of labelled image data, as batches that a model takes: score, repair, select, certify, test."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pxcompress.data.batches import ImageBatches, read_images, read_later
from pxcompress.data.samples import Samples, Source, cut
from pxcompress.errors import DataError, unknown
from pxcompress.types import Preprocessing, Splits

_ROLES = ("score", "repair", "select", "certify", "test")
_LEAST = 2  # samples of a role


def load_splits(
    source: Source,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    seed: int = 0,
    limits: Mapping[str, int] | None = None,
) -> Splits:
    """Draws the five roles and reads every image of them once, so that a damaged one is found before any work is done.

    `limits`: most samples per role, over `source.limits`; two roles share a pool that has fewer. Score and repair have
    the classes as evenly as possible; the others keep the classes' shares, as estimates and certificates need. Damaged
    images are left out and listed if the source was opened with `skip_corrupt`. Raises `DataError`.
    """
    parts: dict[str, ImageBatches] = {}
    ids: dict[str, tuple[str, ...]] = {}
    skipped: list[str] = []
    for role, samples in _draw(source, seed, {**source.limits, **_checked(limits or {})}).items():
        store, damaged = read_images(samples, preprocessing, source.skip_corrupt)
        if len(store) < _LEAST:
            raise DataError(
                f"data {source.name!r}: role {role!r} has {len(store)} readable images, at least {_LEAST} are needed"
            )
        parts[role] = ImageBatches(store, batch_size)
        ids[role] = store.samples.ids
        skipped += damaged
    example = next(iter(parts["score"]))[0][:1].clone()
    return Splits(**parts, example=example, ids=ids, skipped=tuple(skipped))


def training_batches(source: Source, preprocessing: Preprocessing, *, batch_size: int, seed: int) -> ImageBatches:
    """The whole train pool (score and repair too are drawn from it), in a new order every epoch.

    Nothing of select, certify and test is in it. Images of pools that do not fit into memory are read on the way:
    damaged ones raise `DataError` there, or are left out of their batch if the source was opened with `skip_corrupt`.
    """
    store = read_later(source.train, preprocessing, source.skip_corrupt)
    return ImageBatches(store, batch_size, shuffle_seed=seed)


def _checked(limits: Mapping[str, int]) -> Mapping[str, int]:
    for role, limit in limits.items():
        if role not in _ROLES:
            raise DataError(str(unknown("role", role, _ROLES)))
        if limit < _LEAST:
            raise DataError(f"limit of role {role!r} is {limit}; expected at least {_LEAST}")
    return limits


def _draw(source: Source, seed: int, limits: Mapping[str, int]) -> dict[str, Samples]:
    rng = np.random.default_rng(seed)
    drawn: dict[str, Samples] = {}
    pools = (
        (source.train, ("score", "repair"), True),
        (source.select, ("select",), False),
        (source.held_out, ("certify", "test"), False),
    )
    for pool, roles, even in pools:
        sizes = _shares(len(pool), [limits.get(role) for role in roles])
        if min(sizes) < _LEAST:
            raise DataError(
                f"data {source.name!r} has {len(pool)} images for {' and '.join(roles)}; "
                f"each needs at least {_LEAST}: give more images"
            )
        drawn.update(zip(roles, cut(pool, sizes, rng, even=even), strict=True))
    return drawn


def _shares(available: int, limits: list[int | None]) -> list[int]:
    """Samples for each of one or two roles; None stands for all that the other one leaves, at least half."""
    first, *others = (available if limit is None else limit for limit in limits)
    if not others:
        return [min(first, available)]
    if limits[1] is None:
        first = min(first, available // 2)
        return [first, available - first]
    if first + others[0] > available:
        first = round(available * first / (first + others[0]))
        return [first, available - first]
    return [first, others[0]]
