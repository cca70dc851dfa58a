"""Rewrites a model so that directions of its residual streams can be removed; each stream is checked by the outputs."""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import suppress

import torch
from torch import Tensor, nn

from pxcompress.errors import ModelError
from pxcompress.graph.removal import run_in_float64
from pxcompress.graph.rotation import add_linear_behind, merge_attention_biases_, rewrite_stream_
from pxcompress.graph.streams import Stream
from pxcompress.graph.tracing import TRACING_ERRORS, trace_streams
from pxcompress.graph.trial import make_trial_inputs
from pxcompress.models.outputs import difference
from pxcompress.state import evaluating

TOLERANCE = 1e-6
"""Largest difference of the outputs, in float64, by rewriting a stream, as a share of their scale."""


def make_rotatable(model: nn.Module, example: Tensor, only: Collection[str] | None = None) -> nn.Module:
    """A copy of `model` whose LayerNorm streams can be rotated, so that directions of them can be removed.

    `example` is one input, shape (1, ...); `only` names the streams by their first writers, None stands for all. The
    copy computes what `model` does, to rounding. What cannot be rewritten stays. Without any stream that can, `model`
    itself comes back: so do models read from ONNX files, which are written back into their own graphs.
    """
    modules = list(model.modules())
    has_norms = any(isinstance(module, nn.LayerNorm) for module in modules)
    if not has_norms or any(hasattr(module, "write_onnx") for module in modules) or (only is not None and not only):
        return model
    with suppress(ModelError, *TRACING_ERRORS):  # whatever does not trace or run is said by `find_groups`
        inputs = make_trial_inputs(model, example)
        twin = copy.deepcopy(model)
        merge_attention_biases_(twin)
        streams = trace_streams(twin, example)
        if mixed := [norm.name for stream in streams for norm in stream.norms if not norm.reads_all]:
            twin = add_linear_behind(twin, mixed)
            streams = trace_streams(twin, example)
        streams = [stream for stream in streams if only is None or stream.writers[0] in only]
        return _rewrite_streams(model, twin, streams, inputs)
    return model


def _rewrite_streams(model: nn.Module, twin: nn.Module, streams: list[Stream], inputs: Tensor) -> nn.Module:
    """`twin` with all streams rewritten for which the outputs stay the same; `model` itself if there are none."""
    result = model
    with torch.no_grad(), evaluating(model):
        expected = run_in_float64(model, inputs)
    for stream in streams:
        if not all(norm.reads_all for norm in stream.norms):
            continue
        candidate = copy.deepcopy(twin)
        with suppress(*TRACING_ERRORS):
            rewrite_stream_(candidate, stream)
            with torch.no_grad(), evaluating(candidate):
                if difference(run_in_float64(candidate, inputs), expected) <= TOLERANCE:
                    result = twin = candidate
    return result
