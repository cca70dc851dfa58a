"""Verifies that an ONNX file computes what its PyTorch model computes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pxcompress.deploy import runtime
from pxcompress.deploy.export import on_cpu
from pxcompress.errors import DataError
from pxcompress.models.adapter import named_outputs, outputs_in_file
from pxcompress.models.outputs import by_name, max_difference
from pxcompress.onnx_in import OnnxModule
from pxcompress.onnx_in.half import HALF_TOLERANCE
from pxcompress.proof import Parity
from pxcompress.tasks.agreement import Agreement
from pxcompress.tasks.task import Task
from pxcompress.types import Batches

_BATCH = 16
"""Most samples in a batch of the comparison."""


def verify_parity(
    model: nn.Module,
    artifact_path: Path,
    inputs: Iterable[Tensor] | Batches,
    *,
    task: Task | None = None,
    tolerance: float = 1e-3,
    samples: int = 64,
) -> Parity:
    """Compare an ONNX file with `model`: both on the CPU in float32, in batches of 1, 2 and up to 16.

    All outputs are compared; agreement is what the `task` says of them, by default the place of the largest logit.

    `inputs` are tensors (n, ...) or (inputs, labels) pairs, of which the first `samples` are used. Passed when
    max |difference| <= tolerance * max(1, max |outputs of PyTorch|), so never with a NaN; a file in half precision
    may differ by 0.05. `model` is left as it was.
    """
    all_inputs = _take(inputs, samples)
    repeated_inputs = all_inputs if len(all_inputs) > 2 else torch.cat([all_inputs] * 3)
    if isinstance(model, OnnxModule) and model.source.types:
        tolerance = max(tolerance, HALF_TOLERANCE)
    session, judge = runtime.open_session(artifact_path, "cpu"), task or Agreement()
    differences, scales, agreements = [], [1.0], []
    with on_cpu(model):
        for batch in (repeated_inputs[:1], repeated_inputs[:2], *repeated_inputs.split(_BATCH)):
            expected, outputs = file_outputs(model, batch, judge.output_name), session.outputs_of(batch)
            differences.append(max_difference(outputs, expected))
            scales.append(max(float(value.abs().max()) for value in expected.values()))
            agreements.append(judge.agreement(outputs, expected))
    max_abs = float(np.max(differences))
    return Parity(
        samples=len(all_inputs),
        max_abs=max_abs,
        agreement=float(torch.cat(agreements[2:]).mean()),
        passed=bool(max_abs <= tolerance * np.max(scales)),
    )


def resize_doubled(images: Tensor) -> tuple[Tensor, Tensor]:
    """The first of `images` (n, channels, height, width), resized to twice its height, and to twice its width.

    A divisor of the sides stays a divisor.
    """
    height, width = images.shape[2:]
    first = images[:1].detach().cpu()
    return interpolate(first, (2 * height, width), mode="bilinear"), interpolate(
        first, (height, 2 * width), mode="bilinear"
    )


def verify_other_sizes(model: nn.Module, artifact_path: Path, images: Tensor, task: Task) -> Parity:
    """Run `verify_parity` at two image sizes that `model` was not exported with; returns the worse result.

    Raises `InputError` where the file does not run on such images.
    """
    results = [verify_parity(model, artifact_path, [each], task=task) for each in resize_doubled(images)]
    return max(results, key=lambda parity: (not parity.passed, parity.max_abs))


def file_outputs(model: nn.Module, batch: Tensor, only: str) -> dict[str, Tensor]:
    """Outputs that the file of `model` must give: for a model from an ONNX file, with the softmax that it leaves
    out.
    """
    if isinstance(model, OnnxModule):
        return by_name(outputs_in_file(model, batch), only)
    return named_outputs(model, batch, only)


def _take(inputs: Iterable[Tensor] | Batches, samples: int) -> Tensor:
    """The first `samples` inputs, joined to one tensor on the CPU. Raises `DataError`."""
    parts: list[Tensor] = []
    missing = samples
    for item in inputs:
        batch = item if isinstance(item, Tensor) else item[0]
        parts.append(batch[:missing].detach().cpu())
        missing -= len(parts[-1])
        if missing <= 0:
            break
    if missing == samples:
        raise DataError("no inputs to compare the exported file with PyTorch on; expected at least one sample")
    return torch.cat(parts)
