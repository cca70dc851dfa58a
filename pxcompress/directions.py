"""Rotates residual streams so that as many of their directions as possible can be removed.

Of all subspaces of k directions the best is sought, for every k at once: with Sigma the covariance of what layers read
of the stream and G = sum over these layers of W^T diag(w) W, w = E_x sum_p m_p^2 at their outputs, what is lost after a
fold is tr(G E), E being what the kept directions P do not predict. It is least where P spans G^1/2 U, U the first
eigenvectors of G^1/2 Sigma G^1/2; orthonormal columns in this order span all of these subspaces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pxcompress.attribution import attributed
from pxcompress.attribution.composites import parse_composite
from pxcompress.attribution.relevance import make_start
from pxcompress.graph.rotation import rotate_
from pxcompress.layout.rows import input_layouts
from pxcompress.passes.collect import power
from pxcompress.passes.moments import collect_moments
from pxcompress.types import Batches, Group

LEAST_PRICE = 1e-9
"""Smallest price of a direction, as a share of the mean price, so that unread directions have an order as well."""


def rotate_streams_(model: nn.Module, groups: Sequence[Group], batches: Batches) -> None:
    """Rotate the streams of `groups` in place, so that their directions are sorted by how much they matter.

    Two forward passes and one backward pass over `batches`, only for models that have such groups.
    """
    groups = [group for group in groups if group.kind == "direction"]
    if not groups:
        return
    for group, (covariance, price) in measure_streams(model, groups, batches):
        rotate_(model, group, find_directions(covariance, price))


def measure_streams(
    model: nn.Module, groups: Sequence[Group], batches: Batches
) -> list[tuple[Group, tuple[Tensor, Tensor]]]:
    """Covariance of values, and price of errors, for every group of directions: float64 matrices (directions,
    directions).

    The price matrix says how much an error in a direction changes the output, through all layers that read the stream.
    """
    inputs, _ = next(iter(batches))
    layouts = input_layouts(model, groups)
    inputs_of = collect_moments(model, layouts, batches)
    with attributed(model, parse_composite("epsilon"), inputs[:1]) as twin:
        prices = power(twin.model, list(layouts), batches, make_start("logit", "prediction"))
    statistics = []
    for group in groups:
        covariance, price = torch.zeros(2, group.units, group.units, dtype=torch.float64)
        for member in group.consumers:
            rows = member.index.flatten()
            weight: Tensor = model.get_submodule(member.module).weight.detach()  # type: ignore[operator]
            columns = weight.double().cpu()[:, rows]
            price += columns.T @ (prices[member.module].cpu()[:, None] * columns)
            covariance += inputs_of[member.module].whole.covariance.cpu()[rows][:, rows]
        statistics.append((group, (covariance, price)))
    return statistics


def find_directions(covariance: Tensor, price: Tensor) -> Tensor:
    """Orthonormal float64 columns (directions, directions), sorted so that keeping the first k loses least for any k.

    `covariance` and `price` are those of `measure_streams`.
    """
    level = LEAST_PRICE * price.diagonal().mean() + 1e-30
    values, vectors = torch.linalg.eigh(price + level * torch.eye(len(price), dtype=price.dtype))
    root = vectors * values.clamp_min(level).sqrt() @ vectors.T
    _, ordered = torch.linalg.eigh(root @ covariance @ root)
    return torch.linalg.qr(root @ ordered.flip(1))[0]
