"""`pxcompress convert`: the slim model for another ecosystem, by that ecosystem's converter."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pxcompress.choices import CONVERSIONS, TARGETS, one_of
from pxcompress.commands.options import AsJson


def convert(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[str, typer.Option(help=f"Ecosystem: {one_of(CONVERSIONS)}.")],
    out: Annotated[
        Path | None, typer.Option(help="Path of the converted model.  [default: FOLDER/model with its suffix]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per call that the converted model takes.")] = 1,
    precision: Annotated[
        str, typer.Option(help=f"For tensorrt, which of the folder's files: {one_of(TARGETS)}.  [default: fp32]")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the file or folder --out if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert the slim model to TensorRT, LiteRT, Core ML, ExecuTorch.

    The result is compared with PyTorch if it runs on this machine. Every target needs the package of its converter;
    if that is missing, the error names it.
    """
    from pxcompress.report.table import format_conversion
    from pxcompress.run_folder.converted import convert_folder

    hand_off = convert_folder(folder, to, out, batch_size=batch_size, precision=precision, force=force)
    for note in hand_off.notes:
        print(f"pxcompress: {note}", file=sys.stderr)
    if as_json:
        content = {**dataclasses.asdict(hand_off.converted), "notes": hand_off.notes}
        print(json.dumps(content, indent=1, default=str))
    else:
        print(format_conversion(hand_off.converted))
