"""Checks before any work that a model can be pruned: parameters with values, of a supported type, and class scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pxcompress.errors import ModelError, describe
from pxcompress.models.inputs import blank_inputs
from pxcompress.models.outputs import floats
from pxcompress.state import device_of, without_checkpointing
from pxcompress.types import Preprocessing

NARROW = (torch.float16, torch.bfloat16)
QUANTISED = ("torch.ao.nn.", "torch.nn.quantized", "torch.nn.qat", "torch.ao.quantization.fake_quantize")

SIDES = (28, 32, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512)
"""Sizes of images to try with a model that fails at its own size."""

IN_PYTHON = "in Python compress_module takes modules with any inputs and outputs"


def check_suited(model: nn.Module) -> None:
    """Raise `ModelError` for a model without values, in half precision, quantised, scripted or sharded."""
    kind = type(model).__name__
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{kind} holds TorchScript: {name or 'it'} has its graph and sizes fixed; give the nn.Module it is from"
            )
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


def check_runs(model: nn.Module, preprocessing: Preprocessing, name: str) -> Any:
    """The output of `model` for two blank inputs. Raises `ModelError` if it fails or is not finite."""
    size = preprocessing.input_size
    example = blank_inputs(preprocessing, 2).to(device_of(model))
    try:
        with torch.no_grad(), without_checkpointing():
            output = model(example)
    except Exception as error:  # a forward pass may fail in any way
        shape = "x".join(map(str, size))
        raise ModelError(
            f"model {name!r} does not run on a {shape} input: {describe(error)}; {_remedy(model, preprocessing)}"
        ) from error
    if not all(value.isfinite().all() for value in floats(output)):
        raise ModelError(f"model {name!r} returns NaN or infinity for an input of zeros; check its weights")
    return output


def count_classes(model: nn.Module, preprocessing: Preprocessing, name: str) -> int:
    """Number of classes that `model` scores, found by running it on two blank inputs. Raises `ModelError`."""
    output = check_runs(model, preprocessing, name)
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[0] != 2:
        shape = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ModelError(
            f"model {name!r} returns {shape} for 2 inputs; expected class scores of shape (2, classes): give --task "
            f"for what it returns, or {IN_PYTHON}"
        )
    return int(output.shape[1])


def _remedy(model: nn.Module, preprocessing: Preprocessing) -> str:
    """Advice for a model that does not run on its input, such as another size that works."""
    if not preprocessing.is_image:
        return "give other data"
    channels, *sides = preprocessing.input_size
    nearest_sides = sorted(SIDES, key=lambda side: abs(side - sides[-1]))
    if (
        working_size := _first_that_runs(model, nearest_sides, lambda side: torch.zeros(2, channels, side, side))
    ) is not None:
        return f"set --input-size {working_size}"
    if (working_size := _first_that_runs(model, (1, 3, 4, 2), lambda count: torch.zeros(2, count, *sides))) is not None:
        shape = (working_size, *sides)
        return f"it takes images of {working_size} channels: give the module pretrained_cfg = {{'input_size': {shape}}}"
    return IN_PYTHON


def _first_that_runs(model: nn.Module, values: Sequence[int], make: Callable[[int], Tensor]) -> int | None:
    for value in values:
        try:
            with torch.no_grad():
                model(make(value).to(device_of(model)))
        except Exception:  # noqa: BLE001  (a forward pass may fail in any way)
            continue
        return value
    return None
