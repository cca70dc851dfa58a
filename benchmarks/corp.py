"""The attention part of CORP for timm's ViTs: fewer dimensions of queries and keys, logits repaired in closed form.

After Zhang and Yang, "CORP: Closed-Form One-shot Representation-Preserving Structured Pruning for Transformers", 2026
(arXiv:2602.05243). Of each head those dimensions of queries and keys stay that carry most of the energy of the logits;
what the others add is predicted from them,

    Q_P K_P^T  ~  [Q_S, 1] D K_S^T,    D by ridge regression over all pairs of tokens of the calibration images,

so that the logits are [Q_S, 1] (I + D) K_S^T: a smaller query projection with new weights and a new bias.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from pxcompress.types import Batches, ScoredModel

RANKS = (20, 16, 12, 8, 4)
"""Dimensions of a head's queries and keys that may be left, of 24."""

RIDGES = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
"""Candidate ridges, as shares of the mean energy of a logit's parts."""


@dataclass(frozen=True)
class Grams:
    """Products of one attention's queries and of its keys, summed over the tokens of every image, float64.

    `queries` (images, heads, dim + 1, dim + 1) have a constant 1 as the last; `keys` are (images, heads, dim, dim).
    """

    queries: Tensor
    keys: Tensor

    def energies(self) -> Tensor:
        """The squared logits that each dimension makes alone, summed over pairs of tokens and images: (heads, dim)."""
        queries, keys = (gram.diagonal(dim1=-2, dim2=-1) for gram in (self.queries, self.keys))
        return (queries[..., :-1] * keys).sum(0)


