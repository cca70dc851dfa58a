"""Core ML, for Apple's devices, by coremltools; it converts on Linux, too, and runs on macOS only."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from pxcompress.deploy.converters import CONVERTERS, Predict, Source, explain_missing
from pxcompress.deploy.session import Array


@CONVERTERS.register("coreml")
@dataclass(frozen=True)
class CoreMl:
    """An ML program, a folder .mlpackage, with weights in float16 as coremltools makes them by itself."""

    title: ClassVar[str] = "Core ML"
    package: ClassVar[str] = "coremltools"
    suffix: ClassVar[str] = ".mlpackage"
    round_to: ClassVar[int] = 32  # the Neural Engine pads rows of float16 to 64 bytes
    reads_onnx: ClassVar[bool] = False
    tolerance: ClassVar[float] = 2e-2

    def explain_failure(self) -> str:
        """Why coremltools cannot be imported; "" if it can."""
        return explain_missing("coremltools", self.package)

    def convert(self, source: Source, path: Path) -> None:
        """Write a Core ML program to `path`; the module is traced by torch.export."""
        import coremltools

        program = torch.export.export(source.module, tuple(source.inputs.values())).run_decompositions({})
        coremltools.convert(
            program, convert_to="mlprogram", minimum_deployment_target=coremltools.target.iOS17, skip_model_load=True
        ).save(str(path))

    def open(self, path: Path) -> Predict | None:
        """The model as a function that predicts by Core ML, a part of macOS; None on other systems."""
        if sys.platform != "darwin":
            return None
        import coremltools

        model = coremltools.models.MLModel(str(path))
        description = model.get_spec().description
        names, output_names = ([port.name for port in ports] for ports in (description.input, description.output))

        def predict(inputs: Mapping[str, Array]) -> list[Array]:
            outputs = model.predict(dict(zip(names, inputs.values(), strict=True)))
            return [np.asarray(outputs[name]) for name in output_names]

        return predict
