"""Measures of heatmaps (n, positions): similarity, sparsity, localisation and faithfulness, one number a sample.

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
"""Share of the positions that count as the top of a heatmap."""


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine similarity of heatmaps, (n,); 0 where a map is all zeros."""
    return cosine_similarity(first.double(), second.double(), dim=1)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of heatmaps, (n,); ties get their mean rank; 0 where a map is constant."""
    ranks = [torch.from_numpy(rankdata(each.cpu().numpy(), axis=1)) for each in (first, second)]
    return cosine(*(each - each.mean(1, keepdim=True) for each in ranks))


def top_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Share of the top positions (`TOP_SHARE`, by relevance) that both maps have in common, (n,)."""
    count = math.ceil(TOP_SHARE * first.shape[1])
    return (_mask_largest(first, count) & _mask_largest(second, count)).sum(1).double() / count


SIMILARITIES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine,
    "rank_correlation": rank_correlation,
    "top_overlap": top_overlap,
}
"""Measures of similarity of two heatmaps, by name; each is 1 for equal maps."""


def gini(maps: Tensor) -> Tensor:
    """Gini index of absolute relevance, (n,): 0 if spread evenly, near 1 if few positions have it all."""
    sizes = maps.double().abs().sort(1).values
    count = sizes.shape[1]
    places = torch.arange(1, count + 1, dtype=sizes.dtype, device=sizes.device)
    total = sizes.sum(1)
    index = 2 * (places * sizes).sum(1) / (count * total.masked_fill(total == 0, 1.0)) - (count + 1) / count
    return index.masked_fill(total == 0, 0.0)


def mass_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of the positive relevance inside the mask, (n,) (Arras et al. 2022); NaN without positive relevance."""
    positive = maps.double().clamp(min=0)
    return (positive * masks).sum(1) / positive.sum(1)


def rank_accuracy(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of a mask's K positions that are among the K most relevant, (n,) (Arras et al.

    2022); NaN for an empty mask.
    """
    hits = [int(mask[row.topk(int(mask.sum())).indices].sum()) for row, mask in zip(maps, masks, strict=True)]
    return torch.tensor(hits, dtype=torch.float64) / masks.sum(1).cpu()


def pixel_flipping(judge: Callable[[Tensor], Tensor], inputs: Tensor, maps: Tensor, steps: int = 16) -> Tensor:
    """Mean of `judge` on inputs (n, ...), (n,), while positions are set to 0, the most relevant first.

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
    """Boolean mask that is True at the `count` largest values of each row."""
    return torch.zeros_like(maps, dtype=torch.bool).scatter_(1, maps.topk(count, 1).indices, True)
