"""Greedy removal of the units whose loss costs least after the best linear repair: Optimal Brain Surgeon, in blocks.

A layer reads features x with second moment Sigma through weights W. With A = Sigma^-1 and G = W^T diag(w) W, removing
the features P of a unit and folding them into the rest costs tr(G_PP A_PP^-1): the expected squared change of the
outputs, weighted by w. After a removal both matrices shrink to what they would be, had the fold been made:

    A <- A_SS - A_SP A_PP^-1 A_PS        G <- T^T G T,  T = [I; -A_PP^-1 A_PS]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHARE = 32
"""At most one in this many of the remaining units goes between two updates of the whole matrices."""

CANDIDATES = 2
"""Units per removal among which the cheapest is sought, one by one and exactly, between two such updates."""


@dataclass(frozen=True, eq=False)
class Reader:
    """One consumer of a group. Feature u * width + j belongs to unit u.

    `inverse` is A and `weights` is G, both (features, features) float64. With `follow` off G stays as it is: the cost
    of what is lost is not corrected for what earlier folds put into the weights.
    """

    inverse: Tensor
    weights: Tensor
    width: int = 1
    follow: bool = True

    def damage(self) -> Tensor:
        """tr(G_uu A_uu^-1) of every unit, (units,)."""
        if self.width == 1:
            return self.weights.diagonal() / self.inverse.diagonal()
        return (
            torch.linalg.solve(_blocks(self.inverse, self.width), _blocks(self.weights, self.width))
            .diagonal(dim1=1, dim2=2)
            .sum(1)
        )

    def among(self, units: Tensor) -> Reader:
        """The same reader with eyes for `units` only: enough to follow their costs while they go."""
        rows = _features(units, self.width)
        return replace(self, inverse=self.inverse[rows][:, rows], weights=self.weights[rows][:, rows])

    def without(self, gone: Tensor, kept: Tensor) -> Reader:
        """The reader after the units `gone` were folded into the units `kept`."""
        lost, rest = _features(gone, self.width), _features(kept, self.width)
        transfer = -torch.linalg.solve(self.inverse[lost][:, lost], self.inverse[lost][:, rest])
        inverse = self.inverse[rest][:, rest] + self.inverse[rest][:, lost] @ transfer
        weights = self.weights[rest][:, rest]
        if self.follow:
            cross = self.weights[rest][:, lost] @ transfer
            weights = weights + cross + cross.T + transfer.T @ self.weights[lost][:, lost] @ transfer
        return replace(self, inverse=inverse, weights=weights)


def eliminate(readers: Sequence[Reader], units: int) -> Tensor:
    """Cost of every unit at the moment it goes, (units,) float64, never falling along the order of removal.

    All readers lose the same units together; their costs add. Up to 63 units go strictly one by one.
    """
    scores = torch.zeros(units, dtype=torch.float64)
    left = torch.arange(units)
    level = 0.0
    while len(left):
        count = max(1, len(left) // SHARE)
        near = torch.argsort(_damage(readers), stable=True)[: CANDIDATES * count if count > 1 else 1]
        order, costs = _cheapest([reader.among(near) for reader in readers], count)
        gone = near[order]
        for place, cost in zip(gone.tolist(), costs, strict=True):
            level = max(level, cost)
            scores[left[place]] = level
        keep = torch.ones(len(left), dtype=torch.bool)
        keep[gone] = False
        kept = keep.nonzero().flatten()
        readers = [reader.without(gone.sort().values, kept) for reader in readers]
        left = left[kept]
    return scores


def _damage(readers: Sequence[Reader]) -> Tensor:
    return torch.stack([reader.damage() for reader in readers]).sum(0).clamp_min(0).cpu()


def _cheapest(readers: Sequence[Reader], count: int) -> tuple[list[int], list[float]]:
    """The `count` units that go first, in order, and their costs when they go."""
    left = torch.arange(len(_damage(readers)))
    order, costs = [], []
    for _ in range(count):
        damage = _damage(readers)
        place = int(damage.argmin())
        order.append(int(left[place]))
        costs.append(float(damage[place]))
        kept = torch.cat([torch.arange(place), torch.arange(place + 1, len(left))])
        readers = [reader.without(torch.tensor([place]), kept) for reader in readers]
        left = left[kept]
    return order, costs


def regularised_inverse(matrix: Tensor, ridge: float) -> Tensor:
    """(Q + lambda I)^-1 of a positive semidefinite Q, with lambda = ridge * mean diagonal."""
    level = ridge * matrix.diagonal().mean().clamp_min(0) + 1e-12
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix + level * torch.eye(len(matrix)).to(matrix)))


def _features(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def _blocks(matrix: Tensor, width: int) -> Tensor:
    """The blocks on the diagonal, (units, width, width)."""
    units = len(matrix) // width
    every = torch.arange(units)
    return matrix.reshape(units, width, units, width)[every, :, every, :]
