"""The task "embedding": vectors whose directions are compared, for retrieval and recognition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from pxcompress.proof import Metric
from pxcompress.registry import option
from pxcompress.tasks import TASKS
from pxcompress.tasks.answer import Answer
from pxcompress.tasks.task import Layout, Outputs, Task, pick_output


@TASKS.register("embedding")
@dataclass(frozen=True)
class Embedding(Task):
    """A vector for each sample, compared by direction; judged by recall@1.

    That is how often the nearest other sample has the same label. Feature maps (n, channels, height, width) count as
    the mean over their positions.
    """

    output: str = option("embedding", "name of the output with the embedding; else the first (n, features)")

    metric = Metric("recall@1", binary=True)
    layouts: ClassVar[tuple[Layout, ...]] = ("classes", "identities")
    reads_dense = False
    output_name = "embedding"
    subject = "the embedding"

    def logits(self, outputs: Outputs) -> Tensor:
        """Length of each embedding, (n,), with its direction held constant."""
        vectors = self.vectors(outputs)
        direction = vectors.detach()
        return (vectors * direction).sum(1) / direction.square().sum(1).sqrt().clamp_min(1e-12)

    def statistics(self, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
        """The normalised embedding and the label of each sample, (n, features + 1)."""
        return torch.cat([normalize(self.vectors(outputs).double(), dim=1), targets.double()[:, None]], 1)

    def complete(self, statistics: Tensor) -> Tensor:
        """Whether the nearest other sample has the same label, (n, 1)."""
        vectors, labels = statistics[:, :-1], statistics[:, -1]
        similarity = vectors @ vectors.T
        similarity.fill_diagonal_(-torch.inf)
        return (labels[similarity.argmax(1)] == labels).double()[:, None]

    def agreement(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """Cosine of both models' embeddings of each sample, (n,); 0 if it is negative."""
        return self._cosine(outputs, dense).clamp(0, 1)

    def divergence(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """1 minus the cosine of both models' embeddings, (n,)."""
        return (1 - self._cosine(outputs, dense)).clamp_min(0)

    def answer(self, outputs: Outputs, classes: Sequence[str], size: tuple[int, int] | None = None) -> Answer:
        """A text on the size of the embedding, since its numbers mean nothing by themselves."""
        return Answer(f"a vector of {self.vectors(outputs).shape[1]} numbers")

    def _cosine(self, outputs: Outputs, dense: Outputs) -> Tensor:
        return cosine_similarity(self.vectors(outputs).double(), self.vectors(dense).double())

    def vectors(self, outputs: Outputs) -> Tensor:
        """The embeddings among the outputs, (n, features)."""
        maps = [value for value in outputs.values() if value.dim() == 4]
        if maps and self.output not in outputs:
            return maps[-1].mean((2, 3))
        value = outputs.get(self.output)
        if value is not None and value.dim() == 4:
            return value.mean((2, 3))
        return pick_output(outputs, self.output, 2, "embeddings (n, features)")
