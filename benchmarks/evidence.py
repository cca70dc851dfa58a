"""How much of the relevance lies on the words that make a text's class, by several ways to explain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pxcompress.attribution import attributed, parse_composite
from pxcompress.data import Source
from pxcompress.explain.metrics import mass_accuracy, rank_accuracy
from pxcompress.state import gradients
from pxcompress.types import Splits

SAMPLES = 500
RULES = {
    "LRP epsilon, AttnLRP": "epsilon|softmax=attn",
    "LRP epsilon, CP-LRP": "epsilon|softmax=cp",
    "LRP gamma": "gamma",
}
"""Name -> composite."""

Explain = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Model, packed texts and classes -> relevance of every position, (n, length)."""


def relevance(composite: str | None, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """By the rules of a composite, by gradient x input at the tokens' embeddings without."""
    parsed = None if composite is None else parse_composite(composite)
    with attributed(model, parsed, inputs[:1]) as twin, gradients():
        x = inputs.detach().clone().requires_grad_()
        logits = twin.model(x)
        (multipliers,) = torch.autograd.grad(logits, x, one_hot(targets, logits.shape[1]).to(logits))
    return (x * multipliers).sum(1).detach()


def gradient_norm(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """L2 norm of the gradient at the sum of every token's embeddings."""
    looked_up: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.dim() == 3 and len(output) == len(inputs):
            looked_up.append(output)

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks = [module.register_forward_hook(note) for module in embeddings]
    try:
        with gradients():
            logits = model(inputs.detach().clone().requires_grad_())
            (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), looked_up[0])
    finally:
        for hook in hooks:
            hook.remove()
    norms = torch.zeros(inputs.shape[0], inputs.shape[2])
    norms[:, : gradient.shape[1]] = gradient.norm(dim=2)
    return norms * (inputs[:, 1] > 0)


def by_chance(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Random relevance at every token."""
    draw = torch.Generator().manual_seed(0)
    return torch.rand(inputs.shape[0], inputs.shape[2], generator=draw) * (inputs[:, 1] > 0)


METHODS: Mapping[str, Explain] = {
    **{name: partial(relevance, composite) for name, composite in RULES.items()},
    "gradient x input": partial(relevance, None),
    "gradient norm": gradient_norm,
    "random": by_chance,
}


def evidence_rows(models: Mapping[float, nn.Module], source: Source, splits: Splits) -> Iterator[dict[str, Any]]:
    """For every model, by its share of the MACs, and every method: mass and rank accuracy, and what is conserved."""
    if source.mask is None:
        return
    batch = next(iter(splits.test))[0]
    inputs = torch.cat([inputs for inputs, _ in splits.test])[:SAMPLES] if len(batch) < SAMPLES else batch[:SAMPLES]
    masks = torch.zeros(len(inputs), inputs.shape[2], dtype=torch.bool)
    for row, name in zip(masks, splits.ids["test"], strict=False):
        mask = torch.from_numpy(source.mask(name))
        row[: len(mask)] = mask
    for size, model in models.items():
        with torch.no_grad():
            logits = model(inputs)
        targets = logits.argmax(1)
        for method, explain in METHODS.items():
            parts = zip(inputs.split(50), targets.split(50), strict=True)
            maps = torch.cat([explain(model, *pair) for pair in parts])
            logit_shares = maps.sum(1) / logits.gather(1, targets[:, None])[:, 0]
            yield {
                "size": size,
                "method": method,
                "samples": len(inputs),
                "mass_on_evidence": float(mass_accuracy(maps, masks).nan_to_num(0).mean()),
                "rank_accuracy": float(rank_accuracy(maps, masks).mean()),
                "share_of_tokens": float(masks.sum() / (inputs[:, 1] > 0).sum()),
                "median_relevance_over_logit": float(logit_shares.median()),
            }
