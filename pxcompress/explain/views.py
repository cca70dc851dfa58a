"""What both models say of the same inputs: their decisions, and the maps that explain them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.explain.heatmaps import CHUNK, Method, heatmaps
from pxcompress.explain.inputs import Inputs
from pxcompress.explain.metrics import SIMILARITIES
from pxcompress.state import device_of
from pxcompress.types import Pruned


@dataclass(frozen=True, eq=False)
class Views:
    """Both models' results on every input: logits (n, classes), and heatmaps (n, ...) for the dense model's class.

    `own` are the pruned model's maps of its own class.
    """

    logits: tuple[Tensor, Tensor]
    maps: tuple[Tensor, Tensor]
    own: Tensor
    similarity: Mapping[str, Tensor]
    kinds: Sequence[str]

    @property
    def decisions(self) -> tuple[Tensor, Tensor]:
        """Predicted classes, (n,)."""
        return self.logits[0].argmax(1), self.logits[1].argmax(1)


def make_views(pruned: Pruned, inputs: Inputs, method: Method) -> Views:
    """Both models' logits and maps, how alike those are, and of which kind every input is."""
    logits = tuple(_compute_logits(model, inputs.values) for model in (pruned.dense, pruned.model))
    targets, decisions = (each.argmax(1) for each in logits)
    maps = tuple(heatmaps(model, inputs.values, targets, method) for model in (pruned.dense, pruned.model))
    maps_of_pruned, decision_differs = maps[1].clone(), targets != decisions
    if decision_differs.any():
        maps_of_pruned[decision_differs] = heatmaps(
            pruned.model, inputs.values[decision_differs], decisions[decision_differs], method
        )
    similarity = {name: measure(*(each.flatten(1) for each in maps)) for name, measure in SIMILARITIES.items()}
    return Views(
        (logits[0], logits[1]), (maps[0], maps[1]), maps_of_pruned, similarity, _name_kinds(logits, inputs.labels)
    )


def _compute_logits(model: nn.Module, values: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part.to(device_of(model))).cpu() for part in values.split(CHUNK)])


KINDS = {(True, True): "agreeing", (True, False): "newly wrong", (False, True): "newly right"}
"""Whether dense and pruned are right -> kind of an input."""


def _name_kinds(logits: Sequence[Tensor], labels: Tensor | None) -> list[str]:
    dense, pruned = (each.argmax(1) for each in logits)
    if labels is None:
        return ["same decision" if is_same else "another decision" for is_same in (dense == pruned).tolist()]
    right = zip((dense == labels).tolist(), (pruned == labels).tolist(), strict=True)
    return [KINDS.get(pair, "both wrong") for pair in right]
