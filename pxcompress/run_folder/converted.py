"""Converts the slim model of a run folder for another ecosystem, into a file beside the ONNX file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pxcompress.choices import TARGETS
from pxcompress.deploy.convert import ConvertedModel, check_ecosystem, convert_model
from pxcompress.deploy.converters import Converter
from pxcompress.deploy.measure import check_batch_size
from pxcompress.errors import InputError, unknown
from pxcompress.models.adapter import Adapter
from pxcompress.models.signature import Signature
from pxcompress.report.build import read_report
from pxcompress.run_folder.names import SLIM
from pxcompress.run_folder.saved import load_pruned
from pxcompress.run_folder.sums import update_sums
from pxcompress.tasks import TASKS
from pxcompress.types import Pruned


@dataclass(frozen=True)
class HandOff:
    """The file written for an ecosystem, and notes for the user about it."""

    converted: ConvertedModel
    notes: tuple[str, ...]


def convert_folder(
    folder: Path,
    ecosystem: str,
    out: Path | None = None,
    *,
    batch_size: int = 1,
    precision: str = "",
    force: bool = False,
) -> HandOff:
    """Convert the slim model of a run folder for `ecosystem`; the default `out` is `folder`/model with its suffix.

    A `precision` chooses among the folder's ONNX files, for a converter that reads ONNX. Raises as `convert_model`
    does, and `InputError` for a folder that is no run folder or has no such file, and for a path that exists.
    """
    converter = check_ecosystem(ecosystem)
    check_batch_size(batch_size)
    report, onnx = read_report(folder), _find_onnx(folder, converter, ecosystem, precision)
    path = out or folder / f"{onnx.stem}{converter.suffix}"
    if path.exists() and not force:
        raise InputError(f"{str(path)!r} exists; add --force to replace it, or choose another with --out")
    pruned = load_pruned(folder)
    inputs = pruned.model.signature_ if isinstance(pruned.model, Adapter) else Signature()
    example = inputs.blank(report.input_shape, batch_size)
    converted = convert_model(pruned.model, onnx, example, ecosystem, path, output=TASKS.build(report.task).output_name)
    if out is None:
        update_sums(folder, [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()])
    return HandOff(converted, tuple(_notes(pruned, converter, converted)))


def _find_onnx(folder: Path, converter: Converter, ecosystem: str, precision: str) -> Path:
    """Path of the slim model's ONNX file in a precision. Raises `InputError` if there is none."""
    if precision and precision not in TARGETS:
        raise unknown("precision", precision, TARGETS)
    if precision in ("", "fp32"):
        return folder / SLIM
    if not converter.reads_onnx:
        raise InputError(f"ecosystem {ecosystem!r} is made from the float32 model; leave --precision {precision} out")
    path = folder / f"{Path(SLIM).stem}.{precision}.onnx"
    if not path.is_file():
        raise InputError(f"{str(folder)!r} has no {path.name}; make it with: run --targets {precision}")
    return path


def _notes(pruned: Pruned, converter: Converter, converted: ConvertedModel) -> Iterator[str]:
    """Notes for the user: that the result was not compared, and that the ecosystem pads some widths."""
    if converted.parity is None:
        yield f"{converter.title} does not run on this machine: the result is not compared with PyTorch; try it there"
    widths = [len(pruned.plan.kept(group)) + group.rows_beside for group in pruned.groups if group.kind != "head"]
    if odd := sum(width % converter.round_to != 0 for width in widths):
        yield (
            f"{odd} of {len(widths)} widths are no multiple of {converter.round_to}, as {converter.title} likes them; "
            f"prune with --round-to {converter.round_to} for it"
        )
