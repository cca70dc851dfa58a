"""ONNX files in several precisions, made on the fly to be timed beside each other."""

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
    """Raise `InputError` for a precision that there is none of, and for int8 without `data` to calibrate on."""
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
    """Every float32 file of `files` in each of the precisions `names`: where it is -> the file it stands for.

    What is made goes into `folder`; `images` gives what a file is calibrated on. Raises `InputError` for a file that is
    not float32, and where one cannot be made.
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
