"""Converts a slim model for another ecosystem, by its own converter, and compares it with PyTorch if it runs here."""

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
from pxcompress.deploy.export import ExportableModule, named_inputs, on_cpu
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
"""Number of random batches on which a converted model is compared with PyTorch."""


@dataclass(frozen=True)
class InputKind:
    """Shape of a whole batch of an input, and the type of its numbers."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ConvertedModel:
    """The file written for an ecosystem; `inputs` maps names, in order, to shape and type.

    `parity` is None if its runtime does not run on this machine.
    """

    ecosystem: str
    path: Path
    bytes: int
    inputs: Mapping[str, InputKind]
    parity: Parity | None


def check_ecosystem(ecosystem: str) -> Converter:
    """The converter for an ecosystem. Raises `InputError` for an unknown one, and if it does not work here."""
    converter = CONVERTERS.get(ecosystem)()
    if reason := converter.explain_failure():
        raise InputError(f"no conversion to {ecosystem!r} here: {reason}")
    return converter


def convert_model(
    model: nn.Module, onnx: Path, example: Tensor, ecosystem: str, path: Path, *, output: str
) -> ConvertedModel:
    """Convert `model`, whose ONNX file is `onnx`, for `ecosystem`; `path` appears whole or not at all.

    `example` is one batch (n, ...); the converted model takes batches of exactly this shape. Several inputs are packed
    in one tensor, see `Signature`. If the model has a single output, `output` becomes its name. Raises `InputError`
    where the converter is missing, `ModelError` where it does not take the model, and `ParityError` where the
    converted model does not compute what PyTorch computes.
    """
    converter = check_ecosystem(ecosystem)
    with on_cpu(model), tempfile.TemporaryDirectory(dir=path.parent, prefix=".convert-") as folder:
        example = example.detach().cpu()
        exported = ExportableModule.of(model, example, list(named_outputs(model, example, output)), output)
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
    return ConvertedModel(ecosystem, path, _count_bytes(path), inputs, parity)


def _build(converter: Converter, source: Source, path: Path) -> None:
    """Run a converter with its output suppressed. Raises `ModelError` with advice for any failure."""
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
    """Inputs of the module in the form that the converter's source takes: layout and types of the ONNX file if it reads
    that.
    """
    return model.file_inputs(inputs) if converter.reads_onnx and isinstance(model, OnnxModule) else inputs


def _draw_batches(model: nn.Module, example: Tensor) -> Iterator[Inputs]:
    """Random batches of inputs, by name, with the shapes of the example."""
    signature = model.signature_ if isinstance(model, Adapter) else Signature()
    generator, parts = torch.Generator().manual_seed(0), signature.parts(example) if signature.inputs else ()
    for _ in range(_BATCHES):
        rows = [perturbed_rows(each, part, generator) for each, part in zip(signature.inputs, parts, strict=True)]
        packed = signature.join(rows) if rows else torch.randn(example.shape, generator=generator)
        yield named_inputs(model, packed)


def _check_parity(
    converter: Converter, source: Source, path: Path, batches: Sequence[tuple[Inputs, Inputs]]
) -> Parity | None:
    """Compare the converted model with PyTorch on batches; None if it cannot run here.

    Each batch is given as the module takes it and as the converter's source does. Raises `ParityError` for a difference
    that is too large.
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
    """Differences of all outputs on the batches, and how often the index of the largest value is the same."""
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
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.stat().st_size for file in files)
