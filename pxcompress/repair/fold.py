"""Fold what the removed units carried into the ones that stay: closed form, no labels, no training.

The removed inputs P of a layer are predicted from the kept ones S, x_P = B x_S + c, by ridge regression on the dense
model's moments; its weights take the prediction over: W_S += W_P B, bias += W_P c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pxcompress.layout.consumers import Consumer, add_, consumers, is_padded
from pxcompress.layout.rows import others
from pxcompress.passes.moments import Moments, moments
from pxcompress.registry import option, searched
from pxcompress.repair import REPAIRS
from pxcompress.types import Batches, Phase, Pruned

FACTORS = (1.0, 0.01, 0.1, 10.0, 100.0)
"""What the ridge is multiplied by where it is chosen; the first wins a tie."""


@REPAIRS.register("fold")
@dataclass(frozen=True)
class Fold:
    """Ridge prediction of removed inputs from kept ones, folded into every consumer's weights."""

    phase: ClassVar[Phase] = "absorb"

    ridge: float = searched(
        option(1e-3, "ridge, as a share of the mean variance of the kept inputs", low=0.0, high=1.0, log=True)
    )
    centred: str = option(
        "auto",
        "predict around the mean (a bias takes it up), around zero (exact at zero-padded borders), or by padding",
        choices=("auto", "yes", "no"),
    )
    tune: bool = option(
        False, "choose the ridge, from 0.01 to 100 times the given one, by the error on held-out samples"
    )

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """Fold into all consumers of pruned groups; moments come from one pass of the dense model over `batches`.

        With "tune" a second pass, over `held_out`, gives the moments on which the ridge is chosen.
        """
        layers = consumers(pruned)
        layouts = {layer.name: layer.layout for layer in layers}
        found = moments(pruned.dense, layouts, batches)
        checks = moments(pruned.dense, layouts, held_out) if self.tune else {}
        for layer in layers:
            weight, bias = self._delta(layer, found[layer.name], checks.get(layer.name))
            add_(layer.slim, weight[layer.outputs], None if bias is None else bias[layer.outputs])
        return pruned

    def _delta(self, layer: Consumer, fit: Moments, check: Moments | None) -> tuple[Tensor, Tensor | None]:
        """What to add to the kept weights (outputs, inputs, ...) and, if centred, to the bias (outputs,)."""
        weight: Tensor = layer.dense.weight  # type: ignore[assignment]
        features, taps = layer.layout.shape
        centred = self._is_centred(layer.dense)
        parts, shifts = [], []
        conv_groups = getattr(layer.dense, "groups", 1)
        width = features // conv_groups
        for place, part in enumerate(weight.detach().double().chunk(conv_groups)):
            span = slice(place * width, (place + 1) * width)
            inside = layer.removed[(layer.removed >= span.start) & (layer.removed < span.stop)] - span.start
            lost = part.reshape(part.shape[0], width, -1)[:, inside]
            kept = others(width, inside)
            held = None if check is None else _matrix(check, span, centred)
            predict = self._predict(_matrix(fit, span, centred), (kept, inside), lost, held)
            parts.append(torch.einsum("opk,ps->osk", lost, predict))
            mean = fit.mean[span]
            shifts.append(torch.einsum("opk,p->o", lost, mean[inside] - predict @ mean[kept]))
        delta = torch.cat(parts)
        kernel = weight.shape[2:] if taps == 1 else torch.Size()
        shaped = delta.reshape(weight.shape[0], delta.shape[1:].numel() // kernel.numel(), *kernel)
        return shaped.to(weight.dtype), torch.cat(shifts).to(weight.dtype) if centred else None

    def _predict(self, fit: Tensor, parts: tuple[Tensor, Tensor], lost: Tensor, check: Tensor | None) -> Tensor:
        """B (removed, kept); with held-out moments the ridge whose remaining error at the outputs is least."""
        kept, removed = parts
        if check is None:
            return _ridge(fit, kept, removed, self.ridge)
        found = [_ridge(fit, kept, removed, self.ridge * factor) for factor in FACTORS]
        return min(found, key=lambda predict: _error(check, parts, lost, predict))

    def _is_centred(self, module: nn.Module) -> bool:
        if self.centred != "auto":
            return self.centred == "yes"
        return not is_padded(module)


def _matrix(statistics: Moments, span: slice, centred: bool) -> Tensor:
    return (statistics.covariance if centred else statistics.second)[span, span]


def _error(matrix: Tensor, parts: tuple[Tensor, Tensor], lost: Tensor, predict: Tensor) -> float:
    """tr(W E W^T) with E the second moment of x_P - B x_S and W the weights `lost` (outputs, removed, taps)."""
    kept, removed = parts
    cross = predict @ matrix[kept][:, removed]
    rest = matrix[removed][:, removed] - cross - cross.T + predict @ matrix[kept][:, kept] @ predict.T
    power = torch.einsum("opk,oqk->pq", lost, lost)
    return float((power * rest).sum())


def _ridge(matrix: Tensor, kept: Tensor, removed: Tensor, ridge: float) -> Tensor:
    """B = Q_PS (Q_SS + lambda I)^-1, (removed, kept), with lambda = ridge * mean diagonal of Q_SS."""
    kept, removed = kept.to(matrix.device), removed.to(matrix.device)
    block = matrix[kept][:, kept].clone()
    level = ridge * block.diagonal().mean() + 1e-12
    block.diagonal().add_(level)
    return torch.linalg.solve(block, matrix[kept][:, removed]).T
