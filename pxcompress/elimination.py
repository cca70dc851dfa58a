"""Greedy removal of the units whose loss costs least after the best linear repair: Optimal Brain Surgeon, in blocks.

A layer reads features x with second moment Sigma through weights W. With A = Sigma^-1 and G = W^T diag(w) W, removing
the features P of a unit and folding them into the rest costs tr(G_PP A_PP^-1): the expected squared change of the outputs,
weighted by w. After a removal both matrices shrink to what they would be, had the fold been made:

    A <- A_SS - A_SP A_PP^-1 A_PS        G <- T^T G T,  T = [I; -A_PP^-1 A_PS]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHARE = 64
"""At most one in this many of the remaining units goes at a time: one by one up to 64 units, 64 at once of 4096."""


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

    def without(self, gone: Tensor, kept: Tensor) -> Reader:
        """The reader after the units `gone` were folded into the units `kept`."""
        lost, rest = _features(gone, self.width), _features(kept, self.width)
        transfer = -torch.linalg.solve(self.inverse[lost][:, lost], self.inverse[lost][:, rest])
        inverse = self.inverse[rest][:, rest] + self.inverse[rest][:, lost] @ transfer
        weights = self.weights[rest][:, rest]
        if self.follow:
            cross = self.weights[rest][:, lost] @ transfer
            weights = weights + cross + cross.T + transfer.T @ self.weights[lost][:, lost] @ transfer
        return Reader(inverse, weights, self.width, self.follow)


def eliminate(readers: Sequence[Reader], units: int) -> Tensor:
    """Cost of every unit at the moment it goes, (units,) float64, never falling along the order of removal.

    All readers lose the same units together; their costs add. The last unit costs infinitely much to none: it gets
    its damage with nothing left to fold into.
    """
    scores = torch.zeros(units, dtype=torch.float64)
    left = torch.arange(units)
    level = 0.0
    while len(left):
        damage = torch.stack([reader.damage() for reader in readers]).sum(0).clamp_min(0).cpu()
        count = max(1, len(left) // SHARE)
        gone = torch.argsort(damage, stable=True)[:count]
        for place in gone.tolist():
            level = max(level, float(damage[place]))
            scores[left[place]] = level
        keep = torch.ones(len(left), dtype=torch.bool)
        keep[gone] = False
        kept = keep.nonzero().flatten()
        readers = [reader.without(gone.sort().values, kept) for reader in readers]
        left = left[kept]
    return scores


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
