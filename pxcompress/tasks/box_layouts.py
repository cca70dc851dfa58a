"""The forms in which detectors return boxes: one record a layout, which reads corners and class logits.

A layout of your own is one record in one file that is imported before the model is run, such as the one that defines
the model:

    from pxcompress.tasks.box_layouts import BoxLayout, register_layout

    register_layout(BoxLayout("mine", lambda outputs: "my_boxes" in outputs, read_mine))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert

from pxcompress.errors import InputError, unknown
from pxcompress.models.outputs import is_real

AUTO = "auto"
LOGIT_EPSILON = 1e-6
"""Probabilities are clamped to [this, 1 - this] before they become logits."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The boxes that a model proposes, one at each location; most of them show nothing.

    `corners` (n, locations, 4) are x1, y1, x2, y2, in pixels of the input, or with `relative` as shares of its sides;
    the sigmoid of `logits` (n, locations, classes) is the score of each class. Without `overlap` the model itself gives
    every object one box, else overlapping boxes must be filtered.
    """

    corners: Tensor
    logits: Tensor
    relative: bool = False
    overlap: bool = True


@dataclass(frozen=True)
class BoxLayout:
    """The layout of some detectors' outputs: `matches` tests outputs for it, `read` returns their candidates."""

    name: str
    matches: Callable[[Mapping[str, Tensor]], bool]
    read: Callable[[Mapping[str, Tensor]], Candidates]


LAYOUTS: dict[str, BoxLayout] = {}
"""Layouts of a detector's outputs by name, the most special first; the first that matches is taken."""


def register_layout(layout: BoxLayout) -> None:
    """Register a layout, which is tried before the others. Raises `ValueError` for a name that is taken."""
    if layout.name in LAYOUTS or layout.name == AUTO:
        raise ValueError(f"box layout {layout.name!r} is registered twice")
    others = dict(LAYOUTS)
    LAYOUTS.clear()
    LAYOUTS.update({layout.name: layout, **others})


def read_boxes(outputs: Mapping[str, Tensor], name: str = AUTO) -> Candidates:
    """The candidates in `outputs` (n, ...) by name, in the layout `name`. Raises `InputError` if it does not match."""
    return layout_of(outputs, name).read(outputs)


def layout_of(outputs: Mapping[str, Tensor], name: str = AUTO) -> BoxLayout:
    """The layout `name`, or for "auto" the first that matches. Raises `InputError` if none does, or there is none."""
    if name != AUTO and name not in LAYOUTS:
        raise unknown("box layout", name, [AUTO, *LAYOUTS])
    candidates = LAYOUTS.values() if name == AUTO else [LAYOUTS[name]]
    for layout in candidates:
        if layout.matches(outputs):
            return layout
    shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in outputs.items())
    names = ", ".join(each.name for each in candidates)
    raise InputError(f"the model returns {shapes}; expected boxes laid out as {names}: see pxcompress/tasks/README.md")


def _yolo_map(outputs: Mapping[str, Tensor]) -> Tensor | None:
    """The first output (n, 4 + classes, locations), or None; (n, boxes, 6) does not count, it is filtered already."""
    maps = [each for each in outputs.values() if is_real(each) and each.dim() == 3]
    maps = [each for each in maps if each.shape[1] > 4 and each.shape[2] > 6]
    return maps[0] if maps else None


def _read_yolo(outputs: Mapping[str, Tensor]) -> Candidates:
    """Read centre, width and height in pixels, and a probability for every class."""
    values = _yolo_map(outputs)
    assert values is not None
    boxes, chances = values.transpose(1, 2).split([4, values.shape[1] - 4], -1)
    return Candidates(box_convert(boxes, "cxcywh", "xyxy"), torch.logit(chances, LOGIT_EPSILON))


def _make_check(*names: str) -> Callable[[Mapping[str, Tensor]], bool]:
    return lambda outputs: all(name in outputs and outputs[name].dim() == 3 for name in names)


def _read_corners(outputs: Mapping[str, Tensor]) -> Candidates:
    """Read corners in pixels, and a logit for every class."""
    return Candidates(outputs["boxes"], outputs["logits"])


def _read_detr(outputs: Mapping[str, Tensor]) -> Candidates:
    """Read centre, width and height as shares of the sides; the last class of the softmax is "no object"."""
    logits = outputs["logits"]
    others = [torch.cat([logits[..., :k], logits[..., k + 1 :]], -1).logsumexp(-1) for k in range(logits.shape[-1] - 1)]
    margins = logits[..., :-1] - torch.stack(others, -1)
    return Candidates(box_convert(outputs["pred_boxes"], "cxcywh", "xyxy"), margins, relative=True, overlap=False)


def _read_rt_detr(outputs: Mapping[str, Tensor]) -> Candidates:
    """Read centre, width and height as shares of the sides, and a logit for every class."""
    corners = box_convert(outputs["pred_boxes"], "cxcywh", "xyxy")
    return Candidates(corners, outputs["logits"], relative=True, overlap=False)


def _has_encoder_logits(outputs: Mapping[str, Tensor]) -> bool:
    return _make_check("logits", "pred_boxes")(outputs) and any(name.startswith("enc_") for name in outputs)


for _layout in (
    BoxLayout("yolo", lambda outputs: _yolo_map(outputs) is not None, _read_yolo),
    BoxLayout("corners", _make_check("boxes", "logits"), _read_corners),
    BoxLayout("detr", _make_check("logits", "pred_boxes"), _read_detr),
    BoxLayout("rt-detr", _has_encoder_logits, _read_rt_detr),
):
    register_layout(_layout)
