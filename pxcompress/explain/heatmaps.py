"""Heatmaps: relevance at a model's input, by plain or pruned LRP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pxcompress.attribution import RelevancePruning, attributed, parse_composite
from pxcompress.errors import unknown
from pxcompress.explain.metrics import cosine, gini
from pxcompress.state import device_of, gradients

METHODS: Mapping[str, str] = {"lrp": "", "plrp-lambda": "lambda", "plrp-m": "m"}
"""Name of a method -> its variant of pruned LRP; "" for plain LRP."""

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of relevance to prune that `choose_share` tries."""

CHUNK = 32
"""Number of inputs that are propagated together."""


@dataclass(frozen=True)
class Method:
    """How heatmaps are made: one of `METHODS`, the LRP composite, and the share that pruned LRP drops."""

    name: str = "lrp"
    composite: str = "epsilon"
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise unknown("method", self.name, METHODS)
        parse_composite(self.composite)
        _ = self.pruning

    @property
    def pruning(self) -> RelevancePruning | None:
        """The setting of the LRP engine for this method's pruning; None for plain LRP."""
        return RelevancePruning(self.share, METHODS[self.name]) if METHODS[self.name] else None


def explained_columns(logits: Tensor) -> Tensor:
    """Index of the logit that is explained, (n,), for logits (n, k): the largest of each sample.

    A single number comes with its opposite as second logit (see `Adapter`); then it is always the number, index 0.
    """
    if logits.shape[1] == 2 and bool((logits[:, 0] == -logits[:, 1]).all()):
        return torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return logits.argmax(1)


def heatmaps(model: nn.Module, inputs: Tensor, targets: Tensor, method: Method) -> Tensor:
    """Relevance at `inputs` (n, channels, ...) for the classes `targets` (n,), summed over channels: (n, ...).

    It starts as the logit of the class. Inputs (n, features) have no channels: every feature has its relevance.
    """
    device, maps = device_of(model), []
    with attributed(model, parse_composite(method.composite), inputs[:1], method.pruning) as twin:
        for part, target in zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True):
            x = part.detach().to(device).requires_grad_()
            with gradients():
                logits = twin.model(x)
                (m,) = torch.autograd.grad(logits, x, one_hot(target.to(device), logits.shape[1]).to(logits))
            maps.append((x * m).detach().cpu())
    relevance = torch.cat(maps)
    return relevance.sum(1) if relevance.ndim > 2 else relevance


def choose_share(model: nn.Module, inputs: Tensor, targets: Tensor, name: str, composite: str) -> float:
    """The share of pruned relevance with the best trade: argmax over `SHARES` of (G_p - G_0) / (1 - G_0) - (1 - cos_p).

    G_p is the mean Gini index of the maps with share p, so that the first term is the part of the sparsity that was
    missing; cos_p is the mean cosine similarity to plain LRP, so that the second is what it costs. 0 where no share
    gains more than it costs, and for a method that prunes nothing.
    """
    if not METHODS[name]:
        return 0.0
    lrp_maps = heatmaps(model, inputs, targets, Method("lrp", composite)).flatten(1)
    gain_by_share = {0.0: 0.0}
    for share in SHARES:
        gain_by_share[share] = trade_off(
            heatmaps(model, inputs, targets, Method(name, composite, share)).flatten(1), lrp_maps
        )
    return max(gain_by_share, key=lambda share: gain_by_share[share])


def trade_off(maps: Tensor, lrp_maps: Tensor) -> float:
    """Gain of sparsity minus loss of similarity, as in `choose_share`; both maps are (n, positions)."""
    lrp_sparsity = float(gini(lrp_maps).mean())
    return (float(gini(maps).mean()) - lrp_sparsity) / (1 - lrp_sparsity) - (1 - float(cosine(maps, lrp_maps).mean()))
