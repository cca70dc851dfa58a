"""Your own module as every stage takes one: a tensor in, logits (n, k) out, with the modules and names it has.

A view of the module has a subclass of its class, with another `forward`. Several inputs travel in one packed tensor,
several outputs or positions come out as one logit; what must stay whole is judged by everything that comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pxcompress.errors import InputError, ModelError
from pxcompress.models.input_values import check_batches
from pxcompress.models.outputs import by_name, floats, leaves
from pxcompress.state import device_of, evaluating
from pxcompress.types import Batch, Batches

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a module is called with: model(x), model(*inputs) or model(**inputs); every tensor has shape (n, ...)."""

Logits = Callable[[Any], Tensor]
"""Outputs, as the module returns them -> (n, classes), or (n,) where their size is what counts."""

UNKNOWN = -1
"""Label of a sample that has none."""

WHOLE = 2**24
"""Whole numbers below this are exact in float32, in which they travel."""


@dataclass(frozen=True)
class Input:
    """One tensor (n, *shape) of several; `low` and `high` bound whole numbers and booleans."""

    name: str | int
    shape: tuple[int, ...]
    dtype: torch.dtype
    low: float = -torch.inf
    high: float = torch.inf

    def restored(self, rows: Tensor) -> Tensor:
        """The input, unpacked from rows (n, size); whole numbers are clipped to their bounds."""
        value = rows.reshape(rows.shape[0], *self.shape)  # len() would be a constant in an exported file
        if not self.dtype.is_floating_point:
            value = value.detach().clamp(self.low, self.high).round()
        return value.to(self.dtype)

    def perturbed(self, rows: Tensor, draw: torch.Generator) -> Tensor:
        """Packed rows like `rows`, with numbers of the same type and range."""
        if self.dtype.is_floating_point:
            return _nearer_zero(rows, draw)
        others = self.low + torch.rand(rows.shape, generator=draw) * (self.high - self.low)
        return torch.where(torch.rand(rows.shape, generator=draw) < 0.5, others.to(rows), rows)


@dataclass(frozen=True)
class Signature:
    """How a module is called, and what counts of its outputs. Without `inputs` it takes a float tensor as it is."""

    inputs: tuple[Input, ...] = ()
    logits: Logits | None = None

    def packed(self, inputs: Any) -> Tensor:
        """One tensor (n, ...). Raises `InputError` for inputs that are not like the example."""
        values = _named(inputs)
        if not self.inputs and isinstance(inputs, Tensor):
            return values[0]
        expected = {each.name: (each.shape, each.dtype) for each in self.inputs}
        shapes_and_types = {name: (tuple(value.shape[1:]), value.dtype) for name, value in values.items()}
        if shapes_and_types != expected:
            raise InputError(
                f"a batch has inputs {_listed(shapes_and_types)}; expected {_listed(expected)}, as the example"
            )
        floats = [each.dtype for each in self.inputs if each.dtype.is_floating_point]
        dtype = torch.float64 if torch.float64 in floats else torch.float32
        return torch.cat([values[each.name].reshape(_samples(values), -1).to(dtype) for each in self.inputs], 1)

    def parts(self, packed: Tensor) -> Sequence[Tensor]:
        """What is packed of every input, (n, size) each."""
        return packed.split([prod(each.shape) for each in self.inputs], 1)

    def call(self, forward: Callable[..., Any], packed: Tensor) -> Any:
        """What `forward` returns for the inputs in `packed`."""
        if not self.inputs:
            return forward(packed)
        values = {each.name: each.restored(part) for each, part in zip(self.inputs, self.parts(packed), strict=True)}
        places = [value for name, value in values.items() if isinstance(name, int)]
        return forward(*places, **{name: value for name, value in values.items() if isinstance(name, str)})


