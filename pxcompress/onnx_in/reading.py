"""An ONNX file as a module of PyTorch's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pxcompress.onnx_in.building import Builder
from pxcompress.onnx_in.folding import fold_scales_
from pxcompress.onnx_in.heads import group_attention_
from pxcompress.onnx_in.module import OnnxModule
from pxcompress.onnx_in.opening import open_graph
from pxcompress.onnx_in.trial import run_trials


def read_file(path: Path | str, sizes: Mapping[str, Sequence[int]] | None = None) -> OnnxModule:
    """The file as a module in eval mode.

    `sizes` are shapes of one sample by input, where the file leaves them open. Raises `ModelError`, before any work,
    for a file that cannot be read. That it computes what ONNX Runtime does is checked by `deploy.onnx_modules`.
    """
    path = Path(path)
    model = open_graph(path)
    trials = run_trials(model, sizes or {}, path.name)
    if fold_scales_(model, trials):
        trials = trials.again()
    module = Builder(trials, path).build()
    group_attention_(module)
    return module
