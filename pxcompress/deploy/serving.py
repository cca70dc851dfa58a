"""The layout of a model repository, as NVIDIA Triton Inference Server reads it."""

from __future__ import annotations

import shutil
from pathlib import Path

from pxcompress.checks import safe_name
from pxcompress.deploy.export import INPUT, OUTPUT, artifact_of, onnx_files
from pxcompress.errors import InputError
from pxcompress.proof import Report

_CONFIG = """name: "{name}"
backend: "onnxruntime"
max_batch_size: {most}
input [ {{ name: "{input}" data_type: TYPE_FP32 dims: [ {shape} ] }} ]
output [ {{ name: "{output}" data_type: TYPE_FP32 dims: [ {classes} ] label_filename: "labels.txt" }} ]
"""
_BATCHING = "dynamic_batching { }\n"
_MOST = 64
"""Samples that the server may put together."""


def write_repository(folder: Path, report: Report, root: Path) -> Path:
    """Put model.onnx of the run `folder` into the model repository `root`, as version 1; returns the model's folder.

    It is called like the run folder and has config.pbtxt and labels.txt (a class in a line). Raises `InputError` where
    `root` has a model of this name already.
    """
    name = safe_name(folder.resolve().name)
    place = root / name
    if place.exists():
        raise InputError(f"the repository has {str(place)!r} already; remove it, or choose another with --triton")
    files = onnx_files(folder / "model.onnx")
    batch = artifact_of(folder / "model.onnx").input_shape[:1]
    lead = () if batch == (None,) else batch  # a fixed one is part of the shape, for the server
    said: dict[str, object] = {"name": name, "input": INPUT, "output": OUTPUT, "most": 0 if lead else _MOST}
    said["shape"] = ", ".join(map(str, (*lead, *report.input_shape)))
    said["classes"] = ", ".join(map(str, (*lead, len(report.data.classes))))
    (place / "1").mkdir(parents=True)
    for file in files:
        shutil.copyfile(file, place / "1" / file.name)
    (place / "labels.txt").write_text("".join(f"{' '.join(each.split())}\n" for each in report.data.classes))
    (place / "config.pbtxt").write_text(_CONFIG.format(**said) + ("" if lead else _BATCHING))
    return place
