"""ExecuTorch, PyTorch's runtime for phones and small devices, by its own exporter, on the XNNPACK backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from pxcompress.deploy.converters import CONVERTERS, Predict, Source, as_arrays, explain_missing
from pxcompress.deploy.session import Array


@CONVERTERS.register("executorch")
@dataclass(frozen=True)
class ExecuTorch:
    """A .pte program in float32; operators that XNNPACK does not support run on the portable kernels."""

    title: ClassVar[str] = "ExecuTorch"
    package: ClassVar[str] = "executorch"
    suffix: ClassVar[str] = ".pte"
    round_to: ClassVar[int] = 8  # outputs that a kernel of XNNPACK computes at once on Arm
    reads_onnx: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-3

    def explain_failure(self) -> str:
        """Why executorch cannot be imported; "" if it can."""
        return explain_missing("executorch.exir", self.package)

    def convert(self, source: Source, path: Path) -> None:
        """Write a .pte program to `path`; the module is traced by torch.export."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = torch.export.export(source.module, tuple(source.inputs.values()))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        path.write_bytes(lowered.buffer)

    def open(self, path: Path) -> Predict:
        """The program as a function that predicts by ExecuTorch's runtime on the CPU, which comes with the exporter."""
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")

        def predict(inputs: Mapping[str, Array]) -> list[Array]:
            return as_arrays(tuple(method.execute([torch.from_numpy(value) for value in inputs.values()])))

        return predict
