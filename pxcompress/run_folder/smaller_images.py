"""Whether the dense model on smaller images does better than the pruned one, for as many multiply-accumulates.

It does for some compact networks with public weights, and nothing has to be pruned for it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pxcompress.cost.count import count_macs
from pxcompress.deploy.predictions import Predictions, predictions
from pxcompress.errors import PxError
from pxcompress.models.adapter import named_outputs
from pxcompress.onnx_in import OnnxModule
from pxcompress.proof import Warning
from pxcompress.state import device_of, evaluating
from pxcompress.tasks.task import Outputs
from pxcompress.workload import Workload

SMALLEST_SCALE = 0.5
"""Smallest sides that are tried, as a share of the dense model's; that is a quarter of its MACs."""

SCALE_STEP = 0.95
"""Factor between two sides that are tried, where maps of few pixels make MACs shrink less than images."""

FAILURES = (PxError, ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
"""What models raise that take images of one size only: their own errors, of any kind."""


@dataclass(frozen=True, eq=False)
class ResizedInputs:
    """A PyTorch model behind a resize of its input images to `sizes`.

    It returns outputs as a session of a file does.
    """

    model: nn.Module
    sizes: tuple[int, ...]
    name: str

    def outputs_of(self, inputs: Tensor) -> Outputs:
        """Outputs (n, ...) by name, on the CPU, for images of any size."""
        with evaluating(self.model), torch.no_grad():
            resized = resize_images(inputs.to(device_of(self.model)), self.sizes)
            outputs = named_outputs(self.model, resized, self.name)
        return {name: value.cpu() for name, value in outputs.items()}


def resize_images(images: Tensor, sizes: Sequence[int]) -> Tensor:
    """Resize images (n, c, h, w) to `sizes`, with antialiasing when they become smaller."""
    if tuple(images.shape[2:]) == tuple(sizes):
        return images
    return F.interpolate(images, tuple(sizes), mode="bicubic", antialias=True, align_corners=False)


def resize_model(model: nn.Module, sizes: Sequence[int]) -> nn.Module:
    """A copy of `model` for images of another size; timm's transformers resample their position embeddings."""
    resized = copy.deepcopy(model)
    if callable(set_size := getattr(resized, "set_input_size", None)):
        set_size(img_size=tuple(sizes))
    return resized


def scale_side(side: int, scale: float, rounding: float = 0.5) -> int:
    """A side near `scale` times `side` that is a multiple of 16, or of 4 for small images, to suit strides and patches.

    With `rounding` 0 it is never above `scale` times `side`.
    """
    step = 16 if side >= 128 else 4
    return max(step, int(side * scale / step + rounding) * step)


def recommend_smaller_images(macs: tuple[int, int], pruned: Predictions, workload: Workload) -> tuple[Warning, ...]:
    """A warning if the dense model on smaller images, with no more MACs than the pruned one, is clearly better.

    `macs` are those of the dense and of the pruned model, `pruned` are the latter's predictions on the test split, over
    which the dense model runs once. Otherwise the result is (), also if outputs depend on the size of the image, as
    masks and boxes do.
    """
    dense, example, task = workload.loaded.model, workload.splits.example, workload.task
    if not workload.loaded.preprocessing.is_image or isinstance(dense, OnnxModule):
        return ()
    sides = tuple(example.shape[2:])
    try:
        resized, macs_resized = _resize_to_macs(dense, example, macs, task.output_name)
        whole = ResizedInputs(dense, sides, task.output_name)
        if resized is None or _output_shapes(resized, example) != _output_shapes(whole, example):
            return ()
        reference = {"whole": whole} if task.reads_dense else {"resized": resized}
        (name,) = reference
        judged = predictions({**reference, "resized": resized}, name, name, workload.splits.test, task)
    except FAILURES:
        return ()
    metric, change = task.metric, judged["resized"].change(pruned)
    if not change.is_shown or metric.gain(change.value) < 0:
        return ()
    words = "x".join(map(str, resized.sizes))
    quality, pruned_quality = judged["resized"].quality.value, pruned.quality.value
    return (
        Warning(
            "smaller-images",
            f"for no more computation the dense model on smaller images does better: {words} pixels are "
            f"{macs_resized / macs[0]:.2f} of the MACs with {metric.name} {metric.format(quality)}, the pruned "
            f"model has {metric.format(pruned_quality)}; give --input-size {words} and remove less",
        ),
    )


def _resize_to_macs(
    model: nn.Module, example: Tensor, macs: tuple[int, int], output_name: str
) -> tuple[ResizedInputs | None, int]:
    """The model on the largest smaller images with which it takes no more than `macs[1]`, and what it takes then.

    `macs[0]` are those of the model as it is. None where it takes no more than `macs[1]` as it is, or only on images of
    less than `SMALLEST_SCALE`.
    """
    whole, most = macs
    sides = tuple(example.shape[2:])
    scale, former_sizes = (most / whole) ** 0.5, {sides}
    while 1 > scale >= SMALLEST_SCALE:
        sizes = tuple(scale_side(side, scale, rounding=0) for side in sides)
        if sizes not in former_sizes and min(sizes) >= SMALLEST_SCALE * min(sides):
            resized = ResizedInputs(resize_model(model, sizes), sizes, output_name)
            if (macs_resized := count_macs(resized.model, resize_images(example, sizes))) <= most:
                return resized, macs_resized
        former_sizes.add(sizes)
        scale *= SCALE_STEP
    return None, 0


def _output_shapes(model: ResizedInputs, example: Tensor) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.outputs_of(example).items()}
