"""Cases chosen for the reader: inputs, what both models make of them, and the units that carried it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pxcompress.attribution import attributed, parse_composite
from pxcompress.attribution.relevance import make_start, unit_relevance
from pxcompress.explain.inputs import Inputs
from pxcompress.explain.views import Views
from pxcompress.models.signature import MASK
from pxcompress.models.tokens import IDS
from pxcompress.report.explanation import TARGET_COLOUR, CarryingUnit, Case, Decision, Pictures
from pxcompress.types import Batch, Group, Plan, Preprocessing, Pruned

MOST_CASES = 24
"""Largest number of the user's images that are shown as cases."""

_SHOWN = 2  # cases of each kind
_UNITS = 6  # carrying units of a case


def choose_cases(views: Views) -> list[tuple[int, str]]:
    """Choose the cases to show: typical ones that agree, the surest of those that changed, and the largest changes."""
    similarity, chance = views.similarity["cosine"], views.logits[1].softmax(1).amax(1)
    typical = (similarity - similarity.median()).abs()
    case_by_index: dict[int, str] = {}
    for kind, order in (("agreeing", typical), ("newly wrong", -chance), ("newly right", -chance)):
        ranked_indices = [index for index in order.argsort().tolist() if views.kinds[index] == kind]
        case_by_index.update(dict.fromkeys(ranked_indices[:_SHOWN], kind))
    remaining_indices = [index for index in similarity.argsort().tolist() if index not in case_by_index]
    return [
        *case_by_index.items(),
        *((index, f"largest change, {views.kinds[index]}") for index in remaining_indices[:_SHOWN]),
    ]


def take_first_cases(views: Views) -> list[tuple[int, str]]:
    """The first inputs as cases, `MOST_CASES` of them at most."""
    return list(enumerate(views.kinds))[:MOST_CASES]


def make_case(
    pruned: Pruned,
    inputs_and_views: tuple[Inputs, Views],
    index: int,
    kind: str,
    context: tuple[Sequence[str], Preprocessing, str],
) -> Case:
    """One input with everything about it; `context` are the classes, how pictures became inputs, and the rules."""
    (inputs, views), (classes, preprocessing, composite) = inputs_and_views, context
    value = inputs.values[index : index + 1]
    dense = views.decisions[0][index]
    return Case(
        sample=inputs.names[index],
        kind=kind,
        label=None if inputs.labels is None else classes[int(inputs.labels[index])],
        dense=_decide(views.logits[0][index], classes),
        pruned=_decide(views.logits[1][index], classes),
        similarity={name: float(values[index]) for name, values in views.similarity.items()},
        units=_list_units(pruned, (value, dense[None]), float(views.logits[0][index, dense]), composite),
        pictures=_draw_pictures(inputs, views, index, preprocessing),
    )


def _decide(logits: Tensor, classes: Sequence[str]) -> Decision:
    label = int(logits.argmax())
    return Decision(classes[label], float(logits.softmax(0)[label]))


def _list_units(pruned: Pruned, batch: Batch, logit: float, composite: str) -> tuple[CarryingUnit, ...]:
    """The units of the dense model with the most relevance for one input, whatever their layer."""
    relevance = attribute_units(pruned, [batch], composite, "signed")
    rows = [
        CarryingUnit(group.name, group.kind, unit, value / (logit or 1.0), _is_kept(pruned.plan, group, unit))
        for group in pruned.groups
        for unit, value in enumerate(relevance[group.name].tolist())
    ]
    return tuple(sorted(rows, key=lambda row: -row.relevance)[:_UNITS])


def _is_kept(plan: Plan, group: Group, unit: int) -> bool:
    return unit not in plan.removed.get(group.name, ())


def _draw_pictures(inputs: Inputs, views: Views, index: int, preprocessing: Preprocessing) -> Pictures:
    """The input and its maps; what is no image is shown as a line of positions."""
    value, decision_differs = inputs.values[index], bool(views.decisions[0][index] != views.decisions[1][index])
    maps = [each[index].numpy() for each in (*views.maps, views.own)]
    if preprocessing.is_image:
        return Pictures(_restore_image(value, preprocessing), maps[0], maps[1], maps[2] if decision_differs else None)
    mask = None if inputs.masks is None else inputs.masks[index].numpy()
    flat = [each.flatten() for each in maps]
    text = _words(value, preprocessing, inputs.letters)
    if preprocessing.tokenizer is not None:  # without what fills it up
        value, mask = value[:, : len(text)], None if mask is None else mask[: len(text)]
        flat = [each[: len(text)] for each in flat]
    return Pictures(_color_line(value, mask, text), flat[0], flat[1], flat[2] if decision_differs else None, text)


def _words(value: Tensor, preprocessing: Preprocessing, letters: str) -> tuple[str, ...]:
    """What stands at every position: a token of a text, a letter of a one-hot sequence; nothing for other numbers."""
    if preprocessing.tokenizer is None:
        return tuple(letters[channel] for channel in value.argmax(0)) if letters else ()
    names = [each.name for each in preprocessing.inputs]
    counted = value[names.index(MASK)] > 0
    return tuple(preprocessing.tokenizer.words(value[names.index(IDS)][counted].long().tolist()))


def _restore_image(value: Tensor, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """A model's input as the image that it was made of, (height, width, 3)."""
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    pixels = (value * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    return pixels.permute(1, 2, 0).numpy()


def _color_line(value: Tensor, mask: NDArray[np.bool_] | None, text: Sequence[str]) -> NDArray[np.uint8]:
    """Colours of the positions of a line, (n, 3): grey by value, white under letters, `TARGET_COLOUR` in the mask."""
    sizes = (value if value.ndim == 1 else value.mean(0)).flatten()
    grey = 255 * (sizes - sizes.min()) / (sizes.max() - sizes.min()).clamp(min=1e-12)
    shades = np.full(len(sizes), 255) if text else grey.round().numpy()
    colours = np.repeat(shades[:, None], 3, axis=1).astype(np.uint8)
    if mask is not None:
        colours[mask] = TARGET_COLOUR
    return colours


def attribute_units(pruned: Pruned, batches: Sequence[Batch], composite: str, aggregate: str) -> Mapping[str, Tensor]:
    """Relevance of the dense model's units for the classes that stand as labels: group name -> (units,)."""
    with attributed(pruned.dense, parse_composite(composite), batches[0][0][:1]) as twin:
        start = make_start("logit", "label")
        return unit_relevance(twin.model, pruned.groups, batches, start, aggregate=aggregate)
