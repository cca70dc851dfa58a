"""Five parts of labelled data, as batches that a model takes: score, repair, select, certify, test.

They are disjoint, except that score and repair both get all samples of their pool if these are few: the two shape a
model, while the others judge it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

from pxcompress.data.batches import ImageBatches, Reading, read_images, read_later
from pxcompress.data.copies import Copies
from pxcompress.data.samples import LEAST_OF_A_ROLE, MIN_HELD_OUT_TO_SPLIT, Samples, Source, cut
from pxcompress.errors import DataError, unknown
from pxcompress.models.signature import Signature
from pxcompress.types import Preprocessing, Splits

_ROLES = ("score", "repair", "select", "certify", "test")


def load_splits(
    source: Source,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    seed: int = 0,
    limits: Mapping[str, int] | None = None,
    has_served: Callable[[str], bool] | None = None,
) -> Splits:
    """Draw the five parts of the data and read every image once, so that a damaged one shows before any work is done.

    `limits` are the most samples for each role, and replace `source.limits`; if a pool has fewer, certify and test
    share it, while score and repair overlap. These two have the classes as evenly as possible; the others keep the
    classes' shares, as estimates and certificates need. Damaged images are left out and listed if the source was opened
    with `skip_corrupt`. Duplicates are mentioned in the notes, and left out of certify, whose samples have to be
    independent; so are samples for whose content `has_served` is true, such as those of an earlier draw from other
    data. Raises `DataError`.
    """
    readings: dict[str, Reading] = {}
    for role, samples in _draw(source, seed, {**source.limits, **_check_limits(limits or {})}).items():
        readings[role] = read_images(samples, preprocessing, source.skip_corrupt)
    copies = Copies.of(readings)
    stores = {role: reading.store for role, reading in readings.items()}
    stores["certify"] = copies.leave_out(stores, "certify")
    contents = {role: _contents(source.name, readings[role], stores[role].samples.ids) for role in stores}
    fresh = [place for place, content in enumerate(contents["certify"]) if not (has_served and has_served(content))]
    served = len(stores["certify"]) - len(fresh)
    if served:
        stores["certify"] = stores["certify"].take(np.array(fresh, dtype=np.int64))
        contents["certify"] = tuple(contents["certify"][place] for place in fresh)
    for role, store in stores.items():
        if len(store) < LEAST_OF_A_ROLE:
            raise DataError(
                f"data {source.name!r}: role {role!r} has {len(store)} readable {store.samples.noun} that are no "
                f"copies, at least {LEAST_OF_A_ROLE} are needed"
            )
    parts = {role: ImageBatches(store, batch_size) for role, store in stores.items()}
    return Splits(
        **parts,
        example=_example(parts["score"], preprocessing),
        ids={role: store.samples.ids for role, store in stores.items()},
        skipped=tuple(dict.fromkeys(name for reading in readings.values() for name in reading.damaged)),
        notes=(*_notes(source, readings), *copies.notes),
        contents=contents,
        served=served,
    )


def are_known_by_content(splits: Splits) -> bool:
    """Whether all samples have a hash of their content, so that copies are recognised anywhere; arrays have none."""
    return not any("\n" in content for contents in splits.contents.values() for content in contents)


def _contents(data: str, reading: Reading, ids: Sequence[str]) -> tuple[str, ...]:
    """Texts that identify samples: the digests of their content if there are any, else `data` and the sample's id."""
    digest_by_id = dict(zip(reading.store.samples.ids, reading.digests, strict=False))
    return tuple(digest_by_id[name].hex() if digest_by_id else f"{data}\n{name}" for name in ids)


