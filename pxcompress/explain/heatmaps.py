"""Relevance at a model's input: what an explanation shows, plain or pruned."""

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
"""Name of a method -> its variant of pruned LRP, "" for plain LRP."""

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Candidate shares of pruned relevance, from which `choose_share` chooses."""

CHUNK = 32
"""Inputs that are propagated together."""


@dataclass(frozen=True)
class Method:
    """How relevance is found: one of `METHODS`, the composite's rules, and the share that pruned LRP drops."""

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
        """The pruning of relevance for the LRP engine; None for plain LRP."""
        return RelevancePruning(self.share, METHODS[self.name]) if METHODS[self.name] else None


def explained_columns(logits: Tensor) -> Tensor:
    """The columns of logits (n, k) that are explained, (n,): the largest of each sample.

    Of a single number, beside which its opposite stands (`Adapter`), it is always the number itself.
    """
    if logits.shape[1] == 2 and bool((logits[:, 0] == -logits[:, 1]).all()):
        return torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return logits.argmax(1)


def heatmaps(model: nn.Module, inputs: Tensor, targets: Tensor, method: Method) -> Tensor:
    """Relevance of the classes `targets` (n,) at `inputs` (n, channels, ...), channels added up: (n, ...).

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
    """The share whose sparsity gain is worth most: argmax over `SHARES` of (G_p - G_0) / (1 - G_0) - (1 - cos_p).

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
    """Sparsity gained less similarity lost, as `choose_share` says; both (n, positions)."""
    lrp_sparsity = float(gini(lrp_maps).mean())
    return (float(gini(maps).mean()) - lrp_sparsity) / (1 - lrp_sparsity) - (1 - float(cosine(maps, lrp_maps).mean()))
