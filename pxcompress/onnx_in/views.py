"""Removes Gather nodes that change nothing: they read all numbers of a flattened tensor in their order.

PyTorch's exporter writes `as_strided` in this way, which it meets for images that lie in memory with their channels
last. The indices are computed from the batch, and would still be those of the old width after pruning.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from pxcompress.onnx_in.trial import Trials


def restore_views_(model: ir.Model, trials: Trials) -> bool:
    """Replace every Gather that reads all numbers of a flattened tensor in their order by the tensor itself, in place.

    Returns whether there were any.
    """
    lookups = [node for node in model.graph if node.op_type == "Gather" and _is_view(node, trials)]
    for node in lookups:
        if (before := _find_flattened(node)) is not None:
            node.outputs[0].replace_all_uses_with(before, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
    return bool(lookups)


def _find_flattened(node: ir.Node) -> ir.Value | None:
    """The tensor before the Reshape or Flatten whose output the Gather `node` reads; None if it reads another node."""
    flat = node.inputs[0].producer() if node.inputs[0] is not None else None
    return flat.inputs[0] if flat is not None and flat.op_type in ("Reshape", "Flatten") else None


def _is_view(node: ir.Node, trials: Trials) -> bool:
    """Whether the Gather `node` returns all numbers in their order, in the shape before flattening."""
    before, (x, index) = _find_flattened(node), node.inputs
    if before is None or x is None or index is None or node.outputs[0].is_graph_output():
        return False
    for run in trials.runs:
        places, shape = run.known.get(index), run.shapes[before]
        if places is None or len(run.shapes[x]) != 1 or tuple(places.shape) != shape:
            return False
        if not torch.equal(places.reshape(-1).long(), torch.arange(places.numel())):
            return False
    return True
