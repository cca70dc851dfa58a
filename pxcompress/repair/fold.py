"""Fold what the removed units carried into the ones that stay: closed form, no labels, no training.

The removed inputs P of a layer are predicted from the kept ones S, x_P = B x_S + c, by ridge regression on the dense
model's moments; its weights take the prediction over: W_S += W_P B, bias += W_P c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.collect import Moments, input_layouts, members_by_module, moments, others, removed_rows
from pxcompress.registry import option
from pxcompress.repair import REPAIRS
from pxcompress.types import Batches, Group, Member, Plan, Pruned

Owners = Sequence[tuple[Group, Member]]


@REPAIRS.register("fold")
@dataclass(frozen=True)
class Fold:
    """Ridge prediction of removed inputs from kept ones, folded into every consumer's weights."""

    ridge: float = option(
        1e-3, "ridge, as a share of the mean variance of the kept inputs", low=0.0, high=1.0, log=True
    )
    centred: str = option(
        "auto",
        "predict around the mean (a bias takes it up), around zero (exact at zero-padded borders), or by padding",
        choices=("auto", "yes", "no"),
    )

    def __call__(self, pruned: Pruned, batches: Batches) -> Pruned:
        """Fold into all consumers of pruned groups; moments come from one pass of the dense model over `batches`."""
        consumers = {
            name: owners
            for name, owners in members_by_module(pruned.groups, "in").items()
            if len(removed_rows(owners, pruned.plan))
        }
        layouts = input_layouts(pruned.dense, pruned.groups)
        found = moments(pruned.dense, {name: layouts[name] for name in consumers}, batches)
        producers = members_by_module(pruned.groups, "out")
        for name, owners in consumers.items():
            dense, slim = pruned.dense.get_submodule(name), pruned.model.get_submodule(name)
            features = _removed_features(owners, pruned.plan, layouts[name])
            weight, bias = self._delta(dense, found[name], features, layouts[name])
            outputs = others(weight.shape[0], removed_rows(producers.get(name, ()), pruned.plan)).to(weight.device)
            _add(slim, weight[outputs], None if bias is None else bias[outputs])
        return pruned

    def _delta(
        self, module: nn.Module, statistics: Moments, removed: Tensor, layout: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What to add to the kept weights (outputs, inputs, ...) and, if centred, to the bias (outputs,)."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        taps = layout.shape[1]
        centred = self._is_centred(module)
        matrix = statistics.covariance if centred else statistics.second
        parts, shifts = [], []
        conv_groups = getattr(module, "groups", 1)
        width = layout.shape[0] // conv_groups
        for place, part in enumerate(weight.detach().double().chunk(conv_groups)):
            inside = removed[(removed >= place * width) & (removed < (place + 1) * width)] - place * width
            span = slice(place * width, (place + 1) * width)
            kept = others(width, inside)
            block, mean = matrix[span, span], statistics.mean[span]
            predict = _ridge(block, kept, inside, self.ridge)
            part = part.reshape(part.shape[0], width, -1)
            parts.append(torch.einsum("opk,ps->osk", part[:, inside], predict))
            constant = mean[inside] - predict @ mean[kept]
            shifts.append(torch.einsum("opk,p->o", part[:, inside], constant))
        delta = torch.cat(parts)
        kernel = weight.shape[2:] if taps == 1 else ()
        shaped = delta.reshape(weight.shape[0], -1, *kernel)
        return shaped.to(weight.dtype), torch.cat(shifts).to(weight.dtype) if centred else None

    def _is_centred(self, module: nn.Module) -> bool:
        if self.centred != "auto":
            return self.centred == "yes"
        padding = getattr(module, "padding", 0)
        return not isinstance(padding, str) and not any(padding if isinstance(padding, tuple) else (padding,))


def _removed_features(owners: Owners, plan: Plan, layout: Tensor) -> Tensor:
    """Which features of `layout` the plan removes, ascending."""
    rows = removed_rows(owners, plan)
    return torch.isin(layout[:, 0], rows).nonzero().flatten()


def _ridge(matrix: Tensor, kept: Tensor, removed: Tensor, ridge: float) -> Tensor:
    """B = Q_PS (Q_SS + lambda I)^-1, (removed, kept), with lambda = ridge * mean diagonal of Q_SS."""
    kept, removed = kept.to(matrix.device), removed.to(matrix.device)
    block = matrix[kept][:, kept].clone()
    level = ridge * block.diagonal().mean() + 1e-12
    block.diagonal().add_(level)
    return torch.linalg.solve(block, matrix[kept][:, removed]).T


def _add(module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Add to a layer's parameters in place; a layer without bias gets one when there is something to add."""
    with torch.no_grad():
        module.weight += weight  # type: ignore[operator]
        if bias is None:
            return
        if module.bias is None:
            module.bias = nn.Parameter(bias.clone(), requires_grad=module.weight.requires_grad)
        else:
            module.bias += bias  # type: ignore[operator]
