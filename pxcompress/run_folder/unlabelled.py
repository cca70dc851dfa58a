"""The models' answers on images without labels, and which of these images need a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pxcompress.certify.few_labels import random_order, samples_to_label
from pxcompress.certify.learn_then_test import Array
from pxcompress.certify.path import RiskLimit
from pxcompress.certify.used import split_hash
from pxcompress.data import open_images
from pxcompress.data.batches import ImageBatches, read_images
from pxcompress.data.samples import Samples
from pxcompress.data.tables import read_words
from pxcompress.deploy.export import artifact_of
from pxcompress.errors import DataError, InputError
from pxcompress.notes import Note, begin
from pxcompress.run_folder import ledger
from pxcompress.run_folder.answers import Question
from pxcompress.run_folder.certificate import predict_samples, read_shared_metadata
from pxcompress.run_folder.served import LEFT_OUT, read_served

BY_ANSWER = "the dense model's answer"
"""Group that holds the risk for each answer of the dense model, as unlabelled images have no other classes."""


@dataclass(frozen=True, eq=False)
class ModelAnswers:
    """The answers of a path's models on images: `predicted` classes (models, n); those at `to_label` need a label.

    `order` is that of the test, as indices; images that others have looked at are not in it. `contents` identify each
    image's content; `masks` (name -> (n,)) are the groups in each of which the risk is held.
    """

    samples: Samples
    classes: tuple[str, ...]
    predicted: Array
    to_label: Array
    order: Array
    hashes: Mapping[str, str]
    contents: tuple[str, ...]
    masks: Mapping[str, Array]

    def as_samples(self, data: str) -> ledger.Samples:
        """The images of `data` as `ledger.Samples`, the form that tests take."""
        return ledger.Samples(data, self.hashes["split"], self.contents, self.hashes)

    @property
    def questions(self) -> list[Question]:
        """A question for each image to label, in order."""
        return [
            Question.of(self.samples.ids[place], [self.classes[answer] for answer in self.predicted[:, place]])
            for place in self.to_label
        ]


def observe(files: Mapping[str, Path], unlabelled: str, group: str, note: Note) -> ModelAnswers:
    """The answers of the models `files` on the images of `unlabelled`, with their groups.

    No image is marked to label yet. Raises `InputError` for models that are no classifiers, `DataError` if no image is
    new to them.
    """
    preprocessing, classes = read_shared_metadata(list(files.values()))
    note(begin("reading the images"))
    reading = read_images(open_images(unlabelled), preprocessing, skip_corrupt=False)
    first = np.sort(np.unique(np.array(reading.digests), return_index=True)[1])  # copies are no independent samples
    has_served = read_served(list(files.values()), note)
    fresh = np.array([place for place in first if not has_served(reading.digests[place].hex())], dtype=np.int64)
    if not len(fresh):
        raise DataError(f"all images of {unlabelled!r} served the runs of these models; give others")
    if len(fresh) < len(first):
        note(f"{len(first) - len(fresh)} {LEFT_OUT}")
    store = reading.store.take(fresh)
    note(begin(f"{len(files)} models answer on {len(store)} images"))
    batches = ImageBatches(store, 64)
    logits = [predict_samples(file, batches)[0] for file in files.values()]
    if any(each.ndim != 2 for each in logits):
        raise InputError("labels are asked for where classifiers disagree, and these are none; give --losses instead")
    predicted = np.stack([each.argmax(axis=1) for each in logits])
    contents = tuple(reading.digests[place].hex() for place in fresh)
    split = split_hash(f"{name} {content}" for name, content in zip(store.samples.ids, contents, strict=True))
    hashes = {**{name: artifact_of(file).sha256 for name, file in files.items()}, "split": split}
    names = classes or tuple(str(index) for index in range(logits[0].shape[1]))
    order = random_order(len(store), split)
    masks = _groups(unlabelled, group, store.samples.ids, [names[answer] for answer in predicted[0]], names)
    return ModelAnswers(store.samples, names, predicted, np.empty(0, int), order, hashes, contents, masks)


def _groups(
    unlabelled: str, group: str, ids: Sequence[str], answers: Sequence[str], classes: Sequence[str]
) -> dict[str, Array]:
    """Name -> mask (n,) of the images in each group: by the dense model's answers, or by a column of the table."""
    if not group:
        return {}
    words: Sequence[str] = answers
    if group != BY_ANSWER:
        column = read_words(unlabelled, group)
        words = [column[image] for image in ids]
    names = classes if group == BY_ANSWER else sorted(set(words))
    return {name: np.array(words) == name for name in names}


def with_questions(observed: ModelAnswers, limit: RiskLimit, anytime_plan: ledger.AnytimePlan | None) -> ModelAnswers:
    """`observed` with the images that need a label for `limit`, in the order of the test or of its `anytime_plan`."""
    order = observed.order if anytime_plan is None else anytime_plan.order
    places = samples_to_label(limit.risk, observed.predicted, order, anytime=limit.anytime)
    return replace(observed, to_label=places, order=order)
