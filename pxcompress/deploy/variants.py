"""Converts ONNX files to several precisions on the fly, to time them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pxcompress.deploy import runtime
from pxcompress.deploy.precision import PRECISIONS, convert
from pxcompress.deploy.session import Session
from pxcompress.errors import InputError, unknown
from pxcompress.types import Batches

FP32 = "fp32"


def check_precisions(names: Sequence[str], *, data: bool) -> None:
    """Raise `InputError` for an unknown precision, for int8 without `data`, and for `data` that no precision uses."""
    precisions = (FP32, *PRECISIONS)
    for name in names:
        if name not in precisions:
            raise unknown("precision", name, precisions)
    if "int8" in names and not data:
        raise InputError("precision int8 is calibrated on images; give some with --data, or leave it out")
    if data and not set(names) & set(PRECISIONS):
        raise InputError("--data has no effect without --precision fp16 or int8; add it")


def convert_files(
    files: Sequence[Path], names: Sequence[str], images: Callable[[Session], Batches], folder: Path
) -> dict[Path, str]:
    """Convert every float32 file to each of the precisions `names`; returns path to time -> the source file's path.

    Results are written to `folder`; for "fp32" the source file itself is listed. `images` gives calibration batches for
    a session. Raises `InputError` for a file that is not float32, and if a conversion fails.
    """
    sources: dict[Path, str] = {}
    for place, file in enumerate(dict.fromkeys(files)):
        session = runtime.open_session(file, "cpu")
        if session.precision != FP32:
            raise InputError(f"{file} is {session.precision} already; --precision takes float32 files")
        for name in dict.fromkeys(names):
            path = file if name == FP32 else folder / f"{place}.{name}.onnx"
            if name != FP32:
                convert(file, path, name, images(session))
            sources[path] = str(file)
    return sources
