"""Collects statistics of units by hooks and sums over samples, for all scorers.

All statistics are means over samples, accumulated in float64 while batches stream by: memory does not grow with their
number. In several processes every one streams its own batches, and the means are over those of all. Units are read
where they are consumed, at the input of the layers behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pxcompress.errors import InputError
from pxcompress.layout.padding import find_counted_positions
from pxcompress.layout.rows import rows_first, unit_view
from pxcompress.passes.parts import SplitBatches
from pxcompress.processes import sum_over_processes
from pxcompress.state import device_of, evaluating, gradients
from pxcompress.types import Axis, Batches, Group, Member, Scores

Statistic = Callable[[Tensor, Tensor], Tensor]
"""A function from activations and multipliers, both (n, units, positions), to one value a sample and unit, (n,
units).
"""

Start = Callable[[Tensor, Tensor], Tensor]
"""A function from logits (n, classes) and labels (n,) to the gradient at which backward starts, (n, classes)."""


@dataclass
class _TensorSums:
    """Sums over samples, (sums, units), at one tensor that carries a group, and the number of samples in each,
    (sums,).
    """

    total: Tensor | float = 0.0
    samples: Tensor | float = 0.0

    def add(self, values: Tensor, weights: Tensor | None) -> None:
        values = values.detach().double()
        weights = values.new_ones(len(values), 1) if weights is None else weights.to(values)
        self.total = self.total + weights.T @ values
        self.samples = self.samples + weights.sum(0)

    @property
    def mean(self) -> Tensor:
        """The mean over samples of all processes, (sums, units) on the CPU; 0 without samples."""
        assert isinstance(self.total, Tensor)
        assert isinstance(self.samples, Tensor)
        return (sum_over_processes(self.total) / sum_over_processes(self.samples).clamp(min=1)[:, None]).cpu()


class _SavedTensor(torch.autograd.Function):
    """Saves a tensor as it is now, in `grad_fn.saved_tensors`, even if the model changes it in place later."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.new_empty(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        """No gradient flows back."""


@dataclass
class _Reader:
    """Forward hooks at the layers that read a group, with one `_TensorSums` for each distinct tensor they read.

    `weights` (n, sums) says how much each sample of the current batch counts in each sum; None means one sum with all
    alike.
    """

    model: nn.Module
    group: Group
    statistic: Statistic
    origin: Tensor | None = None
    cuts: list[_TensorSums] = field(default_factory=list)
    seen: list[tuple[Tensor, int]] = field(default_factory=list)
    weights: Tensor | None = None

    def attach(self) -> None:
        for member in self.group.consumers:
            module = self.model.get_submodule(member.module)
            module.register_forward_pre_hook(self._hook(member))

    def _hook(self, member: Member) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            value = args[0]
            if any(value is other and value._version == version for other, version in self.seen):
                return
            self.seen.append((value, value._version))
            if len(self.seen) > len(self.cuts):
                self.cuts.append(_TensorSums())
            cut = self.cuts[len(self.seen) - 1]
            origin = None if self.origin is None else self.origin[len(self.seen) - 1]

            def activation(value: Tensor) -> Tensor:
                units = unit_view(value.detach(), module, member.index)
                return units if origin is None else units - origin.to(units).unsqueeze(1)

            counted = find_counted_positions(value)
            if not value.requires_grad:
                cut.add(_apply_to_counted(self.statistic, activation(value), None, counted), self.weights)
                return
            node: Any = _SavedTensor.apply(value).grad_fn

            def use(gradient: Tensor) -> None:
                (saved_value,) = node.saved_tensors
                multiplier = unit_view(gradient, module, member.index)
                cut.add(_apply_to_counted(self.statistic, activation(saved_value), multiplier, counted), self.weights)

            value.register_hook(use)

        return read


def _apply_to_counted(statistic: Statistic, value: Tensor, multiplier: Tensor | None, counted: Tensor | None) -> Tensor:
    """The statistic of every sample, over its real positions only, (n, units)."""
    if counted is None:
        return statistic(value, torch.empty(0) if multiplier is None else multiplier)
    width = value.shape[2] // counted.shape[1]  # rows of a unit count as positions too
    samples = []
    for number, positions in enumerate(counted.to(value.device)):
        chosen = positions.repeat(width)
        part = torch.empty(0) if multiplier is None else multiplier[number : number + 1, :, chosen]
        samples.append(statistic(value[number : number + 1, :, chosen], part))
    return torch.cat(samples)


def collect(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Batches,
    statistic: Statistic,
    start: Start | None = None,
    origin: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Mean over samples of `statistic` for every unit: group name -> (cuts, units) float64.

    A group has one cut for each distinct tensor that its readers read: one for an inner layer, several along a residual
    stream. Multipliers are the whole gradient at the tensor, not one reader's part of it. Without `start` there is no
    backward pass, and the statistic gets an empty multiplier. Activations are taken as differences from `origin`, which
    has the shape of a result. The model is left as it was.
    """
    readers = [_Reader(model, group, statistic, origin[group.name] if origin else None) for group in groups]
    _stream(model, readers, batches, start)
    return {reader.group.name: torch.stack([cut.mean[0] for cut in reader.cuts]) for reader in readers}


