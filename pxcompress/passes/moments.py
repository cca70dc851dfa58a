"""First and second moments of what layers read, once for every scorer and every repair.

Sums are float64, over samples and positions of all batches and all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pxcompress.layout.rows import unit_view
from pxcompress.passes.parts import InParts
from pxcompress.processes import summed
from pxcompress.state import device_of, observed
from pxcompress.types import Batch, Batches


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
