"""Hooks, streaming sums and the mapping from tensor axes to units: once, for every scorer and every repair.

All statistics are means over samples, accumulated in float64 while batches stream by: memory does not grow with their
number. In several processes every one streams its own batches, and the means are over those of all. Units are read
where they are consumed, at the input of the layers behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pxcompress.errors import InputError
from pxcompress.ranks import summed
from pxcompress.state import device_of, observed
from pxcompress.types import Axis, Batch, Batches, Group, Member, Plan

Statistic = Callable[[Tensor, Tensor], Tensor]
"""Activations a and multipliers m, both (n, units, positions) -> one value per sample and unit, (n, units)."""

AT_ONCE = 1_500_000
"""Numbers of input that are worked on at a time, 9 images of 224 x 224: a backward pass keeps all activations."""

Start = Callable[[Tensor, Tensor], Tensor]
"""Logits (n, classes) and labels (n,) -> the gradient that backward starts from, (n, classes)."""


@dataclass(frozen=True, eq=False)
class InParts:
    """`batches` in parts of at most `size` samples; without a size, of about `AT_ONCE` numbers."""

    batches: Batches
    size: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        for inputs, labels in self.batches:
            size = self.size or max(1, AT_ONCE // max(1, inputs[0].numel()))
            yield from zip(inputs.split(size), labels.split(size), strict=True)


def rows_first(value: Tensor, module: nn.Module) -> Tensor:
    """A layer's input or output as (n, rows, positions): the last axis of a linear layer, axis 1 of a convolution."""
    if isinstance(module, nn.Linear):
        value = value.movedim(-1, 1)
    return value.reshape(*value.shape[:2], value.shape[2:].numel())


def unit_view(value: Tensor, module: nn.Module, index: Tensor) -> Tensor:
    """A layer's input as (n, units, positions) for the rows `index` (units, k); a unit's k rows count as positions."""
    rows = rows_first(value, module)
    units, width = index.shape
    if units * width == rows.shape[1] and torch.equal(index.flatten(), torch.arange(units * width)):
        return rows.reshape(rows.shape[0], units, -1)
    return rows[:, index.flatten().to(rows.device)].reshape(rows.shape[0], units, -1)


@dataclass
class _Cut:
    """Sums (sums, units) over samples at one tensor that carries a group, and how many samples are in each (sums,)."""

    total: Tensor | float = 0.0
    samples: Tensor | float = 0.0

    def add(self, values: Tensor, weights: Tensor | None) -> None:
        values = values.detach().double()
        weights = values.new_ones(len(values), 1) if weights is None else weights.to(values)
        self.total = self.total + weights.T @ values
        self.samples = self.samples + weights.sum(0)

    @property
    def mean(self) -> Tensor:
        """(sums, units) on the CPU; 0 where no sample is."""
        assert isinstance(self.total, Tensor)
        assert isinstance(self.samples, Tensor)
        return (summed(self.total) / summed(self.samples).clamp(min=1)[:, None]).cpu()


@dataclass
class _Reader:
    """Forward pre-hooks at a group's consumers; one `_Cut` per distinct tensor of a forward pass.

    `weights` (n, sums) says how much each sample of the current batch counts in each sum; None: in one, all alike.
    """

    model: nn.Module
    group: Group
    statistic: Statistic
    origin: Tensor | None = None
    cuts: list[_Cut] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    weights: Tensor | None = None

    def attach(self) -> None:
        for member in self.group.consumers:
            module = self.model.get_submodule(member.module)
            module.register_forward_pre_hook(self._hook(member))

    def _hook(self, member: Member) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            value = args[0]
            if any(value is other for other in self.seen):
                return
            self.seen.append(value)
            if len(self.seen) > len(self.cuts):
                self.cuts.append(_Cut())
            cut = self.cuts[len(self.seen) - 1]
            activation = unit_view(value.detach(), module, member.index)
            if self.origin is not None:
                origin = self.origin[len(self.seen) - 1]
                activation = activation - origin.to(activation).unsqueeze(1)
            if not value.requires_grad:
                cut.add(self.statistic(activation, torch.empty(0)), self.weights)
                return

            def use(gradient: Tensor) -> None:
                cut.add(self.statistic(activation, unit_view(gradient, module, member.index)), self.weights)

            value.register_hook(use)

        return read


