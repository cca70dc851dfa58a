"""Checks a module that was read from an ONNX file against ONNX Runtime, and names the first node where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from pxcompress.deploy.all_outputs import run_graph
from pxcompress.errors import ModelError
from pxcompress.onnx_in import OnnxModule, read_file
from pxcompress.onnx_in.half import HALF_TOLERANCE
from pxcompress.onnx_in.module import trace_run
from pxcompress.onnx_in.trial import draw_inputs
from pxcompress.state import device_of

TOLERANCE = 1e-4
"""Largest difference from ONNX Runtime, as a share of an output's scale."""

SEEDS = (11, 12)

LEAST_SCALE = 1e-6
"""Smallest scale of an output, for outputs that are almost zero."""

SATURATING_OPERATORS = ("Sigmoid", "HardSigmoid", "Softmax", "Tanh")
"""Operators whose outputs are at most 1, so that their errors count relative to 1.

Where outputs are small, they multiply what rounding does to large logits: where a logit of 50 is off by a millionth of
it, a small probability differs by a twenty-thousandth of it.
"""

RESHAPING_OPERATORS = ("Transpose", "Regroup", "Reshape", "Squeeze", "Unsqueeze", "Slice")
"""Operators that compute nothing and may stand between one of `SATURATING_OPERATORS` and the output."""


def read_onnx(path: Path | str, sizes: Mapping[str, Sequence[int]] | None = None) -> OnnxModule:
    """An ONNX file as a module that `compress_module` takes, and that writes itself back with `write_onnx(path, {})`.

    `sizes` are shapes of one sample by input, where the file leaves them open. Raises `ModelError` for a file that
    cannot be read, or that the module does not compute as ONNX Runtime does.
    """
    module = read_file(path, sizes)
    check_agrees(module)
    return module


def check_agrees(module: nn.Module) -> None:
    """Raise `ModelError` where a module that was read from a file and ONNX Runtime compute different outputs.

    Other modules pass. Two seeds, and two batches where the file takes any.
    """
    if not isinstance(module, OnnxModule):
        return
    source = module.source
    for seed, extra_samples in zip(SEEDS, (0, 1), strict=True):
        inputs = draw_like(module, seed, extra_samples)
        with torch.no_grad():
            results = module.file_outputs(**{name: value.to(device_of(module)) for name, value in inputs.items()})
        outputs = list(results) if isinstance(results, tuple) else [results]
        worst = _worst(outputs, module, source.path, module.file_inputs(inputs))
        if source.types and worst <= HALF_TOLERANCE:  # what is left may be rounding
            worst = _worst(outputs, module, _bytes(source.model), module.graph_inputs(inputs))
        if not worst <= TOLERANCE:
            raise ModelError(
                f"{source.path.name} computes something else in PyTorch than in ONNX Runtime: outputs are "
                f"{worst:.2g} of their scale apart, {_describe_parting(module)}; please report the file"
            )


def _worst(outputs: Sequence[Tensor], module: OnnxModule, file: Path | bytes, inputs: Mapping[str, Tensor]) -> float:
    """Largest relative difference between any output and that of ONNX Runtime."""
    expected, scales = run_graph(file, _arrays(inputs)), least_scales(module)
    return max(relative_difference(*values) for values in zip(outputs, expected, scales, strict=True))


def least_scales(module: OnnxModule) -> list[float]:
    """The smallest scale for each output: 1 if it comes from one of `SATURATING_OPERATORS`, else next to nothing."""
    makers = {name: step for step in module.steps for name in step.outputs}
    scales = []
    for place, name in enumerate(module.made):
        step = module.tails.get(place, makers.get(name))
        while step is not None and step.operator in RESHAPING_OPERATORS:
            step = makers.get(step.inputs[0] or "")
        scales.append(1.0 if step is not None and step.operator in SATURATING_OPERATORS else LEAST_SCALE)
    return scales


def draw_like(module: OnnxModule, seed: int, extra_samples: int = 0) -> dict[str, Tensor]:
    """Random inputs shaped like the module's example; `extra_samples` more where the file leaves their number open."""
    source = module.source
    shapes = {name: list(value.shape) for name, value in source.example.items()}
    for value in source.model.graph.inputs:
        shape = shapes[value.name or ""]
        if shape and value.shape is not None and not (isinstance(value.shape[0], int) and value.shape[0] > 0):
            shape[0] += extra_samples
    drawn = draw_inputs(source.model, shapes, seed)
    return {name: value.to(source.example[name].dtype) for name, value in drawn.items()}


def relative_difference(value: Tensor, expected: np.ndarray, least_scale: float = LEAST_SCALE) -> float:
    """Largest difference as a share of the expected scale; infinite if shapes differ; NaN equals NaN.

    The scale is the largest number that is expected, and at least `least_scale`.
    """
    actual, reference = value.detach().cpu().double().numpy(), np.asarray(expected, dtype=np.float64)
    if actual.shape != reference.shape:
        return float("inf")
    if not reference.size:
        return 0.0
    is_same = (actual == reference) | (np.isnan(actual) & np.isnan(reference))
    finite = np.abs(reference[np.isfinite(reference)])
    scale = max(float(finite.max()) if finite.size else 0.0, least_scale)
    with np.errstate(invalid="ignore"):
        return float(np.where(is_same, 0.0, np.abs(actual - reference)).max() / scale)


def _describe_parting(module: OnnxModule) -> str:
    """A sentence on the first node where the module's values differ from those of the graph that it was made from."""
    source = module.source
    traces = [trace for trace in trace_run(module, keep_values=True) if trace.step.operator != "Attention"]
    model = ir.from_proto(ir.to_proto(source.model))
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    names = [name for trace in traces for name in trace.step.outputs if name in by_name]
    outputs = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(by_name[name] for name in dict.fromkeys(names) if name not in outputs)
    order = [value.name or "" for value in model.graph.outputs]
    values = dict(zip(order, run_graph(_bytes(model), _arrays(module.graph_inputs(source.example))), strict=True))
    for trace in traces:
        for name, value in zip(trace.step.outputs, trace.values, strict=False):
            if name in values and not relative_difference(value, values[name]) <= TOLERANCE:
                return f"first at {trace.step.operator} {trace.step.node or name!r}"
    return "although every node agrees"


def _bytes(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString())


def _arrays(inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in inputs.items()}