class RankedAttention(nn.Module):
    """An attention whose queries and keys have fewer dimensions than its values.

    `kept` (heads, rank) are the dimensions of `dense` that stay; `maps` (heads, rank + 1, rank) are applied to what is
    left of its queries and a constant 1.
    """

    def __init__(self, dense: Attention, kept: Tensor, maps: Tensor) -> None:
        super().__init__()
        self.heads, self.rank = kept.shape
        self.scale, self.proj = dense.scale, dense.proj
        parts = torch.cat([dense.qkv.weight, dense.qkv.bias[:, None]], 1).detach().double()
        queries, keys, values = parts.unflatten(0, (3, self.heads, dense.head_dim))
        heads = torch.arange(self.heads)[:, None]
        constant = torch.eye(parts.shape[1], dtype=parts.dtype)[-1].expand(self.heads, 1, -1)
        queries = maps.mT @ torch.cat([queries[heads, kept], constant], 1)
        rows = torch.cat([part.flatten(0, 1) for part in (queries, keys[heads, kept], values)])
        self.qkv = nn.Linear(dense.qkv.in_features, len(rows))
        self.qkv.weight.data, self.qkv.bias.data = (part.to(dense.qkv.weight) for part in (rows[:, :-1], rows[:, -1]))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        widths = (self.heads * self.rank, self.heads * self.rank, self.proj.in_features)
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).split(widths, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, scale=self.scale, **options)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def find_attentions(model: nn.Module) -> dict[str, Attention]:
    """All of timm's attentions, by name; queries and keys are taken to have biases and no norm."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Attention)}


def collect_grams(model: nn.Module, batches: Batches) -> dict[str, Grams]:
    """What every attention's queries and keys are on `batches`, from one pass."""
    grams: dict[str, list[Tensor]] = defaultdict(list)

    def note(name: str, constants: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            rows = nn.functional.pad(output.double(), (0, constants), value=1.0)
            grams[name].append(rows.mT @ rows)

        return hook

    handles = []
    for name, module in find_attentions(model).items():
        handles.append(module.q_norm.register_forward_hook(note(f"{name}.q", 1)))
        handles.append(module.k_norm.register_forward_hook(note(f"{name}.k", 0)))
    with torch.no_grad():
        for inputs, _ in batches:
            model(inputs)
    for handle in handles:
        handle.remove()
    return {
        name: Grams(torch.cat(grams[f"{name}.q"]), torch.cat(grams[f"{name}.k"])) for name in find_attentions(model)
    }


def fit_maps(grams: Grams, rank: int) -> tuple[Tensor, Tensor]:
    """The dimensions of each head that stay (heads, rank), in order, and what the queries are to be mapped by.

    The ridge is what a fit to every other image does best with on the others, for all heads together.
    """
    kept = grams.energies().topk(rank).indices.sort(-1).values
    fit, check = (_equations(grams, kept, slice(start, None, 2)) for start in (0, 1))
    ridge = min(RIDGES, key=lambda ridge: _error(check, _solve(fit, ridge)))
    whole = (fit[0] + check[0], fit[1] + check[1])
    update = _solve(whole, ridge).unflatten(-1, (rank + 1, rank))
    return kept, torch.eye(rank + 1, rank, dtype=update.dtype) + update


def _equations(grams: Grams, kept: Tensor, images: slice) -> tuple[Tensor, Tensor]:
    """Normal equations of D of every head, over some images: (heads, n, n) and (heads, n), n = (rank + 1) rank."""
    matrices, sides = [], []
    for head, dims in enumerate(kept):
        queries, keys = grams.queries[images, head], grams.keys[images, head]
        removed = torch.ones(keys.shape[-1], dtype=torch.bool).index_fill(0, dims, False).nonzero()[:, 0]
        rows = torch.cat([dims, torch.tensor([keys.shape[-1]])])
        queries, keys = queries[:, rows], keys[..., dims]
        matrix = torch.einsum("nij,nkl->ikjl", queries[..., rows], keys[:, dims])
        matrices.append(matrix.flatten(2).flatten(0, 1))
        sides.append(torch.einsum("nip,npk->ik", queries[..., removed], keys[:, removed]).flatten())
    return torch.stack(matrices), torch.stack(sides)


def _solve(equations: tuple[Tensor, Tensor], ridge: float) -> Tensor:
    """D of every head, (heads, n), with `ridge` as a share of the mean of the matrix's diagonal."""
    matrix, side = equations
    level = ridge * matrix.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12
    return torch.linalg.solve(matrix + level[:, None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype), side)


def _error(equations: tuple[Tensor, Tensor], update: Tensor) -> float:
    """Squared error of the logits, up to a constant."""
    matrix, side = equations
    return float(torch.einsum("hi,hij,hj->", update, matrix, update) - 2 * (side * update).sum())


def with_ranks(model: nn.Module, batches: Batches, rank: int) -> nn.Module:
    """A copy of `model` in which queries and keys of every head have `rank` dimensions, fitted on `batches`."""
    copied, attentions = copy.deepcopy(model), find_attentions(model)
    for name, grams in collect_grams(model, batches).items():
        copied.set_submodule(name, RankedAttention(attentions[name], *fit_maps(grams, rank)))
    return copied


def price_with_ranks(scored: ScoredModel, rank: int) -> ScoredModel:
    """`scored` with a price that counts queries and keys of `rank` dimensions in all but the dense model."""
    attentions = find_attentions(scored.model)
    spared_by_head = {}
    for name, grams in collect_grams(scored.model, [(scored.example, torch.zeros(1))]).items():
        attention, tokens = attentions[name], int(grams.queries[0, 0, -1, -1])  # the sum of the constant's squares
        macs = 2 * tokens * attention.qkv.in_features + tokens**2
        spared_by_head[name] = macs * (attention.head_dim - rank)

    def meter(widths: Mapping[str, int]) -> float:
        heads = {name: widths.get(name, attention.num_heads) for name, attention in attentions.items()}
        spared = sum(heads[name] * macs for name, macs in spared_by_head.items())
        return scored.price(widths) - (spared if widths else 0)

    return replace(scored, price=replace(scored.price, meter=meter))