def unit_means(
    model: nn.Module, groups: Sequence[Group], batches: Batches, statistic: Statistic, start: Start | None = None
) -> Scores:
    """Like `collect`, averaged over the tensors of a residual stream: group name -> (units,) float32."""
    return {name: cuts.mean(0).float() for name, cuts in collect(model, groups, batches, statistic, start).items()}


def collect_by_label(
    model: nn.Module, groups: Sequence[Group], batches: Batches, statistic: Statistic, start: Start, classes: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Like `collect`, with one mean for each label: group name -> (cuts, classes, units); and samples (classes,).

    A mean over no samples is 0. Takes one group or more. Raises `InputError` for labels that are none of the `classes`.
    """
    readers = [_Reader(model, group, statistic) for group in groups]
    _stream(model, readers, batches, start, classes)
    means = {reader.group.name: torch.stack([cut.mean for cut in reader.cuts]) for reader in readers}
    return means, sum_over_processes(torch.as_tensor(readers[0].cuts[0].samples))


def _stream(
    model: nn.Module, readers: Sequence[_Reader], batches: Batches, start: Start | None, classes: int | None = None
) -> None:
    """Run all batches through the model, so that the hooks of `readers` sum them up; with `classes`, by label."""
    device = device_of(model)
    with evaluating(model):
        for reader in readers:
            reader.attach()
        for inputs, labels in batches if start is None else SplitBatches(batches):
            weights = None if classes is None else _encode_labels(labels, classes)
            for reader in readers:
                reader.weights = weights
            with gradients(start is not None):
                inputs = inputs.detach().to(device).requires_grad_(start is not None)
                logits = model(inputs)
                if start is not None:
                    torch.autograd.grad(logits, inputs, start(logits.detach(), labels.to(device)))
            for reader in readers:
                reader.seen.clear()


def _encode_labels(labels: Tensor, classes: int) -> Tensor:
    """Labels as one-hot rows, (n, classes). Raises `InputError` for a label that is no class."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(f"labels go from {low} to {high}; expected 0 to {classes - 1}, the classes of the model")
    return one_hot(labels, classes)


def power(
    model: nn.Module, names: Sequence[str], batches: Batches, start: Start, *, side: Axis = "out"
) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient, summed over positions: module name -> (rows,) float64.

    E_x sum_p m_rp^2, where m is the gradient at the outputs (or the inputs, by `side`) of the modules `names`; the sum
    runs over positions and calls.
    """
    device = device_of(model)
    sums: dict[str, Tensor] = {}
    samples = 0

    def watch(name: str, value: Tensor, module: nn.Module) -> None:
        def add(gradient: Tensor) -> None:
            sums[name] = sums.get(name, 0.0) + rows_first(gradient, module).double().square().sum((0, 2))

        value.register_hook(add)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, output: watch(name, output if side == "out" else args[0], module)

    with evaluating(model):
        for name in names:
            model.get_submodule(name).register_forward_hook(hook(name))
        for inputs, labels in SplitBatches(batches):
            with gradients():
                inputs = inputs.detach().to(device).requires_grad_(True)
                logits = model(inputs)
                torch.autograd.grad(logits, inputs, start(logits.detach(), labels.to(device)))
            samples += len(inputs)
    everywhere = sum_over_processes(torch.tensor(samples, dtype=torch.float64, device=device))
    return {name: sum_over_processes(sums[name]) / everywhere for name in names}