class Adapter(nn.Module):
    """Comes before the class of a user's module: its forward, packed. Subclasses made here have a `signature_`."""

    signature_: Signature

    def outputs_(self, packed: Tensor) -> Any:
        """What the user's module returns; tensors looked up by whole numbers follow `packed` in autograd."""

        def follow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + 0 * packed.sum()

        with ExitStack() as hooks:
            if packed.requires_grad:
                for module in self.modules():
                    if isinstance(module, nn.Embedding):
                        hooks.enter_context(module.register_forward_hook(follow))
            return self.signature_.call(super().forward, packed)

    def original_(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's module returns for its own inputs."""
        return super().forward(*args, **kwargs)

    def forward(self, packed: Tensor) -> Tensor:
        """Logits (n, k), k > 1."""
        outputs = self.outputs_(packed)
        if self.signature_.logits is None:
            logits = _counted(outputs, packed.shape[0])
        else:  # the other outputs count nothing, but a gradient of zero reaches every unit
            sum_of_outputs = sum(value.sum() for value in floats(outputs))
            logits = _columns(self.signature_.logits(outputs), packed.shape[0]) + 0 * sum_of_outputs
        return torch.cat([logits, -logits], 1) if logits.shape[1] == 1 else logits


def all_outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """All tensors that come out of `model`, adapted or not. Raises `ModelError` where they cannot be looked into."""
    return leaves(model.outputs_(inputs) if isinstance(model, Adapter) else model(inputs))


def named_outputs(model: nn.Module, inputs: Tensor, only: str = "output") -> dict[str, Tensor]:
    """All outputs (n, ...) of `model` by name, adapted or not; a single tensor is called `only`."""
    outputs = by_name(model.outputs_(inputs) if isinstance(model, Adapter) else model(inputs), only)
    return {name: value for name, value in outputs.items() if len(value) == len(inputs)}


def make_view(model: nn.Module, example: Tensor, logits: Logits) -> nn.Module:
    """`model`, sharing all its parts, as one whose forward gives what `logits` makes of its outputs, (n, k).

    Raises `ModelError` where it does not run on `example` (n, ...), or where nothing follows its inputs by gradients.
    """
    inputs = torch.cat([example, example]).detach().to(device_of(model)).requires_grad_()
    return _view(model, Signature((), logits), inputs)


def perturb(model: nn.Module, example: Tensor) -> Tensor:
    """Another input like `example` (n, ...), of its type and range; `model` knows what is packed in it."""
    draw, rows = torch.Generator().manual_seed(0), example.detach().cpu()
    signature: Signature = type(model).signature_ if isinstance(model, Adapter) else Signature()
    if not signature.inputs:
        return _nearer_zero(rows, draw).to(example.device)
    parts = zip(signature.inputs, signature.parts(rows), strict=True)
    return torch.cat([each.perturbed(part, draw) for each, part in parts], 1).to(example.device)


def _nearer_zero(value: Tensor, draw: torch.Generator) -> Tensor:
    """Every number by up to a half nearer to zero, so that it keeps its sign; drawn where there are only zeros."""
    if not value.any():
        return torch.randn(value.shape, generator=draw).to(value)
    return value * (1 - torch.rand(value.shape, generator=draw).to(value) / 2)


@dataclass(frozen=True, eq=False)
class Adapted:
    """A module, an example (1, ...) and batches as every stage takes them; `labelled`: the labels are classes."""

    model: nn.Module
    example: Tensor
    batches: _Packed
    labelled: bool

    def packed(self, batches: Iterable[Any]) -> Batches:
        """Other batches of the same kind as every stage takes them."""
        return replace(self.batches, batches=batches)


def adapt_module(model: nn.Module, example: Inputs, batches: Iterable[Any], logits: Logits | None = None) -> Adapted:
    """`model` behind an `Adapter`, sharing all its parts; `model` itself where it takes and returns one tensor already.

    A batch is (inputs, labels), or inputs alone. `logits` picks what counts. Without it that is an output (n, classes),
    or else, as one logit: at every position the largest value along axis 1, as a mean, summed over all outputs.
    Raises `InputError` for batches and `ModelError` for a module that this cannot take.
    """
    inputs, labels = _split_batch(_first(batches))
    signature = Signature(_inputs(example, batches), logits)
    packed = signature.packed(example)
    signature.packed(inputs)
    twice = torch.cat([packed, packed]).detach().to(device_of(model)).requires_grad_()
    outputs = _call_checked(model, lambda: signature.call(model, twice))
    classes = logits is not None or _counted(outputs, len(twice)).shape[1] > 1
    ready = isinstance(outputs, Tensor) and classes and not signature.inputs and logits is None
    view = model if ready else _view(model, signature, twice)
    labelled = classes and _is_label(labels)
    return Adapted(view, packed, _Packed(batches, signature, labelled), labelled)


def release_(model: nn.Module) -> None:
    """Give a module that was adapted, or a copy of it, its own class again, in place."""
    if isinstance(model, Adapter):
        model.__class__ = type(model).__bases__[1]


@dataclass(frozen=True, eq=False)
class _Packed:
    """Batches of packed inputs and labels (n,); `UNKNOWN` where labels are no classes."""

    batches: Iterable[Any]
    signature: Signature
    labelled: bool

    def __iter__(self) -> Iterator[Batch]:
        return check_batches(self._packed())

    def _packed(self) -> Iterator[Batch]:
        for batch in self.batches:
            inputs, labels = _split_batch(batch)
            packed = self.signature.packed(inputs)
            if self.labelled and not _is_label(labels):
                raise InputError("a batch has no labels (n,), the first one has; give labels with all or with none")
            yield packed, labels if self.labelled else torch.full((len(packed),), UNKNOWN)


def _view(model: nn.Module, signature: Signature, inputs: Tensor) -> nn.Module:
    """Another object with all that `model` has, called as `signature` says. Refused unless it works on `inputs`."""
    kind = type(model)
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
    """What `call` makes of `model`. Raises `ModelError` where it fails."""
    try:
        with evaluating(model), torch.enable_grad():
            return call()
    except ModelError:
        raise
    except Exception as error:  # a user's forward may raise anything
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no message')}"
        raise ModelError(f"{type(model).__name__} does not run on the example: {reason}") from error


def _counted(outputs: Any, samples: int) -> Tensor:
    """What counts where nothing is said, (n, k)."""
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
    """What the user's function returned, as (n, k)."""
    if not isinstance(logits, Tensor) or logits.dim() not in (1, 2) or logits.shape[0] != samples:
        description = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ModelError(f"logits returns {description} for {samples} samples; expected a tensor (n, classes) or (n,)")
    return logits if logits.dim() == 2 else logits[:, None]


def _inputs(example: Inputs, batches: Iterable[Any]) -> tuple[Input, ...]:
    """The inputs to pack, whole numbers with the range they have in all batches; none for a single float tensor."""
    values = _named(example)
    if isinstance(example, Tensor) and example.is_floating_point():
        return ()
    input_by_name = {name: Input(name, tuple(value.shape[1:]), value.dtype) for name, value in values.items()}
    whole_numbers = [name for name, value in values.items() if not value.is_floating_point()]
    ranges = {name: [float(values[name].min()), float(values[name].max())] for name in whole_numbers}
    for batch in batches if whole_numbers else ():
        batch_values = _named(_split_batch(batch)[0])
        for name in set(whole_numbers) & set(batch_values):
            low, high = float(batch_values[name].min()), float(batch_values[name].max())
            ranges[name] = [min(low, ranges[name][0]), max(high, ranges[name][1])]
    for name, (low, high) in ranges.items():
        if max(-low, high) >= WHOLE:
            raise InputError(f"input {name!r} has whole numbers from {low:.0f} to {high:.0f}; expected less than 2^24")
        input_by_name[name] = Input(name, input_by_name[name].shape, input_by_name[name].dtype, low, high)
    return tuple(input_by_name.values())


def _named(inputs: Any) -> dict[str | int, Tensor]:
    """Inputs by name or place. Raises `InputError` unless they are tensors with one count of samples."""
    input_list = inputs if isinstance(inputs, tuple | list) else [inputs]
    values = dict(inputs) if isinstance(inputs, Mapping) else dict(enumerate(input_list))
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.dim() or len(value) != _samples(values):
            description = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InputError(
                f"input {name!r} is {description}; expected a tensor (n, ...), or a tuple or dict of such with one n"
            )
    return {name: _ordinary(value) for name, value in values.items()}


def _ordinary(value: Tensor) -> Tensor:
    """A tensor of no subclass and without a graph, which results would inherit, made outside inference mode."""
    value = value.as_subclass(Tensor).detach()
    return value.clone() if value.is_inference() else value


def _samples(values: Mapping[str | int, Tensor]) -> int:
    return len(next(iter(values.values())))


def _listed(shapes_and_types: Mapping[str | int, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return (
        ", ".join(f"{name}: (n, {str(shape)[1:]} {dtype}" for name, (shape, dtype) in shapes_and_types.items())
        or "one tensor"
    )


def _first(batches: Iterable[Any]) -> Any:
    if iter(batches) is batches:
        raise InputError(f"batches are a {type(batches).__name__}, which is read once; give a list or a DataLoader")
    for batch in batches:
        return batch
    raise InputError("batches are empty; expected at least one batch of (inputs, labels) or inputs")


def _split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of a batch, None where it has none."""
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
