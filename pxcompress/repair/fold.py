"""Folds what removed units carried into the remaining ones, in closed form, without labels or training.

The removed inputs P of a layer are predicted from the kept ones S, x_P = B x_S + c, by ridge regression on the dense
model's moments; its weights take the prediction over: W_S += W_P B, bias += W_P c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pxcompress.layout.consumers import Consumer, add_, find_consumers, is_padded
from pxcompress.layout.rows import complement
from pxcompress.passes.moments import InputMoments, Moments, collect_moments
from pxcompress.passes.ridges import RIDGES, USUAL, choose_ridge
from pxcompress.registry import option
from pxcompress.repair import REPAIRS
from pxcompress.types import Batches, Phase, Pruned, Repair


@REPAIRS.register("fold")
@dataclass(frozen=True)
class Fold(Repair):
    """Predict removed inputs from kept ones by ridge regression, and fold the prediction into the next layers'
    weights.
    """

    phase: ClassVar[Phase] = "absorb"

    ridge: float = option(
        0.0,
        "ridge, as a share of the mean variance of the kept inputs; 0: the best by cross-validation",
        low=0.0,
        high=10.0,
    )
    centred: str = option(
        "auto",
        "yes: predict differences from the mean, and adapt the bias; no: predict the inputs themselves, which is exact "
        "at zero-padded borders; auto: no for layers with padding",
        choices=("auto", "yes", "no"),
    )

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """Change the weights of all layers that lost inputs, from one pass of the dense model over `batches`."""
        layers = find_consumers(pruned)
        inputs_of = collect_moments(pruned.dense, {layer.name: layer.layout for layer in layers}, batches)
        for layer in layers:
            weight, bias = self._delta(layer, inputs_of[layer.name])
            add_(layer.slim, weight[layer.outputs], None if bias is None else bias[layer.outputs])
        return pruned

    def _delta(self, layer: Consumer, input_moments: InputMoments) -> tuple[Tensor, Tensor | None]:
        """The change of the kept weights (outputs, inputs, ...) and, if means are subtracted, of the bias
        (outputs,).
        """
        weight: Tensor = layer.dense.weight  # type: ignore[assignment]
        features, taps = layer.layout.shape
        is_centred = self._is_centred(layer.dense)
        parts, shifts = [], []
        conv_groups = getattr(layer.dense, "groups", 1)
        width = features // conv_groups
        for place, part in enumerate(weight.detach().double().chunk(conv_groups)):
            span = slice(place * width, (place + 1) * width)
            inside = layer.removed[(layer.removed >= span.start) & (layer.removed < span.stop)] - span.start
            removed_weights = part.reshape(part.shape[0], width, -1)[:, inside]
            kept_features = complement(width, inside)
            ridge = self.ridge or self._best_ridge(
                input_moments, span, (kept_features, inside), removed_weights, is_centred
            )
            predict = _solve_ridge(
                _second_moments(input_moments.whole, input_moments.whole, span, is_centred),
                kept_features,
                inside,
                ridge,
            )
            parts.append(torch.einsum("opk,ps->osk", removed_weights, predict))
            mean = input_moments.whole.mean[span]
            shifts.append(torch.einsum("opk,p->o", removed_weights, mean[inside] - predict @ mean[kept_features]))
        delta = torch.cat(parts)
        kernel = weight.shape[2:] if taps == 1 else torch.Size()
        weight_delta = delta.reshape(weight.shape[0], delta.shape[1:].numel() // kernel.numel(), *kernel)
        return weight_delta.to(weight.dtype), torch.cat(shifts).to(weight.dtype) if is_centred else None

    def _best_ridge(
        self,
        input_moments: InputMoments,
        span: slice,
        parts: tuple[Tensor, Tensor],
        removed_weights: Tensor,
        is_centred: bool,
    ) -> float:
        """The ridge strength with the least output error on the half of the samples that the regression is not fitted
        to.
        """
        if not input_moments.folds:
            return RIDGES[USUAL]
        fit, check = input_moments.folds[0]
        matrices = _second_moments(fit, fit, span, is_centred), _second_moments(check, fit, span, is_centred)
        return choose_ridge(
            lambda ridge: _output_error(matrices[1], parts, removed_weights, _solve_ridge(matrices[0], *parts, ridge))
        )

    def _is_centred(self, module: nn.Module) -> bool:
        if self.centred != "auto":
            return self.centred == "yes"
        return not is_padded(module)


def _second_moments(moments: Moments, fit: Moments, span: slice, is_centred: bool) -> Tensor:
    """Second moments of the features in `span`, around the mean of `fit` if `is_centred`, else around zero."""
    return (moments.around(fit.mean) if is_centred else moments.second)[span, span]


def _output_error(matrix: Tensor, parts: tuple[Tensor, Tensor], removed_weights: Tensor, predict: Tensor) -> float:
    """Mean squared error of a layer's outputs, tr(W E W^T), when removed inputs are predicted as `predict` @ kept.

    E is the second moment of x_P - B x_S, with P the removed and S the kept features, and W the `removed_weights`
    (outputs, removed, taps).
    """
    kept_features, removed_features = parts
    cross = predict @ matrix[kept_features][:, removed_features]
    residual = (
        matrix[removed_features][:, removed_features]
        - cross
        - cross.T
        + predict @ matrix[kept_features][:, kept_features] @ predict.T
    )
    power = torch.einsum("opk,oqk->pq", removed_weights, removed_weights)
    return float((power * residual).sum())


def _solve_ridge(matrix: Tensor, kept_features: Tensor, removed_features: Tensor, ridge: float) -> Tensor:
    """The regression B = Q_PS (Q_SS + lambda I)^-1, (removed, kept), with lambda = ridge * mean diagonal of Q_SS."""
    kept_features, removed_features = kept_features.to(matrix.device), removed_features.to(matrix.device)
    block = matrix[kept_features][:, kept_features].clone()
    level = ridge * block.diagonal().mean() + 1e-12
    block.diagonal().add_(level)
    factor, info = torch.linalg.cholesky_ex(block)
    cross = matrix[kept_features][:, removed_features]
    return (torch.linalg.solve(block, cross) if info else torch.cholesky_solve(cross, factor)).T
