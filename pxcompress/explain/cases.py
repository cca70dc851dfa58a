"""Chooses cases for the reader: inputs, both models' answers for them, and the units that carried the decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pxcompress.attribution import attributed, parse_composite
from pxcompress.attribution.relevance import make_start, unit_relevance
from pxcompress.explain.inputs import Inputs
from pxcompress.explain.views import CHANGED_KINDS, TYPICAL_KINDS, Views
from pxcompress.models.signature import MASK
from pxcompress.models.tokens import IDS
from pxcompress.report.explanation import TARGET_COLOUR, CarryingUnit, Case, Decision, Marks, Pictures
from pxcompress.tasks.answer import Answer
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.regression import Regression
from pxcompress.tasks.task import Task
from pxcompress.types import Batch, Preprocessing, Pruned

MOST_CASES = 24
"""Most of the user's images that are shown as cases."""

_SHOWN = 2  # cases of each kind
_UNITS = 6  # carrying units of a case


def choose_cases(views: Views) -> list[tuple[int, str]]:
    """Choose which inputs to show, as (index, kind): typical ones, clear changes, and the largest changes."""
    similarity = views.similarity["cosine"]
    typical, least_clear = (
        (similarity - similarity.median()).abs(),
        views.agreement - views.logits[1].softmax(1).amax(1),
    )
    case_by_index: dict[int, str] = {}
    for kind in (*TYPICAL_KINDS, *CHANGED_KINDS):
        order = typical if kind in TYPICAL_KINDS else least_clear
        ranked_indices = [index for index in order.argsort().tolist() if views.kinds[index] == kind]
        case_by_index.update(dict.fromkeys(ranked_indices[:_SHOWN], kind))
    remaining_indices = [index for index in similarity.argsort().tolist() if index not in case_by_index]
    return [
        *case_by_index.items(),
        *((index, f"largest change, {views.kinds[index]}") for index in remaining_indices[:_SHOWN]),
    ]


