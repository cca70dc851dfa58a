"""Reads an ONNX file as a PyTorch module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pxcompress.onnx_in.building import Builder
from pxcompress.onnx_in.channels import are_channels_last, put_channels_first_, take_floats_
from pxcompress.onnx_in.folding import fold_scales_
from pxcompress.onnx_in.half import widen_
from pxcompress.onnx_in.heads import group_attention_
from pxcompress.onnx_in.module import OnnxModule
from pxcompress.onnx_in.opening import open_graph
from pxcompress.onnx_in.trial import list_open_sizes, run_trials
from pxcompress.onnx_in.views import restore_views_


def read_file(
    path: Path | str, sizes: Mapping[str, Sequence[int]] | None = None, *, channels_last: bool | None = None
) -> OnnxModule:
    """Read an ONNX file as a module in eval mode.

    `sizes` are shapes of one sample by input name, for sizes that the file leaves open. Images are taken with channels
    first, even if the file has them last; its shapes tell which, unless `channels_last` does. Raises `ModelError`,
    before any work, for a file that cannot be read. `deploy.onnx_modules` checks that the module computes what ONNX
    Runtime does.
    """
    path = Path(path)
    model = open_graph(path)
    types = widen_(model)
    trials = run_trials(model, sizes or {}, path.name)
    has_views, has_scales = restore_views_(model, trials), fold_scales_(model, trials)
    if has_views or has_scales:
        trials = trials.again()
    module = Builder(trials, path).build()
    module.source = replace(module.source, types=types)
    shapes = {value.name: list_open_sizes(value) for value in model.graph.inputs}
    if channels_last is None:
        channels_last = len(module.input_names) == 1 and are_channels_last(shapes[module.input_names[0]])
    if channels_last:
        put_channels_first_(module)
    take_floats_(module)
    group_attention_(module)
    return module
