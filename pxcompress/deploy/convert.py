"""A slim model handed to another ecosystem: converted by its own converter, and held against PyTorch where it runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pxcompress.deploy.converters import CONVERTERS, Converter, Predict, Source, as_arrays
from pxcompress.deploy.export import FlatOutputs, on_cpu
from pxcompress.deploy.quiet import capture_output
from pxcompress.errors import InputError, ModelError, ParityError, StageError, describe
from pxcompress.guard import name_failures
from pxcompress.models.adapter import named_outputs
from pxcompress.proof import Parity

_BATCHES = 4
"""Batches of the comparison with PyTorch."""


@dataclass(frozen=True)
class Converted:
    """What was written for an ecosystem; `parity` is None where its runtime does not run on this machine."""

    ecosystem: str
    path: Path
    bytes: int
    input_shape: tuple[int, ...]
    parity: Parity | None


def check_ecosystem(ecosystem: str) -> Converter:
    """The converter of an ecosystem. Raises `InputError` for an unknown one, and where it does not work here."""
    converter = CONVERTERS.get(ecosystem)()
    if reason := converter.explain_failure():
        raise InputError(f"no conversion to {ecosystem!r} here: {reason}")
    return converter


def convert_model(
    model: nn.Module, onnx: Path, example: Tensor, ecosystem: str, path: Path, *, output: str
) -> Converted:
    """Write `model`, which was exported to `onnx`, for `ecosystem` to `path`; it appears whole or not at all.

    `example` is one batch (n, ...), the size that the result takes; `output` names a single output. Raises `InputError`
    where the converter is missing, `ModelError` where it does not take the model, and `ParityError` where what it makes
    does not compute what PyTorch computes.
    """
    converter = check_ecosystem(ecosystem)
    with on_cpu(model), tempfile.TemporaryDirectory(dir=path.parent, prefix=".convert-") as folder:
        example = example.detach().cpu()
        flat = FlatOutputs.of(model, list(named_outputs(model, example, output)), output)
        source, built = Source(flat, onnx, example), Path(folder) / path.name
        _build(converter, source, built)
        parity = _check_parity(converter, source, built)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(built, path)
    return Converted(ecosystem, path, _count_bytes(path), tuple(example.shape), parity)


def _build(converter: Converter, source: Source, path: Path) -> None:
    """Run a converter without its chatter. Raises `ModelError`, with what to do, for whatever it raises."""
    try:
        with name_failures(f"{converter.title}'s converter"), capture_output():
            converter.convert(source, path)
    except StageError as error:
        reason = describe(error.__cause__ or error)
        raise ModelError(
            f"{converter.title}'s converter ({converter.package}) does not take this model: {reason}; a newer version "
            f"may, else ship {source.onnx.name} with ONNX Runtime"
        ) from error
    if not path.exists():
        raise ModelError(f"{converter.title}'s converter ({converter.package}) wrote nothing; run with --debug")


def _check_parity(converter: Converter, source: Source, path: Path) -> Parity | None:
    """How far the written model is from PyTorch on random inputs; `ParityError` where that is too far."""
    try:
        with name_failures(f"{converter.title}'s runtime"), capture_output():
            predict = converter.open(path)
            if predict is None:
                return None
            parity = _compare(predict, source, converter.tolerance)
    except StageError as error:
        reason = describe(error.__cause__ or error)
        raise ModelError(f"what {converter.title}'s converter wrote does not run here: {reason}") from error
    if not parity.passed:
        raise ParityError(
            f"what {converter.title}'s converter wrote differs from PyTorch by up to {parity.max_abs:.2e} on "
            f"{parity.samples} random inputs; nothing was kept, ship {source.onnx.name} with ONNX Runtime"
        )
    return parity


def _compare(predict: Predict, source: Source, tolerance: float) -> Parity:
    """Differences of all outputs on random inputs, and how often the largest value lies in the same place."""
    generator = torch.Generator().manual_seed(0)
    differences, scales, agreements, samples = [], [1.0], [], 0
    for _ in range(_BATCHES):
        batch = torch.randn(source.example.shape, generator=generator)
        with torch.no_grad():
            expected = as_arrays(source.module(batch))
        outputs = predict(batch.numpy())
        for one, other in zip(outputs, expected, strict=True):
            differences.append(float(np.abs(one.astype(np.float64) - other).max()))
            scales.append(float(np.abs(other).max()))
        first, reference = (each[0].reshape(len(batch), -1).argmax(1) for each in (outputs, expected))
        agreements.append(float((first == reference).mean()))
        samples += len(batch)
    max_abs = float(np.max(differences))
    return Parity(samples, max_abs, float(np.mean(agreements)), bool(max_abs <= tolerance * max(scales)))


def _count_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.stat().st_size for file in files)
