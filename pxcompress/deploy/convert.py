"""A slim model handed to another ecosystem: converted by its own converter, and held against PyTorch where it runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pxcompress.deploy.converters import CONVERTERS, Converter, Predict, Source, as_arrays
from pxcompress.deploy.export import Exported, named_inputs, on_cpu
from pxcompress.deploy.quiet import capture_output
from pxcompress.errors import InputError, ModelError, ParityError, StageError, describe
from pxcompress.guard import name_failures
from pxcompress.models.adapter import Adapter, named_outputs
from pxcompress.models.signature import Signature, perturbed_rows
from pxcompress.onnx_in import OnnxModule
from pxcompress.proof import Parity

Inputs = Mapping[str, Tensor]
"""A batch of every input by name, (n, ...)."""

_BATCHES = 4
"""Batches of the comparison with PyTorch."""


@dataclass(frozen=True)
class InputKind:
    """Shape of a whole batch of an input, and the type of its numbers."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Converted:
    """What was written for an ecosystem, with `inputs` in this order, name -> shape and type.

    `parity` is None where its runtime does not run on this machine.
    """

    ecosystem: str
    path: Path
    bytes: int
    inputs: Mapping[str, InputKind]
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

    `example` is one batch (n, ...), the size that the result takes, several inputs packed; `output` names a single
    output. Raises `InputError` where the converter is missing, `ModelError` where it does not take the model, and
    `ParityError` where what it makes does not compute what PyTorch computes.
    """
    converter = check_ecosystem(ecosystem)
    with on_cpu(model), tempfile.TemporaryDirectory(dir=path.parent, prefix=".convert-") as folder:
        example = example.detach().cpu()
        exported = Exported.of(model, example, list(named_outputs(model, example, output)), output)
        source = Source(exported.model, onnx, _as_read(converter, model, exported.inputs))
        built = Path(folder) / path.name
        _build(converter, source, built)
        batches = _draw_batches(model, example)
        parity = _check_parity(converter, source, built, [(each, _as_read(converter, model, each)) for each in batches])
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(built, path)
    inputs = {
        name: InputKind(tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in source.inputs.items()
    }
    return Converted(ecosystem, path, _count_bytes(path), inputs, parity)


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


def _as_read(converter: Converter, model: nn.Module, inputs: Inputs) -> Inputs:
    """Inputs of the module as the converter's source takes them: of an ONNX file, in its layout and types."""
    return model.file_inputs(inputs) if converter.reads_onnx and isinstance(model, OnnxModule) else inputs


def _draw_batches(model: nn.Module, example: Tensor) -> Iterator[Inputs]:
    """Random inputs like the example, by name."""
    signature = model.signature_ if isinstance(model, Adapter) else Signature()
    generator, parts = torch.Generator().manual_seed(0), signature.parts(example) if signature.inputs else ()
    for _ in range(_BATCHES):
        rows = [perturbed_rows(each, part, generator) for each, part in zip(signature.inputs, parts, strict=True)]
        packed = signature.join(rows) if rows else torch.randn(example.shape, generator=generator)
        yield named_inputs(model, packed)


def _check_parity(
    converter: Converter, source: Source, path: Path, batches: Sequence[tuple[Inputs, Inputs]]
) -> Parity | None:
    """How far the written model is from PyTorch on random batches, as the module takes them and as the source does.

    `ParityError` where that is too far.
    """
    try:
        with name_failures(f"{converter.title}'s runtime"), capture_output():
            predict = converter.open(path)
            if predict is None:
                return None
            parity = _compare(predict, source, batches, converter.tolerance)
    except StageError as error:
        reason = describe(error.__cause__ or error)
        raise ModelError(f"what {converter.title}'s converter wrote does not run here: {reason}") from error
    if not parity.passed:
        raise ParityError(
            f"what {converter.title}'s converter wrote differs from PyTorch by up to {parity.max_abs:.2e} on "
            f"{parity.samples} random inputs; nothing was kept, ship {source.onnx.name} with ONNX Runtime"
        )
    return parity


def _compare(predict: Predict, source: Source, batches: Sequence[tuple[Inputs, Inputs]], tolerance: float) -> Parity:
    """Differences of all outputs on batches, and how often the largest value lies in the same place."""
    differences, scales, agreements, samples = [], [1.0], [], 0
    for inputs, as_read in batches:
        with torch.no_grad():
            expected = as_arrays(source.module(*inputs.values()))
        outputs = predict({name: value.contiguous().numpy() for name, value in as_read.items()})
        for one, other in zip(outputs, expected, strict=True):
            differences.append(float(np.abs(one.astype(np.float64) - other).max()))
            scales.append(float(np.abs(other).max()))
        count = len(next(iter(inputs.values())))
        first, reference = (each[0].reshape(count, -1).argmax(1) for each in (outputs, expected))
        agreements.append(float((first == reference).mean()))
        samples += count
    max_abs = float(np.max(differences))
    return Parity(samples, max_abs, float(np.mean(agreements)), bool(max_abs <= tolerance * max(scales)))


def _count_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.stat().st_size for file in files)
