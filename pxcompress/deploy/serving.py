"""The layout of a model repository, as NVIDIA Triton Inference Server reads it."""

from __future__ import annotations

import shutil
from pathlib import Path

from pxcompress.checks import safe_name
from pxcompress.deploy.export import INPUT, OUTPUT, onnx_files
from pxcompress.errors import InputError
from pxcompress.proof import Report

_CONFIG = """name: "{name}"
backend: "onnxruntime"
max_batch_size: 64
input [ {{ name: "{input}" data_type: TYPE_FP32 dims: [ {shape} ] }} ]
output [ {{ name: "{output}" data_type: TYPE_FP32 dims: [ {classes} ] label_filename: "labels.txt" }} ]
dynamic_batching {{ }}
"""


def write_repository(folder: Path, report: Report, root: Path) -> Path:
    """Put model.onnx of the run `folder` into the model repository `root`, as version 1; returns the model's folder.

    It is called like the run folder and has config.pbtxt and labels.txt (a class in a line). Raises `InputError` where
    `root` has a model of this name already.
    """
    name = safe_name(folder.resolve().name)
    place = root / name
    if place.exists():
        raise InputError(f"the repository has {str(place)!r} already; remove it, or choose another with --triton")
    shape = ", ".join(map(str, report.input_shape))
    said = {"name": name, "input": INPUT, "output": OUTPUT, "shape": shape, "classes": len(report.data.classes)}
    files = onnx_files(folder / "model.onnx")
    (place / "1").mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, place / "1" / file.name)
    (place / "labels.txt").write_text("".join(f"{' '.join(each.split())}\n" for each in report.data.classes))
    (place / "config.pbtxt").write_text(_CONFIG.format(**said))
    return place
