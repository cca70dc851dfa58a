"""Local search around a plan: a unit that stays and one that goes change places for as long as the damage falls.

The damage of removing the features P of a group is what the fold leaves (see `elimination`): tr(G_PP A_PP^-1), summed
over the group's readers. A greedy order is not always the best set; the exchange of two units that lowers the damage
most, of all there are, is made again and again. Widths stay what they are, and so does what the plan costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from pxcompress.elimination import Reader, blocks, features
from pxcompress.scorers.lrp_residual import LRPResidual
from pxcompress.state import device_of, observed
from pxcompress.types import Batches, Group, Plan, Scorer

WORK = 10**11
"""At most so many multiplications a group: swaps x features^3. Only groups of several hundred units come to it."""

LEAST = 1e-9
"""Share by which a swap has to lower the damage: less is rounding."""


def swapped_plan(model: nn.Module, groups: Sequence[Group], plan: Plan, batches: Batches, scorer: Scorer) -> Plan:
    """`plan`, which removes units of `groups`, with the swaps made in each group for itself.

    Damage is what `scorer` means by it where it is an `LRPResidual`, else what the default one means; its moments and
    relevance come from two passes of `model` over `batches`.
    """
    judge = scorer if isinstance(scorer, LRPResidual) else LRPResidual()
    removed = dict(plan.removed)
    for group, readers in judge.readers(model, groups, batches):
        gone = removed.get(group.name, ())
        if 0 < len(gone) < group.units:
            removed[group.name] = swapped(readers, gone)
    return replace(plan, removed=removed)


def swapped(readers: Sequence[Reader], gone: Sequence[int]) -> tuple[int, ...]:
    """The units to remove instead of `gone`, ascending, as many: no swap of two lowers the damage, or `WORK` is spent.

    The readers, in which nothing has been folded, are left as they are.
    """
    features = len(readers[0].inverse)
    units = torch.arange(features // readers[0].width)
    best, least = torch.tensor(sorted(gone)), damage(readers, gone)
    for _ in range(max(1, WORK // features**3)):
        kept = units[~torch.isin(units, best)]
        change = torch.stack([_changes(reader, best, kept).cpu() for reader in readers]).sum(0)
        place, other = divmod(int(change.argmin()), len(kept))
        candidate = best.clone()
        candidate[place] = kept[other]
        found = damage(readers, candidate.tolist())
        if not found < (1 - LEAST) * least:
            break
        best, least = candidate, found
    return tuple(best.sort().values.tolist())


def damage(readers: Sequence[Reader], gone: Sequence[int]) -> float:
    """What is left of the units `gone` after the best linear repair: tr(G_PP A_PP^-1), summed over `readers`."""
    total = 0.0
    for reader in readers:
        rows = features(torch.tensor(list(gone), dtype=torch.int64), reader.width)
        inverse, weights = (matrix[rows][:, rows] for matrix in (reader.inverse, reader.weights))
        total += float(torch.linalg.solve(inverse, weights).diagonal().sum())
    return total


def divergence(model: nn.Module, other: nn.Module, batches: Batches) -> float:
    """KL divergence of the predictions of `other` from those of `model`, mean over samples."""
    lost, samples = 0.0, 0
    with observed(model), observed(other), torch.no_grad():
        for inputs, _ in batches:
            expected, found = (each(inputs.to(device_of(each))).double().log_softmax(1) for each in (model, other))
            lost += float(kl_div(found, expected, reduction="sum", log_target=True))
            samples += len(inputs)
    return lost / samples


def _changes(reader: Reader, gone: Tensor, kept: Tensor) -> Tensor:
    """By how much the damage changes where a unit of `gone` comes back and one of `kept` goes: (gone, kept).

    With P gone and S kept, C = A_PP^-1 is the covariance of what S cannot predict of P, and B = -C A_PS predicts P.
    A unit p that comes back takes tr(C_pp^-1 (C G_PP C)_pp) off the damage. A unit s that goes then costs
    tr(G'_ss A'_ss^-1), where A' and G' are what the folds of P without p have made of A and G.
    """
    lost, left, width = features(gone, reader.width), features(kept, reader.width), reader.width
    inverse, weights = reader.inverse, reader.weights
    spread = torch.linalg.inv(inverse[lost][:, lost])  # C
    predict = -spread @ inverse[lost][:, left]  # B
    power, cross = weights[lost][:, lost], weights[lost][:, left]
    read = cross + power @ predict  # what the folded weights of S share with those of P
    own = blocks(spread, width)  # C_pp
    shared = blocks(spread @ power @ spread, width)
    back = torch.linalg.solve(own, shared)
    gain = back.diagonal(dim1=1, dim2=2).sum(1)
    toward, common = _tiles(predict, width), torch.linalg.solve(own[:, None], _tiles(spread @ read, width))
    turned = toward.transpose(2, 3)
    folded = blocks(weights[left][:, left] + predict.T @ read + cross.T @ predict, width)
    known = blocks(inverse[left][:, left] + inverse[left][:, lost] @ predict, width)
    mixed = turned @ common
    cost = folded - mixed - mixed.transpose(2, 3) + turned @ torch.linalg.solve(own, back, left=False)[:, None] @ toward
    precision = known + turned @ torch.linalg.solve(own[:, None], toward)
    return torch.linalg.solve(precision, cost).diagonal(dim1=2, dim2=3).sum(2) - gain[:, None]


def _tiles(matrix: Tensor, width: int) -> Tensor:
    """A matrix by pairs of units: (units, others, width, width)."""
    return matrix.unflatten(0, (-1, width)).unflatten(2, (-1, width)).transpose(1, 2)
