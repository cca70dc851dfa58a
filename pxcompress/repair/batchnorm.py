"""Corrects BatchNorm statistics, since pruning changes the inputs of every normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pxcompress.layout.rows import complement, list_removed_rows, members_by_module
from pxcompress.passes.matching import Change, moment_changes
from pxcompress.repair import REPAIRS
from pxcompress.types import Batches, Phase, Pruned, Repair


@REPAIRS.register("batchnorm")
@dataclass(frozen=True)
class BatchNormStatistics(Repair):
    """Set running mean and variance so that every BatchNorm's output has the same moments as in the dense model.

    Both are taken on the same samples: those at hand are seldom like the ones that the weights were trained on, and
    statistics re-estimated on them alone would change a model of which nothing was removed.
    """

    phase: ClassVar[Phase] = "statistics"

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """Correct the model with one pass of the dense and one of the pruned model over `batches`.

        Changes running statistics only.
        """
        norms = {
            name: norm for name, norm in _find_norms(pruned.model).items() if name in _find_norms(pruned.whole.dense)
        }
        if not norms:
            return pruned
        changes = moment_changes(pruned.whole.dense, pruned.model, _find_rows_left(pruned.whole), "in", batches)
        for name, change in changes.items():
            _apply_(norms[name], change)
        return pruned


def _find_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm layers with running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def _find_rows_left(pruned: Pruned) -> dict[str, Tensor]:
    """BatchNorm layer -> the dense channels that it still has."""
    owners = members_by_module(pruned.groups, "out")
    return {
        name: complement(norm.num_features, list_removed_rows(owners.get(name, ()), pruned.plan))
        for name, norm in _find_norms(pruned.dense).items()
    }


def _apply_(norm: _BatchNorm, change: Change) -> None:
    """Change running statistics in place, with the same effect as replacing the layer's input y by s y + t."""
    scale, shift = change
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    with torch.no_grad():
        norm.running_mean.copy_((mean - shift) / scale)
        norm.running_var.copy_(((variance + norm.eps) / scale.square() - norm.eps).clamp_min(0))
