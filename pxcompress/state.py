"""Context managers for temporary changes; each restores exactly the state it found."""

from __future__ import annotations

import copy
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import checkpoint


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which Python, NumPy and PyTorch are seeded; their states outside are unchanged."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """A context with `model` in eval mode, without parameter gradients, in-place activations or checkpointing.

    Hooks may be added inside. At the end training modes (per module), `requires_grad`, `inplace` flags and hooks are as
    before. A module that adds hooks of its own when it first runs, and a flag that says so, adds them again.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    inplace = [getattr(module, "inplace", None) for module in modules]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks = [hooks_of(module) for module in modules]
    flags = [_flags_of(module) for module in modules]
    try:
        model.eval()
        for parameter, _ in grads:
            parameter.requires_grad_(False)
        for module, flag in zip(modules, inplace, strict=True):
            if isinstance(flag, bool):
                module.inplace = False  # type: ignore[assignment]
        with without_checkpointing():
            yield model
    finally:
        for module, mode, flag in zip(modules, training, inplace, strict=True):
            module.training = mode
            if isinstance(flag, bool):
                module.inplace = flag  # type: ignore[assignment]
        for module, hooks_before, flags_before in zip(modules, hooks, flags, strict=True):
            _remove_added_(module, hooks_before, flags_before)
        for parameter, flag in grads:
            parameter.requires_grad_(flag)


def _remove_added_(module: nn.Module, hooks_before: dict[str, dict[int, Any]], flags_before: set[str]) -> None:
    """Remove from a module the hooks and flags that it did not have before, in place."""
    for name, hooks_now in hooks_of(module).items():
        for key in hooks_now.keys() - hooks_before[name].keys():
            del getattr(module, name)[key]
    for name in _flags_of(module) - flags_before:
        delattr(module, name)


def _flags_of(module: nn.Module) -> set[str]:
    """Names of the attributes of a module that are True."""
    return {name for name, value in vars(module).items() if value is True}


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """A context in which `torch.utils.checkpoint` just calls its function.

    Checkpointing would hide layers from the graph, and run them again in the backward pass, when hooks are gone.
    Modules import the function by its name, so what it uses inside is exchanged, and for the whole process.
    """

    class Direct:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            return function(*args)

    def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    names = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
    direct = {"CheckpointFunction": Direct} | {name: nothing for name in names if hasattr(checkpoint, name)}
    originals = {name: getattr(checkpoint, name) for name in direct}
    try:
        for name, value in direct.items():
            setattr(checkpoint, name, value)
        yield
    finally:
        for name, value in originals.items():
            setattr(checkpoint, name, value)


@contextmanager
def gradients(enabled: bool = True) -> Iterator[None]:
    """A context with gradients on, or off if not `enabled`.

    Code written for inference may change in place what a gradient is computed from; PyTorch then keeps a copy here. A
    block is one pass: it knows tensors by their place in memory, where those of another batch may lie later on. Nothing
    is checkpointed: that would need gradients of parameters.
    """
    mutations_allowed = torch.autograd.graph.allow_mutation_on_saved_tensors() if enabled else nullcontext()
    with torch.set_grad_enabled(enabled), without_checkpointing(), mutations_allowed:
        yield


def hooks_of(module: nn.Module) -> dict[str, dict[int, Any]]:
    """Copies of a module's dictionaries of hooks, by attribute name."""
    return {
        name: dict(value)
        for name, value in vars(module).items()
        if name.startswith(("_forward", "_backward")) and "hooks" in name and isinstance(value, dict)
    }


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A context that raises `TimeoutError` after `seconds`; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"no result after {seconds:.0f} s")

    previous_handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)


def copy_sharing(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters are new objects that share the memory of the model's; buffers are copied."""
    return copy.deepcopy(
        model, {id(value): nn.Parameter(value.detach(), value.requires_grad) for value in model.parameters()}
    )


def can_have_gradient(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point or complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model without either."""
    tensor: Tensor | None = next(iter(model.parameters()), next(iter(model.buffers()), None))
    return torch.device("cpu") if tensor is None else tensor.device


def best_device() -> torch.device:
    """The GPU if PyTorch can use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