def collect(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Batches,
    statistic: Statistic,
    start: Start | None = None,
    origin: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Mean over samples of `statistic` for every unit: group name -> (cuts, units) float64.

    A group has one cut per distinct tensor that its consumers read: one for an inner layer, several along a residual
    stream. Multipliers are the whole gradient at the tensor, not one consumer's part of it. Without `start` there is
    no backward pass and the statistic gets an empty multiplier. Activations are read as differences from `origin`,
    which is shaped like a result. The model is left as it was.
    """
    readers = [_Reader(model, group, statistic, origin[group.name] if origin else None) for group in groups]
    _stream(model, readers, batches, start)
    return {reader.group.name: torch.stack([cut.mean[0] for cut in reader.cuts]) for reader in readers}


def collect_by_label(
    model: nn.Module, groups: Sequence[Group], batches: Batches, statistic: Statistic, start: Start, classes: int
) -> tuple[dict[str, Tensor], Tensor]:
    """`collect` with a mean for each label, same passes: group name -> (cuts, classes, units), samples (classes,).

    A mean over no samples is 0. Takes one group or more. Raises `InputError` for labels that are none of the `classes`.
    """
    readers = [_Reader(model, group, statistic) for group in groups]
    _stream(model, readers, batches, start, classes)
    means = {reader.group.name: torch.stack([cut.mean for cut in reader.cuts]) for reader in readers}
    return means, summed(torch.as_tensor(readers[0].cuts[0].samples))


def _stream(
    model: nn.Module, readers: Sequence[_Reader], batches: Batches, start: Start | None, classes: int | None = None
) -> None:
    """Let `readers` add up all batches; with `classes` by label."""
    device = device_of(model)
    with observed(model), torch.set_grad_enabled(start is not None):
        for reader in readers:
            reader.attach()
        for inputs, labels in batches if start is None else InParts(batches):
            weights = None if classes is None else _at_label(labels, classes)
            for reader in readers:
                reader.weights = weights
            inputs = inputs.detach().to(device).requires_grad_(start is not None)
            logits = model(inputs)
            if start is not None:
                torch.autograd.grad(logits, inputs, start(logits.detach(), labels.to(device)))
            for reader in readers:
                reader.seen.clear()


def _at_label(labels: Tensor, classes: int) -> Tensor:
    """1 at each sample's label, (n, classes)."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(f"labels go from {low} to {high}; expected 0 to {classes - 1}, the classes of the model")
    return one_hot(labels, classes)


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of a layer's input features, over samples and positions, float64.

    `second` is E[x x^T] (features, features), `mean` is E[x] (features,).
    """

    second: Tensor
    mean: Tensor

    @property
    def covariance(self) -> Tensor:
        """E[x x^T] - E[x] E[x]^T, (features, features)."""
        return self.second - torch.outer(self.mean, self.mean)


@dataclass(frozen=True, eq=False)
class Remembered:
    """Batches that keep the moments of one model, which must not change any more: each is computed once."""

    batches: Batches
    model: nn.Module
    found: dict[str, Moments] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def moments(model: nn.Module, layouts: Mapping[str, Tensor], batches: Batches) -> dict[str, Moments]:
    """Input moments of the modules named in `layouts`, which gives the rows of every feature, (features, k).

    Layouts are those of `input_layouts`; `Remembered` batches of this model are read only for what they do not know.
    """
    if isinstance(batches, Remembered) and batches.model is model:
        asked = {name: index for name, index in layouts.items() if name not in batches.found}
        batches.found.update(moments(model, asked, batches.batches) if asked else {})
        return {name: batches.found[name] for name in layouts if name in batches.found}
    device = device_of(model)
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    def hook(name: str, index: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            features = unit_view(args[0].detach(), module, index).transpose(0, 1).flatten(1).double()
            second, mean, count = sums.get(name, (0.0, 0.0, 0))
            sums[name] = (
                second + features @ features.T,
                mean + features.sum(1),
                count + features.shape[1],
            )

        return add

    with observed(model), torch.no_grad():
        for name, index in layouts.items():
            model.get_submodule(name).register_forward_pre_hook(hook(name, index))
        for inputs, _ in InParts(batches):
            model(inputs.to(device))
    return {name: _moments(*sums[name]) for name in layouts if name in sums}


def _moments(second: Tensor, mean: Tensor, count: int) -> Moments:
    samples = summed(torch.tensor(count, dtype=second.dtype, device=second.device))
    return Moments(summed(second) / samples, summed(mean) / samples)


@dataclass
class RowSums:
    """Sums over samples and positions of the rows of a tensor and of their squares, each (rows,) float64."""

    count: int = 0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """Add rows (n, rows, positions)."""
        rows = rows.detach().double()
        self.count += rows.shape[0] * rows.shape[2]
        self.first = self.first + rows.sum((0, 2))
        self.second = self.second + rows.square().sum((0, 2))

    def everywhere(self) -> RowSums:
        """The sums of all processes."""
        first, second = torch.as_tensor(self.first), torch.as_tensor(self.second)
        count = summed(torch.tensor(self.count, device=first.device))
        return RowSums(int(count), summed(first), summed(second))

    @property
    def mean(self) -> Tensor:
        """(rows,)."""
        return torch.as_tensor(self.first) / self.count

    @property
    def deviation(self) -> Tensor:
        """Standard deviation, (rows,)."""
        return (torch.as_tensor(self.second) / self.count - self.mean.square()).clamp_min(0).sqrt()


def input_layouts(model: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Rows of every input feature of the groups' consumers: module name -> (features, k).

    A feature is one input row, except where a channel was flattened in front of a linear layer: its k positions are
    one feature then, as the taps of a convolution are.
    """
    layouts = {}
    for name, owners in members_by_module(groups, "in").items():
        module = model.get_submodule(name)
        weight: Tensor = module.weight  # type: ignore[assignment]
        rows = torch.arange(weight.shape[1] * getattr(module, "groups", 1))
        group, member = owners[0]
        flattened = isinstance(module, nn.Linear) and group.kind == "channel" and member.index.shape[1] > 1
        whole = flattened and torch.equal(member.index.flatten(), rows)
        layouts[name] = member.index if whole else rows.unsqueeze(1)
    return layouts


def members_by_module(groups: Sequence[Group], axis: Axis) -> dict[str, list[tuple[Group, Member]]]:
    """Module name -> the groups that own rows of its `axis`, and how."""
    found: dict[str, list[tuple[Group, Member]]] = {}
    for group in groups:
        for member in group.members:
            if member.axis == axis:
                found.setdefault(member.module, []).append((group, member))
    return found


def removed_rows(owners: Sequence[tuple[Group, Member]], plan: Plan) -> Tensor:
    """Rows of a module's axis that the plan removes, sorted; `owners` as from `members_by_module`."""
    rows = [member.rows(plan.removed.get(group.name, ())) for group, member in owners]
    return torch.cat(rows).sort().values if rows else torch.empty(0, dtype=torch.int64)


def others(size: int, rows: Tensor) -> Tensor:
    """The indices below `size` that are not in `rows`, ascending."""
    keep = torch.ones(size, dtype=torch.bool)
    keep[rows] = False
    return keep.nonzero().flatten()


def unit_weights(model: nn.Module, member: Member) -> Tensor | None:
    """A convolution's or linear layer's weights by unit, (units, weights); None for other members."""
    module = dict(model.named_modules()).get(member.module)
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    weight = module.weight.detach()
    if member.axis == "in":
        conv_groups = getattr(module, "groups", 1)
        per_group = weight.unflatten(0, (conv_groups, len(weight) // conv_groups)).transpose(1, 2)
        weight = per_group.flatten(0, 1)
    return weight[member.index.to(weight.device)].flatten(1)


def power(
    model: nn.Module, names: Sequence[str], batches: Batches, start: Start, *, side: Axis = "out"
) -> dict[str, Tensor]:
    """E_x sum_p m_rp^2 at the outputs, or the inputs, of the modules `names`: module name -> (rows,) float64.

    The multiplier m is the gradient at that tensor, the sum runs over positions and calls.
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

    with observed(model), torch.enable_grad():
        for name in names:
            model.get_submodule(name).register_forward_hook(hook(name))
        for inputs, labels in InParts(batches):
            inputs = inputs.detach().to(device).requires_grad_(True)
            logits = model(inputs)
            torch.autograd.grad(logits, inputs, start(logits.detach(), labels.to(device)))
            samples += len(inputs)
    everywhere = summed(torch.tensor(samples, dtype=torch.float64, device=device))
    return {name: summed(sums[name]) / everywhere for name in names}
