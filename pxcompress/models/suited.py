"""What a model must be before any work: parameters with values, of a type that is pruned here."""

from __future__ import annotations

import torch
from torch import nn

from pxcompress.errors import ModelError

NARROW = (torch.float16, torch.bfloat16)
QUANTISED = ("torch.ao.nn.", "torch.nn.quantized", "torch.nn.qat", "torch.ao.quantization.fake_quantize")


def check_suited(model: nn.Module) -> None:
    """Raise `ModelError` for a model without values, in half precision, quantised or sharded."""
    kind = type(model).__name__
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ModelError(f"{kind} is sharded over processes; give the whole module")
        if type(module).__module__.startswith(QUANTISED):
            raise ModelError(
                f"{kind} is quantised: {name or 'it'} is a {type(module).__name__}; give the float model, and quantise "
                "what comes out"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ModelError(f"{kind} has no values: {name} is on the meta device; load its weights first")
    for name, parameter in model.named_parameters():
        if parameter.dtype in NARROW:
            raise ModelError(
                f"{kind} is in half precision: {name} is {parameter.dtype}; expected float32 or float64: give "
                "model.float(), with inputs of that type, and convert what comes out"
            )
        if not parameter.is_floating_point() and name.endswith("weight"):
            raise ModelError(f"{kind} has whole numbers for weights: {name} is {parameter.dtype}; give the float model")
