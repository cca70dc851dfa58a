"""Runs an ONNX file once on the CPU with few optimisations, and returns every output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from pxcompress.deploy.backends.onnxruntime import ORT_ERRORS
from pxcompress.deploy.quiet import capture_output, shorten_message
from pxcompress.deploy.session import Array
from pxcompress.errors import InputError


def run_graph(source: Path | bytes, feed: Mapping[str, Array]) -> list[Array]:
    """Every output that the graph of `source` (a file, or its bytes) lists, in order, for the inputs `feed`.

    Raises `InputError` where ONNX Runtime cannot load or run the file.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    name = source.name if isinstance(source, Path) else "the graph"
    try:
        with capture_output():
            session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            input_names = {port.name for port in session.get_inputs()}
            return list(session.run(None, {key: value for key, value in feed.items() if key in input_names}))
    except ORT_ERRORS as error:
        raise InputError(f"{name} does not run in ONNX Runtime: {shorten_message(str(error))}") from error
