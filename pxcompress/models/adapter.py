"""Adapts a user's own module to the form of all stages: one tensor in, logits (n, k) out, its modules unchanged.

A view of the module has a subclass of its class, with another `forward`. Several inputs travel in one packed tensor,
several outputs or positions come out as one logit; what must stay whole is judged by everything that comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pxcompress.errors import InputError, ModelError, describe
from pxcompress.layout.padding import counting
from pxcompress.models.input_values import check_batches
from pxcompress.models.outputs import by_name, floats, leaves
from pxcompress.models.signature import (
    Divergence,
    Logits,
    Signature,
    bound_inputs,
    name_inputs,
    nearer_zero,
    perturbed_rows,
)
from pxcompress.onnx_in import OnnxModule
from pxcompress.state import device_of, evaluating
from pxcompress.types import Batch, Batches, Input

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a module is called with: model(x), model(*inputs) or model(**inputs); every tensor has shape (n, ...)."""

UNKNOWN = -1
"""Label of a sample without a known class."""


class Adapter(nn.Module):
    """A mix-in in front of a user's module class, with a forward that takes packed inputs.

    Subclasses have a `signature_`.
    """

    signature_: Signature

    def outputs_(self, packed: Tensor) -> Any:
        """The output of the user's module; embeddings looked up by token ids depend on `packed` for autograd."""
        counted = self.signature_.find_counted(packed)
        with ExitStack() as hooks:
            if packed.requires_grad:
                follow = _follower(packed, None if counted is None else self.signature_.unit_weights(packed))
                for module in self.modules():
                    if isinstance(module, nn.Embedding):
                        hooks.enter_context(module.register_forward_hook(follow))
            hooks.enter_context(counting(counted))
            return self.signature_.call(super().forward, packed)

    @property
    def original_class_(self) -> type[nn.Module]:
        """The class of the user's module."""
        base: type[nn.Module] = type(self).__bases__[1]
        return base

    def original_(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the user's module for its own inputs, unpacked."""
        return super().forward(*args, **kwargs)

    def forward(self, packed: Tensor) -> Tensor:
        """Logits (n, k), with k > 1, for packed inputs."""
        outputs = self.outputs_(packed)
        if self.signature_.logits is None:
            logits = _guess_decisive_outputs(outputs, packed.shape[0])
        else:  # the other outputs count nothing, but a gradient of zero reaches every unit
            sum_of_outputs = sum(value.sum() for value in floats(outputs))
            logits = _columns(self.signature_.logits(outputs), packed.shape[0]) + 0 * sum_of_outputs
        return torch.cat([logits, -logits], 1) if logits.shape[1] == 1 else logits


def _follower(packed: Tensor, weights: Tensor | None) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook that makes the output of an embedding depend on `packed`, with `weights` (n, length) by position.

    Relevance of a text's positions then arrives at its mask.
    """

    def follow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if weights is None or output.dim() != 3 or output.shape[1] != weights.shape[1]:
            return output + 0 * packed.sum()
        return output * weights[..., None]

    return follow


def all_outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """All tensors that `model` returns, adapted or not. Raises `ModelError` for objects that cannot be searched."""
    return leaves(model.outputs_(inputs) if isinstance(model, Adapter) else model(inputs))


def named_outputs(model: nn.Module, inputs: Tensor, only: str = "output") -> dict[str, Tensor]:
    """All outputs (n, ...) of `model` by name, adapted or not; a single tensor gets the name `only`."""
    outputs = by_name(model.outputs_(inputs) if isinstance(model, Adapter) else model(inputs), only)
    return {name: value for name, value in outputs.items() if len(value) == len(inputs)}


def outputs_in_file(model: nn.Module, inputs: Tensor) -> Any:
    """The outputs that the file of `model` gives for `inputs`, including a final softmax that an `OnnxModule` leaves
    out.
    """
    if not isinstance(model, OnnxModule):
        return model(inputs)
    signature = type(model).signature_ if isinstance(model, Adapter) else Signature()
    return signature.call(model.file_outputs, inputs)


def make_view(model: nn.Module, example: Tensor, logits: Logits, divergence: Divergence | None = None) -> nn.Module:
    """Another module with all parts of `model`, whose forward returns `logits` applied to its outputs, (n, k).

    `divergence` is what a repair by training minimises. Raises `ModelError` if the model does not run on `example` (n,
    ...), or if no output depends on its inputs by gradients.
    """
    signature = Signature(type(model).signature_.inputs if isinstance(model, Adapter) else (), logits, divergence)
    inputs = torch.cat([example, example]).detach().to(device_of(model)).requires_grad_()
    return _view(model, signature, inputs)


def with_packed_inputs(model: nn.Module, inputs: tuple[Input, ...], shape: Sequence[int]) -> nn.Module:
    """Another module with all parts of `model` that takes its `inputs` packed in one tensor (n, *shape).

    Raises `ModelError` if it does not run on blank inputs, or if no output depends on its inputs by gradients.
    """
    signature = Signature(inputs)
    return _view(model, signature, signature.blank(shape, 2).to(device_of(model)).requires_grad_())


def has_whole_numbers(model: nn.Module) -> bool:
    """Whether a model takes any input of whole numbers, such as token ids."""
    return isinstance(model, Adapter) and not all(each.dtype.is_floating_point for each in model.signature_.inputs)


def perturb(model: nn.Module, example: Tensor) -> Tensor:
    """A changed copy of `example` (n, ...) with the same types and ranges; packed inputs are changed one by one."""
    draw, rows = torch.Generator().manual_seed(0), example.detach().cpu()
    signature: Signature = type(model).signature_ if isinstance(model, Adapter) else Signature()
    if not signature.inputs:
        return nearer_zero(rows, draw).to(example.device)
    parts = zip(signature.inputs, signature.parts(rows), strict=True)
    return signature.join([perturbed_rows(each, part, draw) for each, part in parts]).to(example.device)


@dataclass(frozen=True, eq=False)
class AdaptedModule:
    """A module, an example (1, ...) and batches as all stages take them; `labelled` says that labels are classes.

    `signature` says how inputs are packed in them.
    """

    model: nn.Module
    example: Tensor
    batches: _Packed
    labelled: bool
    signature: Signature

    def pack(self, batches: Iterable[Any]) -> Batches:
        """Convert other batches of the same kind to the form of all stages."""
        return replace(self.batches, batches=batches)


def adapt_module(
    model: nn.Module, example: Inputs, batches: Iterable[Any], logits: Logits | None = None
) -> AdaptedModule:
    """`model` behind an `Adapter`, sharing all its parts; `model` itself if it takes and returns one tensor already.

    A batch is (inputs, labels), or inputs alone. `logits` picks the outputs that decide. Without it that is an output
    (n, classes), or else one logit: at every position the largest value along axis 1, as a mean, summed over all
    outputs. Raises `InputError` for batches and `ModelError` for a module that cannot be adapted.
    """
    inputs, labels = split_batch(_first(batches))
    signature = Signature(_inputs(example, batches), logits)
    packed = signature.pack(example)
    signature.pack(inputs)
    twice = torch.cat([packed, packed]).detach().to(device_of(model)).requires_grad_()
    outputs = _call_checked(model, lambda: signature.call(model, twice))
    classes = logits is not None or _guess_decisive_outputs(outputs, len(twice)).shape[1] > 1
    ready = isinstance(outputs, Tensor) and classes and not signature.inputs and logits is None
    view = model if ready else _view(model, signature, twice)
    labelled = classes and _is_label(labels)
    return AdaptedModule(view, packed, _Packed(batches, signature, labelled), labelled, signature)


def release_(model: nn.Module) -> None:
    """Give an adapted module, or a copy of it, its own class again, in place."""
    if isinstance(model, Adapter):
        model.__class__ = type(model).__bases__[1]


@dataclass(frozen=True, eq=False)
class _Packed:
    """Batches of packed inputs and labels (n,); labels are `UNKNOWN` if they are no classes."""

    batches: Iterable[Any]
    signature: Signature
    labelled: bool

    def __iter__(self) -> Iterator[Batch]:
        return check_batches(self._pack())

    def _pack(self) -> Iterator[Batch]:
        for batch in self.batches:
            inputs, labels = split_batch(batch)
            packed = self.signature.pack(inputs)
            if self.labelled and not _is_label(labels):
                raise InputError("a batch has no labels (n,), the first one has; give labels with all or with none")
            yield packed, labels if self.labelled else torch.full((len(packed),), UNKNOWN)


def _view(model: nn.Module, signature: Signature, inputs: Tensor) -> nn.Module:
    """Another object with the parts of `model`, called as `signature` says.

    Raises `ModelError` if it fails on `inputs`.
    """
    kind = model.original_class_ if isinstance(model, Adapter) else type(model)
    if isinstance(model, torch.jit.ScriptModule) or hasattr(kind, "__deepcopy__") or "forward" in vars(model):
        raise ModelError(f"a {kind.__name__} has a forward or copies of its own making; give the nn.Module behind it")
    adapter: Any = type(kind.__name__, (Adapter, kind), {"signature_": signature})
    view: nn.Module = adapter.__new__(adapter)
    view.__dict__.update(vars(model))
    logits = _call_checked(view, lambda: view(inputs))
    if not logits.isfinite().all():
        raise ModelError(
            f"{kind.__name__} returns NaN or infinity for the example; give logits=FUNCTION of its outputs"
        )
    if not logits.requires_grad:
        raise ModelError(
            f"what {kind.__name__} returns does not follow its inputs by gradients; give inputs of floating point, or "
            "whole numbers that nn.Embedding layers look up"
        )
    return view


def _call_checked(model: nn.Module, call: Callable[[], Any]) -> Any:
    """The result of `call`, which runs `model`. Raises `ModelError` where it fails."""
    try:
        with evaluating(model), torch.enable_grad():
            return call()
    except ModelError:
        raise
    except Exception as error:  # a user's forward may raise anything
        raise ModelError(f"{type(model).__name__} does not run on the example: {describe(error)}") from error


def _guess_decisive_outputs(outputs: Any, samples: int) -> Tensor:
    """The outputs that decide, (n, k), if the user does not say so: the only logits, else largest values."""
    candidates = [value for value in floats(outputs) if value.dim() and value.shape[0] == samples]
    if not candidates:
        raise ModelError(
            f"the module returns a {type(outputs).__name__} without a floating-point tensor (n, ...) in it; "
            "expected a tensor, or tensors in a tuple, list, dict or dataclass"
        )
    if len(candidates) == 1 and candidates[0].dim() == 2:
        return candidates[0]
    largest = [(value if value.dim() > 1 else value[:, None]).amax(1).reshape(samples, -1) for value in candidates]
    return torch.stack([value.mean(1) for value in largest]).sum(0)[:, None]


def _columns(logits: Any, samples: int) -> Tensor:
    """The result of the user's function `logits` as (n, k). Raises `ModelError` for other shapes."""
    if not isinstance(logits, Tensor) or logits.dim() not in (1, 2) or logits.shape[0] != samples:
        description = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ModelError(f"logits returns {description} for {samples} samples; expected a tensor (n, classes) or (n,)")
    return logits if logits.dim() == 2 else logits[:, None]


def _inputs(example: Inputs, batches: Iterable[Any]) -> tuple[Input, ...]:
    """Descriptions of the inputs to pack, with the range of whole numbers over all batches.

    Empty for one float tensor.
    """
    values = name_inputs(example)
    if isinstance(example, Tensor) and example.is_floating_point():
        return ()
    specs = [Input(name, tuple(value.shape[1:]), value.dtype) for name, value in values.items()]
    seen = {name: [value] for name, value in values.items()}
    if not all(value.is_floating_point() for value in values.values()):
        for batch in batches:
            for name, value in name_inputs(split_batch(batch)[0]).items():
                seen.setdefault(name, []).extend(_extremes(value))
    return bound_inputs(specs, seen)


def _extremes(value: Tensor) -> list[Tensor]:
    """The smallest and the largest number of a tensor of whole numbers, as tensors; empty for floats."""
    return [] if value.is_floating_point() or not value.numel() else [value.min(), value.max()]


def _first(batches: Iterable[Any]) -> Any:
    if iter(batches) is batches:
        raise InputError(f"batches are a {type(batches).__name__}, which is read once; give a list or a DataLoader")
    for batch in batches:
        return batch
    raise InputError("batches are empty; expected at least one batch of (inputs, labels) or inputs")


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of a batch; labels are None if it has none. Raises `InputError` for other batches."""
    if not isinstance(batch, tuple | list):
        return batch, None
    if len(batch) not in (1, 2):
        raise InputError(
            f"a batch is a {type(batch).__name__} of {len(batch)}; expected (inputs, labels), labels or None, with "
            "several inputs in a tuple or dict of their own"
        )
    return batch[0], batch[1] if len(batch) == 2 else None


def _is_label(labels: Any) -> bool:
    return isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
