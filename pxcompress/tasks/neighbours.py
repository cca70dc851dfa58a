"""The task "neighbours": embeddings of samples without labels, such as texts for search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pxcompress.proof import Metric
from pxcompress.tasks import TASKS
from pxcompress.tasks.embedding import Embedding
from pxcompress.tasks.task import Outputs


@TASKS.register("neighbours")
@dataclass(frozen=True)
class Neighbours(Embedding):
    """A vector for each sample, compared by direction; judged without targets, by each sample's nearest neighbour.

    The metric is the share of samples whose nearest other sample is the same as with the dense model.
    """

    metric = Metric("same nearest", binary=True)
    layouts = ("unlabelled",)
    reads_dense = True

    def statistics(self, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
        """The normalised embeddings of each sample by the model and by the dense model, (n, 2 * features)."""
        return torch.cat([normalize(self.vectors(each).double(), dim=1) for each in (outputs, dense)], 1)

    def complete(self, statistics: Tensor) -> Tensor:
        """Whether the nearest other sample is the same as with the dense model, (n, 1)."""
        nearest = []
        for vectors in statistics.chunk(2, 1):
            similarity = vectors @ vectors.T
            similarity.fill_diagonal_(-torch.inf)
            nearest.append(similarity.argmax(1))
        return (nearest[0] == nearest[1]).double()[:, None]
