"""Greedy removal of the units whose loss costs least after the best linear repair: Optimal Brain Surgeon, in blocks.

A layer reads features x with second moment Sigma through weights W. With A = Sigma^-1 and G = W^T diag(w) W, removing
the features P of a unit and folding them into the rest costs tr(G_PP A_PP^-1): the expected squared change of the
outputs, weighted by w. After a removal both are what they would be, had the fold been made, and
zero in the rows and columns of P:

    A <- A - A_:P A_PP^-1 A_P:        G <- T^T G T,  T = I - E_P A_PP^-1 A_P:

Where features are many and samples few, a fit predicts the samples that it was made on far better than others, and
every unit looks free. So A may come from one half of the samples and the error from the other: with Sigma' the second
moment there and M = A Sigma' A, what is left of P is A_PP^-1 M_PP A_PP^-1 instead of A_PP^-1, and M <- T M T^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

UNITS_PER_REMOVAL = 32
"""At most one in this many remaining units is removed before all matrices are updated."""

CANDIDATES = 2
"""Number of candidates for each removal between two updates; among them the cheapest is found exactly."""


COMPACT_SHARE = 0.75
"""Matrices are cut to the remaining units once fewer than this share of their units remains."""


@dataclass(eq=False)
class ConsumerStatistics:
    """Statistics of one layer that reads a group (a consumer). Feature u * width + j belongs to unit u.

    `inverse` is A, `weights` is G and `check` is M, all (features, features) float64, changed in place. Without `check`
    errors are those on the samples that A is from. With `follow` off G stays as it is: the cost of what is lost is not
    corrected for what earlier folds put into the weights. `share` is what its costs are multiplied by.
    """

    inverse: Tensor
    weights: Tensor
    width: int = 1
    follow: bool = True
    check: Tensor | None = None
    share: float = 1.0

    def saliency(self) -> Tensor:
        """Cost of removing each unit, tr(G_uu E_uu), (units,); E is the part of it that others cannot replace."""
        if self.width == 1:
            inverse = self.inverse.diagonal()
            residual = 1 / inverse if self.check is None else self.check.diagonal() / inverse.square()
            return self.share * self.weights.diagonal() * residual
        inverse = blocks(self.inverse, self.width)
        costs = torch.linalg.solve(inverse, blocks(self.weights, self.width))
        if self.check is not None:
            costs = costs @ torch.linalg.solve(inverse, blocks(self.check, self.width))
        return self.share * costs.diagonal(dim1=1, dim2=2).sum(1)

    def among(self, units: Tensor) -> ConsumerStatistics:
        """A copy that contains only `units`."""
        rows = features(units, self.width)
        inverse, weights = (_take_block(matrix, rows) for matrix in (self.inverse, self.weights))
        check = None if self.check is None else _take_block(self.check, rows)
        return replace(self, inverse=inverse, weights=weights, check=check)

    def fold_(self, units: Tensor) -> None:
        """Remove `units` and let the remaining ones take over what they can, in place."""
        removed_features = features(units, self.width)
        rows = self.inverse[removed_features]
        transfer = -torch.linalg.solve(rows[:, removed_features], rows)
        self.inverse.addmm_(rows.T, transfer)
        matrices = [self.inverse]
        for matrix, changes in ((self.weights, self.follow), (self.check, True)):
            if matrix is not None:
                if changes:
                    coefficients = matrix[removed_features]
                    half = coefficients + coefficients[:, removed_features] @ transfer / 2
                    matrix.addmm_(half.T, transfer).addmm_(transfer.T, half)
                matrices.append(matrix)
        for matrix in matrices:
            matrix[removed_features] = 0
            matrix[:, removed_features] = 0
        self.inverse[removed_features, removed_features] = 1


def _take_block(matrix: Tensor, rows: Tensor) -> Tensor:
    return matrix.index_select(0, rows).index_select(1, rows)


def eliminate(readers: Sequence[ConsumerStatistics], units: int) -> Tensor:
    """Cost of every unit at the moment of its removal, (units,) float64, never falling in the order of removal.

    All readers lose the same units together; their costs add. Up to 63 units are removed strictly one by one. The
    readers are changed, and useless afterwards.
    """
    scores = torch.zeros(units, dtype=torch.float64)
    names, is_left = torch.arange(units), torch.ones(units, dtype=torch.bool)
    level = 0.0
    while is_left.any():
        count = max(1, int(is_left.sum()) // UNITS_PER_REMOVAL)
        candidates = torch.argsort(_compute_saliency(readers, is_left), stable=True)[
            : CANDIDATES * count if count > 1 else 1
        ]
        order, costs = _find_cheapest([reader.among(candidates) for reader in readers], count)
        removed_units = candidates[order]
        for place, cost in zip(removed_units.tolist(), costs, strict=True):
            level = max(level, cost)
            scores[names[place]] = level
        for reader in readers:
            reader.fold_(removed_units)
        is_left[removed_units] = False
        if is_left.double().mean() < COMPACT_SHARE:
            remaining_units = is_left.nonzero().flatten()
            readers = [reader.among(remaining_units) for reader in readers]
            names, is_left = names[remaining_units], is_left[remaining_units]
    return scores


def _compute_saliency(readers: Sequence[ConsumerStatistics], is_left: Tensor) -> Tensor:
    """Cost of removing each unit, summed over readers, (units,); infinite where `is_left` is false."""
    total = torch.stack([reader.saliency() for reader in readers]).sum(0).clamp_min(0).cpu()
    return total.masked_fill(~is_left, torch.inf)


def _find_cheapest(readers: Sequence[ConsumerStatistics], count: int) -> tuple[list[int], list[float]]:
    """The `count` units to remove first, in order, and their costs at that moment."""
    is_left = torch.ones(len(readers[0].inverse) // readers[0].width, dtype=torch.bool)
    order, costs = [], []
    for _ in range(count):
        saliency = _compute_saliency(readers, is_left)
        place = int(saliency.argmin())
        order.append(place)
        costs.append(float(saliency[place]))
        is_left[place] = False
        if len(order) < count:
            for reader in readers:
                reader.fold_(torch.tensor([place]))
    return order, costs


def invert_regularised(matrix: Tensor, ridge: float) -> Tensor:
    """(Q + lambda I)^-1 for a positive semidefinite matrix Q, with lambda = ridge * mean of Q's diagonal."""
    level = ridge * matrix.diagonal().mean().clamp_min(0) + 1e-12
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix + level * torch.eye(len(matrix)).to(matrix)))


def features(units: Tensor, width: int) -> Tensor:
    """Indices of the features of `units`, in the order of the units; each unit has `width` features."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def blocks(matrix: Tensor, width: int) -> Tensor:
    """The square blocks on the diagonal of `matrix`, one for each unit, (units, width, width)."""
    units = len(matrix) // width
    indices = torch.arange(units)
    return matrix.reshape(units, width, units, width)[indices, :, indices, :]
