"""Other libraries that turn ONNX files into PyTorch modules, beside our reader, on the same files and inputs.

Called by `onnx_in.py --readers`, in an environment that has onnx2torch and onnx2pytorch. A file is read where the
module computes what ONNX Runtime does, by the tolerances that we have for our own. Layers are convolutions and linear
layers with weights: what is a function of a constant in a module cannot be pruned there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from pxcompress.deploy.all_outputs import run_graph
from pxcompress.deploy.onnx_modules import TOLERANCE, relative_difference
from pxcompress.errors import ModelError
from pxcompress.guard import describe
from pxcompress.onnx_in import OnnxModule, read_file
from pxcompress.onnx_in.half import HALF_TOLERANCE

Row = dict[str, Any]
Sizes = Mapping[str, tuple[int, ...]]
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def _read_ours(path: Path, sizes: Sizes) -> nn.Module:
    return read_file(path, sizes)


def _read_onnx2torch(path: Path, sizes: Sizes) -> nn.Module:
    from onnx2torch import convert  # type: ignore[import-not-found,unused-ignore]

    return convert(str(path))  # type: ignore[no-any-return]


def _read_onnx2pytorch(path: Path, sizes: Sizes) -> nn.Module:
    from onnx2pytorch import ConvertModel  # type: ignore[import-not-found,unused-ignore]

    return ConvertModel(onnx.load(path), experimental=True)  # type: ignore[no-any-return]


READERS: Mapping[str, Callable[[Path, Sizes], nn.Module]] = {
    "ours": _read_ours,
    "onnx2torch": _read_onnx2torch,
    "onnx2pytorch": _read_onnx2pytorch,
}


def compare_readers(path: Path, sizes: Sizes) -> list[Row]:
    """A row for every reader: "failure" is empty where its module computes what ONNX Runtime does."""
    try:
        source = read_file(path, sizes)
    except ModelError:
        return []
    inputs = source.file_inputs(source.source.example)
    expected = run_graph(path, {name: value.numpy() for name, value in inputs.items()})
    tolerance = HALF_TOLERANCE if source.source.types else TOLERANCE
    return [
        {"file": path.name, "reader": name, **_judge(name, path, sizes, (inputs, expected, tolerance))}
        for name in READERS
    ]


def _judge(name: str, path: Path, sizes: Sizes, case: tuple[dict[str, Tensor], list[np.ndarray], float]) -> Row:
    """Whether a reader's module computes what is expected of the inputs, and how many layers it has."""
    inputs, expected, tolerance = case
    try:
        module = READERS[name](path, sizes).eval()
        with torch.no_grad():
            if isinstance(module, OnnxModule):
                outputs = module.file_outputs(**module.source.example)
            else:
                outputs = module(*inputs.values())
        listed = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        error = max(relative_difference(value.float(), each) for value, each in zip(listed, expected, strict=True))
        layers = sum(isinstance(layer, LAYERS) for layer in module.modules())
    except Exception as failure:  # noqa: BLE001  (other packages may fail in any way)
        return {"failure": describe(failure)[:120], "layers": 0}
    return {"failure": "" if error <= tolerance else f"outputs differ by {error:.1e}", "layers": layers}


def show_readers(rows: list[Row]) -> None:
    """One line for every reader."""
    for name in READERS:
        own = [row for row in rows if row["reader"] == name]
        read = [row for row in own if not row["failure"]]
        print(f"{name:14s} reads {len(read)} of {len(own)} files, {sum(row['layers'] for row in read)} layers")
