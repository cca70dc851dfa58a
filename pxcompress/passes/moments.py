"""Means and covariances of the inputs of layers, computed once for all scorers and repairs.

Moments are means over samples and positions of all batches and all processes, apart for two halves of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from pxcompress.layout.padding import find_counted_positions, select_counted_columns
from pxcompress.layout.rows import unit_view
from pxcompress.passes.parts import RUN_LENGTH, SplitBatches
from pxcompress.processes import processes, rank, sum_over_processes
from pxcompress.state import device_of, evaluating
from pxcompress.types import Batch, Batches

MOST_POSITIONS = 1024
"""Most positions of a sample that are used for moments, chosen at random, since neighbours are alike."""


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of a layer's input features, over `count` samples and positions, float64.

    `second` is E[x x^T] (features, features), `mean` is E[x] (features,).
    """

    second: Tensor
    mean: Tensor
    count: float

    @property
    def covariance(self) -> Tensor:
        """The covariance matrix E[x x^T] - E[x] E[x]^T, (features, features)."""
        return self.around(self.mean)

    def around(self, centre: Tensor) -> Tensor:
        """Second moments around a centre c (features,): E[(x - c) (x - c)^T], (features, features)."""
        cross = torch.outer(self.mean, centre)
        return self.second - cross - cross.T + torch.outer(centre, centre)


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Moments of a layer's inputs on each half of the samples, so that a fit to one half is judged on the other.

    `samples` is the number of samples, not of positions: positions of one sample are not independent. `solutions` is a
    cache for costly results that depend on the moments alone.
    """

    halves: tuple[Moments, Moments]
    samples: int
    solutions: dict[tuple[bytes, float], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @property
    def one_position(self) -> bool:
        """Whether the layer reads a single position of each sample, as classifiers do."""
        return self.halves[0].count + self.halves[1].count == self.samples

    @cached_property
    def whole(self) -> Moments:
        """Moments over both halves of the samples together."""
        first_half, second_half = self.halves
        count = first_half.count + second_half.count
        shares = first_half.count / count, second_half.count / count
        return Moments(
            shares[0] * first_half.second + shares[1] * second_half.second,
            shares[0] * first_half.mean + shares[1] * second_half.mean,
            count,
        )

    @property
    def folds(self) -> tuple[tuple[Moments, Moments], ...]:
        """Pairs (moments to fit to, moments to judge by): each half in both roles; empty if a half is empty."""
        first_half, second_half = self.halves
        return ((first_half, second_half), (second_half, first_half)) if first_half.count and second_half.count else ()


@dataclass(eq=False)
class MomentCache:
    """Batches with a cache of one model's input moments, each computed once; the model must not change afterwards."""

    batches: Batches
    model: nn.Module
    moments: dict[str, InputMoments] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def collect_moments(model: nn.Module, layouts: Mapping[str, Tensor], batches: Batches) -> dict[str, InputMoments]:
    """Moments of the inputs of the layers named in `layouts`, which gives each feature's rows, (features, k).

    Layouts are those of `input_layouts`; `MomentCache` batches of this model are read only for what they do not know.
    """
    if isinstance(batches, MomentCache) and batches.model is model:
        missing = {name: index for name, index in layouts.items() if name not in batches.moments}
        batches.moments.update(collect_moments(model, missing, batches.batches) if missing else {})
        return {name: batches.moments[name] for name in layouts if name in batches.moments}
    device = device_of(model)
    sums: dict[str, tuple[_Sums, _Sums]] = {}
    seed = samples = batch_size = 0

    def hook(name: str, index: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            number = rank() + processes() * seed  # the batch's number in one process
            counted = find_counted_positions(args[0])
            features = unit_view(args[0].detach(), module, index)
            features = draw_positions(features, number) if counted is None else features
            first = in_first_half(batch_size * number, len(features))
            if name not in sums:
                sums[name] = _Sums(len(index), features.device), _Sums(len(index), features.device)
            for part, half in zip(sums[name], (first, ~first), strict=True):
                part.add(
                    select_counted_columns(
                        features[half.to(features.device)], None if counted is None else counted[half]
                    )
                )

        return add

    with evaluating(model), torch.no_grad():
        for name, index in layouts.items():
            model.get_submodule(name).register_forward_pre_hook(hook(name, index))
        for inputs, _ in SplitBatches(batches):
            batch_size = batch_size or len(inputs)
            model(inputs.to(device))
            seed, samples = seed + 1, samples + len(inputs)
    everyone = int(sum_over_processes(torch.tensor(samples, device=device)))
    return {
        name: InputMoments((sums[name][0].sum_processes(), sums[name][1].sum_processes()), everyone)
        for name in layouts
        if name in sums
    }


def in_first_half(first_number: int, count: int) -> Tensor:
    """Mask (count,) of the samples, numbered from `first_number`, that belong to the first half of all.

    Runs of neighbours stay together, since they may be frames of one film.
    """
    return torch.arange(first_number, first_number + count) // RUN_LENGTH % 2 == 0


def draw_positions(values: Tensor, seed: int) -> Tensor:
    """`values` (n, units, positions) at no more than `MOST_POSITIONS` random positions, which depend on `seed`
    alone.
    """
    if values.shape[2] <= MOST_POSITIONS:
        return values
    draw = torch.Generator().manual_seed(seed)
    return values[:, :, torch.randperm(values.shape[2], generator=draw)[:MOST_POSITIONS].to(values.device)]


class _Sums:
    """Running sums over columns x (features, m): their count, sum of x, and sum of x x^T, float64.

    Products are of float32 numbers around the mean of the first columns, which keeps what is lost to rounding small
    beside the variance.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.count = 0
        self.centre = torch.zeros(features, 1, device=device)
        self.first = torch.zeros(features, dtype=torch.float64, device=device)
        self.second = torch.zeros(features, features, dtype=torch.float64, device=device)

    def add(self, columns: Tensor) -> None:
        """Add `columns` (features, m); products are computed in float32 unless they are float64."""
        if not columns.shape[1]:
            return
        columns = columns if columns.dtype == torch.float64 else columns.float()
        if not self.count:
            self.centre = columns.mean(1, keepdim=True)
        around = columns - self.centre
        self.count += columns.shape[1]
        self.first += around.sum(1, dtype=torch.float64)
        self.second += around @ around.T

    def sum_processes(self) -> Moments:
        """The moments over the columns of all processes; zeros if there are none."""
        centre = self.centre.double().flatten()
        shift = torch.outer(self.first, centre)
        second = sum_over_processes(self.second + shift + shift.T + self.count * torch.outer(centre, centre))
        first = sum_over_processes(self.first + self.count * centre)
        count = float(sum_over_processes(torch.tensor(float(self.count), dtype=torch.float64, device=first.device)))
        return Moments(second / max(count, 1.0), first / max(count, 1.0), count)


@dataclass
class RowSums:
    """Sums over samples and positions of a tensor's rows and of their squares, each (rows,) float64."""

    count: int = 0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """Add a tensor (n, rows, positions), in its own precision around each sample's mean, the rest in float64."""
        rows = rows.detach() if rows.dtype == torch.float64 else rows.detach().float()
        samples, _, positions = rows.shape
        mean = rows.mean(2)
        around = torch.linalg.vector_norm(rows - mean[..., None], dim=2).double().square()
        mean = mean.double()
        self.count += samples * positions
        self.first = self.first + positions * mean.sum(0)
        self.second = self.second + (around + positions * mean.square()).sum(0)

    def include(self, sums: RowSums) -> None:
        """Add the sums of further calls or batches for the same rows."""
        self.count, self.first, self.second = (
            self.count + sums.count,
            self.first + sums.first,
            self.second + sums.second,
        )

    def sum_processes(self) -> RowSums:
        """The sums added up over all processes."""
        first, second = torch.as_tensor(self.first), torch.as_tensor(self.second)
        count = sum_over_processes(torch.tensor(self.count, device=first.device))
        return RowSums(int(count), sum_over_processes(first), sum_over_processes(second))

    @property
    def mean(self) -> Tensor:
        """Mean of every row, (rows,)."""
        return torch.as_tensor(self.first) / self.count

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of every row, (rows,)."""
        return (torch.as_tensor(self.second) / self.count - self.mean.square()).clamp_min(0).sqrt()
