"""Greedy removal of the units whose loss costs least after the best linear repair: Optimal Brain Surgeon, in blocks.

A layer reads features x with second moment Sigma through weights W. With A = Sigma^-1 and G = W^T diag(w) W, removing
the features P of a unit and folding them into the rest costs tr(G_PP A_PP^-1): the expected squared change of the
outputs, weighted by w. After a removal both are what they would be, had the fold been made, and
zero in the rows and columns of P:

    A <- A - A_:P A_PP^-1 A_P:        G <- T^T G T,  T = I - E_P A_PP^-1 A_P:
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHARE = 32
"""At most one in this many of the remaining units goes between two updates of the whole matrices."""

CANDIDATES = 2
"""Units per removal among which the cheapest is sought, one by one and exactly, between two such updates."""


COMPACT = 0.75
"""Share of units still there below which the matrices are cut to size."""


@dataclass(eq=False)
class Reader:
    """One consumer of a group. Feature u * width + j belongs to unit u.

    `inverse` is A and `weights` is G, both (features, features) float64, changed in place. With `follow` off G stays as
    it is: the cost of what is lost is not corrected for what earlier folds put into the weights.
    """

    inverse: Tensor
    weights: Tensor
    width: int = 1
    follow: bool = True

    def damage(self) -> Tensor:
        """tr(G_uu A_uu^-1) of every unit, (units,)."""
        if self.width == 1:
            return self.weights.diagonal() / self.inverse.diagonal()
        costs = torch.linalg.solve(blocks(self.inverse, self.width), blocks(self.weights, self.width))
        return costs.diagonal(dim1=1, dim2=2).sum(1)

    def among(self, units: Tensor) -> Reader:
        """A copy with eyes for `units` only."""
        rows = features(units, self.width)
        inverse, weights = (matrix.index_select(0, rows).index_select(1, rows) for matrix in self._matrices)
        return Reader(inverse, weights, self.width, self.follow)

    def fold_(self, gone: Tensor) -> None:
        """Fold the units `gone` into the others."""
        lost = features(gone, self.width)
        rows = self.inverse[lost]
        transfer = -torch.linalg.solve(rows[:, lost], rows)
        self.inverse.addmm_(rows.T, transfer)
        if self.follow:
            read = self.weights[lost]
            half = read + read[:, lost] @ transfer / 2
            self.weights.addmm_(half.T, transfer).addmm_(transfer.T, half)
        for matrix in self._matrices:
            matrix[lost] = 0
            matrix[:, lost] = 0
        self.inverse[lost, lost] = 1

    @property
    def _matrices(self) -> tuple[Tensor, Tensor]:
        return self.inverse, self.weights


def eliminate(readers: Sequence[Reader], units: int) -> Tensor:
    """Cost of every unit at the moment it goes, (units,) float64, never falling along the order of removal.

    All readers lose the same units together; their costs add. Up to 63 units go strictly one by one. The readers are
    used up.
    """
    scores = torch.zeros(units, dtype=torch.float64)
    names, there = torch.arange(units), torch.ones(units, dtype=torch.bool)
    level = 0.0
    while there.any():
        count = max(1, int(there.sum()) // SHARE)
        near = torch.argsort(_damage(readers, there), stable=True)[: CANDIDATES * count if count > 1 else 1]
        order, costs = _cheapest([reader.among(near) for reader in readers], count)
        gone = near[order]
        for place, cost in zip(gone.tolist(), costs, strict=True):
            level = max(level, cost)
            scores[names[place]] = level
        for reader in readers:
            reader.fold_(gone)
        there[gone] = False
        if there.double().mean() < COMPACT:
            kept = there.nonzero().flatten()
            readers = [reader.among(kept) for reader in readers]
            names, there = names[kept], there[kept]
    return scores


def _damage(readers: Sequence[Reader], there: Tensor) -> Tensor:
    """Summed over readers; infinite for the units that are gone."""
    total = torch.stack([reader.damage() for reader in readers]).sum(0).clamp_min(0).cpu()
    return total.masked_fill(~there, torch.inf)


def _cheapest(readers: Sequence[Reader], count: int) -> tuple[list[int], list[float]]:
    """The `count` units that go first, in order, and their costs when they go."""
    there = torch.ones(len(readers[0].inverse) // readers[0].width, dtype=torch.bool)
    order, costs = [], []
    for _ in range(count):
        damage = _damage(readers, there)
        place = int(damage.argmin())
        order.append(place)
        costs.append(float(damage[place]))
        there[place] = False
        if len(order) < count:
            for reader in readers:
                reader.fold_(torch.tensor([place]))
    return order, costs


def regularised_inverse(matrix: Tensor, ridge: float) -> Tensor:
    """(Q + lambda I)^-1 of a positive semidefinite Q, with lambda = ridge * mean diagonal."""
    level = ridge * matrix.diagonal().mean().clamp_min(0) + 1e-12
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix + level * torch.eye(len(matrix)).to(matrix)))


def features(units: Tensor, width: int) -> Tensor:
    """The features of `units`, in their order, each unit having `width` of them."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def blocks(matrix: Tensor, width: int) -> Tensor:
    """The blocks on the diagonal, (units, width, width)."""
    units = len(matrix) // width
    every = torch.arange(units)
    return matrix.reshape(units, width, units, width)[every, :, every, :]