def _example(batches: ImageBatches, preprocessing: Preprocessing) -> Tensor:
    """One input, (1, ...): the first one; of texts one of median length, without padding."""
    inputs, _ = next(iter(batches))
    counted = Signature(preprocessing.inputs).find_counted(inputs)
    if counted is None:
        return inputs[:1].clone()
    lengths = counted.sum(1)
    middle = int(lengths.argsort()[len(lengths) // 2])
    return inputs[middle : middle + 1, :, : int(lengths[middle])].clone()


def _notes(source: Source, readings: Mapping[str, Reading]) -> Iterator[str]:
    """Notes for the report on how the data were read and cut into parts."""
    if source.select_from == "train":
        yield (
            f"the select split is cut from the training data, since the held-out data are only {len(source.held_out)} "
            f"({MIN_HELD_OUT_TO_SPLIT} can spare some): "
            f"its accuracies look too good where the weights were trained on them"
        )
    overlap = not set(readings["score"].store.samples.ids).isdisjoint(readings["repair"].store.samples.ids)
    distinct = [reading for role, reading in readings.items() if role != "score" or not overlap]
    if deep := sum(reading.deep for reading in distinct):
        yield (
            f"{deep} images have more than 8 bits a channel: their whole range (0 to 65535, or 0 to 1) becomes 0 to "
            "255; images that fill a part of it only, such as 12 bits, get dark: convert them first"
        )
    if cut := sum(reading.cut for reading in distinct):
        yield f"{cut} texts are longer than the model takes, and are cut"
    for role in ("score", "repair"):
        digests = readings[role].digests
        if digests and len(set(digests)) == 1:
            noun = readings[role].store.samples.noun.upper()
            yield f"ALL {len(digests)} {noun} OF ROLE {role!r} ARE ALIKE: nothing can be learned from them; give others"


def training_batches(source: Source, preprocessing: Preprocessing, *, batch_size: int, seed: int) -> ImageBatches:
    """Batches of the whole train pool, from which score and repair are drawn too, in a new order every epoch.

    Nothing of select, certify and test is in it. Images of pools that do not fit into memory are read on the way:
    damaged ones raise `DataError` there, or are left out of their batch if the source was opened with `skip_corrupt`.
    """
    store = read_later(source.train, preprocessing, source.skip_corrupt)
    return ImageBatches(store, batch_size, shuffle_seed=seed)


def _check_limits(limits: Mapping[str, int]) -> Mapping[str, int]:
    for role, limit in limits.items():
        if role not in _ROLES:
            raise DataError(str(unknown("role", role, _ROLES)))
        if limit < LEAST_OF_A_ROLE:
            raise DataError(f"limit of role {role!r} is {limit}; expected at least {LEAST_OF_A_ROLE}")
    return limits


def _draw(source: Source, seed: int, limits: Mapping[str, int]) -> dict[str, Samples]:
    rng = np.random.default_rng(seed)
    pools = {("score", "repair"): source.train, ("select",): source.select, ("certify", "test"): source.held_out}
    samples_by_role: dict[str, Samples] = {}
    for roles, pool in pools.items():
        shapes = "score" in roles
        sizes = [min(limits[role], len(pool)) for role in roles] if shapes else _shares(len(pool), roles, limits)
        if min(sizes) < LEAST_OF_A_ROLE:
            raise DataError(
                f"data {source.name!r} has {len(pool)} {pool.noun} for {' and '.join(roles)}; "
                f"each needs at least {LEAST_OF_A_ROLE}: give more {pool.noun}"
            )
        samples_by_role.update(zip(roles, cut(pool, sizes, rng, balanced=shapes), strict=True))
    return samples_by_role


def _shares(available: int, roles: Sequence[str], limits: Mapping[str, int]) -> list[int]:
    """Number of samples for each of one or two roles.

    Without a limit, a role gets all that the other leaves, at least half.
    """
    first_share, *others = (limits.get(role, available) for role in roles)
    if not others:
        return [min(first_share, available)]
    if roles[1] not in limits:
        first_share = min(first_share, available // 2)
        return [first_share, available - first_share]
    if first_share + others[0] > available:
        first_share = round(available * first_share / (first_share + others[0]))
        return [first_share, available - first_share]
    return [first_share, others[0]]
