"""How alike, how sparse, how well placed and how faithful heatmaps are; a number for every sample.

Maps are (n, positions), masks the same as truth values, inputs (n, channels, ...) with the positions of the map behind
the channels, or (n, positions) where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import cosine_similarity

TOP_SHARE = 0.1
"""Share of the positions that count as the top of a map."""


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine similarity; 0 where a map is 0 everywhere."""
    return cosine_similarity(first.double(), second.double(), dim=1)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's: the correlation of ranks, ties in the middle; 0 where a map is the same everywhere."""
    ranks = [torch.from_numpy(rankdata(each.cpu().numpy(), axis=1)) for each in (first, second)]
    return cosine(*(each - each.mean(1, keepdim=True) for each in ranks))


def top_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Share of the `TOP_SHARE` positions with the most relevance that both maps have in common."""
    count = math.ceil(TOP_SHARE * first.shape[1])
    return (_mask_largest(first, count) & _mask_largest(second, count)).sum(1).double() / count


SIMILARITIES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine,
    "rank_correlation": rank_correlation,
    "top_overlap": top_overlap,
}
"""Measures of how similar two explanations are; 1 for the same."""


def gini(maps: Tensor) -> Tensor:
    """Gini index of the sizes of relevances: 0 where all are the same, towards 1 where few have it all."""
    sizes = maps.double().abs().sort(1).values
    count = sizes.shape[1]
    places = torch.arange(1, count + 1, dtype=sizes.dtype, device=sizes.device)
    total = sizes.sum(1)
    index = 2 * (places * sizes).sum(1) / (count * total.masked_fill(total == 0, 1.0)) - (count + 1) / count
    return index.masked_fill(total == 0, 0.0)


def mass_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the positive relevance that lies in the mask (Arras et al. 2022); NaN where there is none."""
    positive = maps.double().clamp(min=0)
    return (positive * masks).sum(1) / positive.sum(1)


def rank_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the mask's K positions among the K with the most relevance (Arras et al. 2022); NaN for no mask."""
    hits = [int(mask[row.topk(int(mask.sum())).indices].sum()) for row, mask in zip(maps, masks, strict=True)]
    return torch.tensor(hits, dtype=torch.float64) / masks.sum(1).cpu()


def pixel_flipping(judge: Callable[[Tensor], Tensor], inputs: Tensor, maps: Tensor, steps: int = 16) -> Tensor:
    """Mean of what `judge` says of inputs (n, ...), (n,), while positions become 0, the most relevant first.

    0 is the mean of normalised images. `judge` gives numbers in [0, 1] that fall as the answer is lost. The mean is the
    area under the curve (trapezoids, from the whole input to none); less is more faithful (Samek et al. 2017). One call
    for each of `steps`, and one more.
    """
    order = maps.argsort(1, descending=True)
    shape = inputs.shape if inputs.ndim == 2 else (len(inputs), 1, *inputs.shape[2:])
    curve = []
    for step in range(steps + 1):
        keep = torch.ones_like(maps).scatter_(1, order[:, : round(maps.shape[1] * step / steps)], 0.0)
        curve.append(judge(inputs * keep.view(shape)).double())
    return torch.trapezoid(torch.stack(curve), dx=1 / steps, dim=0)


def _mask_largest(maps: Tensor, count: int) -> Tensor:
    """True at the `count` largest of each row."""
    return torch.zeros_like(maps, dtype=torch.bool).scatter_(1, maps.topk(count, 1).indices, True)