@dataclass(frozen=True, eq=False)
class Context:
    """What is needed to describe a case: task, names of classes or numbers, preprocessing of inputs, and LRP rules."""

    task: Task
    classes: Sequence[str]
    preprocessing: Preprocessing
    composite: str

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the inputs; None if they are no images."""
        return (self.preprocessing.input_size[-2], self.preprocessing.input_size[-1]) if self.is_image else None

    @property
    def is_image(self) -> bool:
        """Whether inputs are images."""
        return self.preprocessing.is_image

    @property
    def subject_of_all(self) -> str:
        """What the heatmaps of all inputs explain, in words; "" if it is the class of each input."""
        if isinstance(self.task, Classification):
            return ""
        return (
            "the largest number" if isinstance(self.task, Regression) and len(self.classes) > 1 else self.task.subject
        )

    def subject(self, logits: Tensor, column: int) -> str:
        """What a heatmap explains that starts at one of the logits (k,): a class or number by name, or the task's
        subject.
        """
        return self.classes[column] if len(logits) == len(self.classes) > 1 else self.task.subject


def make_case(pruned: Pruned, inputs: Inputs, views: Views, case: tuple[int, str], context: Context) -> Case:
    """Describe one input in full; `case` is its index and kind."""
    index, kind = case
    value = inputs.values[index : index + 1]
    columns = [each[index] for each in views.columns]
    outputs_of_case = [{name: tensor[index : index + 1] for name, tensor in each.items()} for each in views.outputs]
    dense, slim = (context.task.answer(each, context.classes, context.size) for each in outputs_of_case)
    target = None if inputs.targets is None else inputs.targets[index]
    return Case(
        sample=inputs.names[index],
        kind=kind,
        label=(context.task.describe_target(target, context.classes) or None) if target is not None else None,
        dense=Decision(dense.words, dense.probability),
        pruned=Decision(slim.words, slim.probability),
        agreement=float(views.agreement[index]),
        subjects=tuple(context.subject(views.logits[0][index], int(column)) for column in columns),
        similarity={name: float(values[index]) for name, values in views.similarity.items()},
        units=_list_units(
            pruned, (value, columns[0][None]), float(views.logits[0][index, columns[0]]), context.composite
        ),
        pictures=replace(_draw_pictures(inputs, views, index, context.preprocessing), marks=_mark(dense, slim)),
    )


def _mark(*answers: Answer) -> tuple[Marks, ...]:
    """Boxes and regions of answers as `Marks`, to draw on the image; answers without any are left out."""
    return tuple(
        Marks(
            boxes=() if answer.boxes is None else tuple(map(tuple, answer.boxes.tolist())),
            classes=answer.classes,
            names=answer.names,
            regions=None if answer.regions is None else answer.regions.numpy(),
        )
        for answer in answers
        if answer.boxes is not None or answer.regions is not None
    )


def _list_units(pruned: Pruned, batch: Batch, logit: float, composite: str) -> tuple[CarryingUnit, ...]:
    """The units of the dense model with the most relevance for one input, from all layers."""
    relevance = attribute_units(pruned, [batch], composite, "signed")
    removed_units = pruned.plan.removed
    rows = [
        CarryingUnit(
            group.name, group.kind, unit, value / (logit or 1.0), unit not in removed_units.get(group.name, ())
        )
        for group in pruned.groups
        for unit, value in enumerate(relevance[group.name].tolist())
    ]
    return tuple(sorted(rows, key=lambda row: -row.relevance)[:_UNITS])


def _draw_pictures(inputs: Inputs, views: Views, index: int, preprocessing: Preprocessing) -> Pictures:
    """Pictures of the input and its heatmaps; an input that is no image is drawn as a line of positions."""
    value, decision_differs = inputs.values[index], bool(views.columns[0][index] != views.columns[1][index])
    maps = [each[index].numpy() for each in (*views.maps, views.own)]
    if preprocessing.is_image:
        return Pictures(_restore_image(value, preprocessing), maps[0], maps[1], maps[2] if decision_differs else None)
    mask = None if inputs.masks is None else inputs.masks[index].numpy()
    flat = [each.flatten() for each in maps]
    text = _list_words(value, preprocessing, inputs.letters)
    if preprocessing.tokenizer is not None:  # without what fills it up
        value, mask = value[:, : len(text)], None if mask is None else mask[: len(text)]
        flat = [each[: len(text)] for each in flat]
    return Pictures(_color_line(value, mask, text), flat[0], flat[1], flat[2] if decision_differs else None, text)


def _list_words(value: Tensor, preprocessing: Preprocessing, letters: str) -> tuple[str, ...]:
    """The text at every position: tokens, or letters of a one-hot sequence; empty for other inputs."""
    if preprocessing.tokenizer is None:
        return tuple(letters[channel] for channel in value.argmax(0)) if letters else ()
    names = [each.name for each in preprocessing.inputs]
    counted = value[names.index(MASK)] > 0
    return tuple(preprocessing.tokenizer.words(value[names.index(IDS)][counted].long().tolist()))


def _restore_image(value: Tensor, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Turn a normalised input back into an image, (height, width, 3) uint8."""
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    pixels = (value * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    return pixels.permute(1, 2, 0).numpy()


def _color_line(value: Tensor, mask: NDArray[np.bool_] | None, text: Sequence[str]) -> NDArray[np.uint8]:
    """Colours (n, 3) for the positions of a sequence: grey by value, white under letters, `TARGET_COLOUR` where
    masked.
    """
    sizes = (value if value.ndim == 1 else value.mean(0)).flatten()
    grey = 255 * (sizes - sizes.min()) / (sizes.max() - sizes.min()).clamp(min=1e-12)
    shades = np.full(len(sizes), 255) if text else grey.round().numpy()
    colours = np.repeat(shades[:, None], 3, axis=1).astype(np.uint8)
    if mask is not None:
        colours[mask] = TARGET_COLOUR
    return colours


def attribute_units(pruned: Pruned, batches: Sequence[Batch], composite: str, aggregate: str) -> Mapping[str, Tensor]:
    """Relevance of the dense model's units for the classes given as labels: group name -> (units,)."""
    with attributed(pruned.dense, parse_composite(composite), batches[0][0][:1]) as twin:
        start = make_start("logit", "label")
        return unit_relevance(twin.model, pruned.groups, batches, start, aggregate=aggregate)
