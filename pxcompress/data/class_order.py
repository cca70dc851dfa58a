"""Which output of a model stands for which class of the data.

Folders do not say: torchvision numbers class folders by code point ("Bee" before "ant"), timm case-blind and with
numbers by value ("ant" before "Bee", "c2" before "c10"). Names that come with the weights decide; without them both
orders are tried on the select pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import binomtest

from pxcompress.data.batches import ImageBatches, read_images
from pxcompress.data.samples import Integers, Source
from pxcompress.data.sources import extend_classes, restrict_classes
from pxcompress.errors import list_some
from pxcompress.models.class_names import are_output_numbers, is_part
from pxcompress.models.loading import LoadedModel
from pxcompress.state import device_of, evaluating

SIGNIFICANCE_LEVEL = 0.01
"""Largest p-value of a sign test at which one class order counts as better than the other."""


def match_class_order(source: Source, loaded: LoadedModel) -> Source:
    """Renumber the classes of `source` in the order of the model's outputs; its notes say what changed."""
    if source.embedded or source.layout != "classes":
        return source
    if names := _numbered_outputs(source.classes, loaded):
        message = f"the classes are numbers, taken for the model's outputs: {len(source.classes)} of {len(names)}"
        return _add_note(extend_classes(source, names), message)
    if loaded.weights == "untrained":
        return source
    class_by_name = {name.casefold(): name for name in source.classes}
    order = tuple(class_by_name.get(name.casefold(), "") for name in loaded.class_names)
    if set(order) == set(source.classes):
        message = f"classes are numbered as the weights name them: {list_some(order, 4)}"
        return source if order == source.classes else _add_note(restrict_classes(source, order), message)
    if is_part(source.classes, loaded.class_names):
        names = [class_by_name.get(name.casefold(), name) for name in loaded.class_names]
        message = f"the data have {len(source.classes)} of the model's {len(names)} classes, by name; it keeps them all"
        return _add_note(extend_classes(source, names), message)
    reordered = _choose_order(source, loaded) if source.other_order else source
    if not loaded.class_names:
        return _note_first_number(reordered)
    strange = next((name for name in loaded.class_names if name.casefold() not in class_by_name), loaded.class_names[0])
    return _add_note(
        reordered,
        f"the weights name other classes than the data, such as {strange!r}: classes are taken by their place, "
        f"{reordered.classes[0]!r} for {loaded.class_names[0]!r} and so on; check that this is right",
    )


def _note_first_number(source: Source) -> Source:
    """`source`, with a note if its class names are numbers but not those of the outputs."""
    classes = source.classes
    if not all(map(str.isdecimal, classes)) or [int(name) for name in classes] == list(range(len(classes))):
        return source
    return _add_note(source, f"class {classes[0]!r} is output 0, class {classes[1]!r} output 1, and so on")


def _numbered_outputs(classes: Sequence[str], loaded: LoadedModel) -> list[str]:
    """Names for all outputs, if `classes` are numbers of outputs.

    Empty if not, or if the weights name their classes.
    """
    if loaded.class_names or not are_output_numbers(classes, loaded.classes):
        return []
    name_by_number = {int(name): name for name in classes}
    return [name_by_number.get(number, str(number)) for number in range(loaded.classes)]


def _choose_order(source: Source, loaded: LoadedModel) -> Source:
    """The data with its classes in the order in which the model is right more often on select.

    Unchanged if no test says so.
    """
    predictions, labels = _predictions(source, loaded)
    place = np.array([source.other_order.index(name) for name in source.classes])
    right_as_is, right_renumbered = predictions == labels, predictions == place[labels]
    only_here, only_there = int((right_as_is & ~right_renumbered).sum()), int((right_renumbered & ~right_as_is).sum())
    discordant = only_here + only_there
    is_significant = discordant > 0 and binomtest(only_there, discordant).pvalue < SIGNIFICANCE_LEVEL
    by_code = (
        f"sorted by code point ({list_some(source.classes, 4)}) {right_as_is.sum()} of {len(labels)} select images are "
        "right"
    )
    as_timm = f"sorted as timm does ({list_some(source.other_order, 4)}) {right_renumbered.sum()}"
    if is_significant and only_there > only_here:
        renumbered = restrict_classes(source, source.other_order)
        return _add_note(
            renumbered, f"classes are numbered in timm's order, which fits the weights: {by_code}, {as_timm}"
        )
    if is_significant:
        return _add_note(source, f"classes are numbered by code point, which fits the weights: {by_code}, {as_timm}")
    return _add_note(
        source,
        f"THE ORDER OF THE CLASSES IS NOT KNOWN, code point is taken: {by_code}, {as_timm}; name the classes, in the "
        "order of the outputs, as 'class_names' in the checkpoint or 'label_names' in config.json",
    )


def _predictions(source: Source, loaded: LoadedModel) -> tuple[Integers, Integers]:
    """The model's predicted classes and the labels of the select pool."""
    pool = source.select
    pool = pool.take(np.arange(min(len(pool), source.limits["select"])))
    batches = ImageBatches(read_images(pool, loaded.preprocessing, source.skip_corrupt).store, 64)
    device = device_of(loaded.model)
    predictions, labels = [], []
    with evaluating(loaded.model), torch.no_grad():
        for inputs, truth in batches:
            predictions.append(loaded.model(inputs.to(device)).argmax(1).cpu().numpy())
            labels.append(truth.numpy())
    return np.concatenate(predictions), np.concatenate(labels)


def _add_note(source: Source, note: str) -> Source:
    return replace(source, notes=(*source.notes, note))
