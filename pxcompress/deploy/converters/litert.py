"""LiteRT (TensorFlow Lite), for Android and small devices, by litert-torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pxcompress.deploy.converters import CONVERTERS, Predict, Source, explain_missing
from pxcompress.deploy.session import Array


@CONVERTERS.register("litert")
@dataclass(frozen=True)
class LiteRt:
    """A .tflite file in float32; its inputs have channels first, as in PyTorch."""

    title: ClassVar[str] = "LiteRT"
    package: ClassVar[str] = "litert-torch"
    suffix: ClassVar[str] = ".tflite"
    round_to: ClassVar[int] = 8  # outputs that a kernel of XNNPACK computes at once on Arm
    reads_onnx: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-3

    def explain_failure(self) -> str:
        """Why litert-torch cannot be imported, with advice on its pins, which are too old for pxcompress.

        "" if it can.
        """
        reason = explain_missing("litert_torch", self.package)
        return f"{reason}, then pip install -U pydantic typing-extensions" if reason else ""

    def convert(self, source: Source, path: Path) -> None:
        """Write the model as a .tflite flatbuffer."""
        import litert_torch

        litert_torch.convert(source.module, tuple(source.inputs.values())).export(str(path))

    def open(self, path: Path) -> Predict:
        """The model as a function that predicts by LiteRT's interpreter on the CPU, which comes with the converter."""
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=str(path))
        runner = interpreter.get_signature_runner()
        names = _in_order(runner.get_input_details())

        def predict(inputs: Mapping[str, Array]) -> list[Array]:
            outputs = runner(**dict(zip(names, inputs.values(), strict=True)))
            return [outputs[name] for name in _in_order(outputs)]

        return predict


def _in_order(names: Iterable[str]) -> list[str]:
    """Names sorted by the number at their end, such as "_0", "_1"."""
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))
