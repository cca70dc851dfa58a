"""Both models' outputs and heatmaps on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.explain.heatmaps import CHUNK, Method, explained_columns, heatmaps
from pxcompress.explain.inputs import Inputs
from pxcompress.explain.metrics import SIMILARITIES
from pxcompress.models.adapter import named_outputs
from pxcompress.state import device_of, evaluating
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.task import Outputs, Task
from pxcompress.types import Pruned

NOTICEABLE_CHANGE = 0.05
"""Change of a sample's loss from which on its answer counts as worse or better."""


@dataclass(frozen=True, eq=False)
class Views:
    """Results on n inputs, pairs for the dense and the pruned model: outputs by name, logits (n, k), and heatmaps.

    `columns` (n,) is the index of each model's largest logit. `maps` (n, ...) are heatmaps of both models for the
    dense one's largest logit, `own` those of the pruned model for its own. `agreement` (n,) is the task's, `kinds`
    has for each input one of `KINDS` or a word such as "worse".
    """

    outputs: tuple[Outputs, Outputs]
    logits: tuple[Tensor, Tensor]
    columns: tuple[Tensor, Tensor]
    maps: tuple[Tensor, Tensor]
    own: Tensor
    similarity: Mapping[str, Tensor]
    agreement: Tensor
    kinds: Sequence[str]


def make_views(pruned: Pruned, inputs: Inputs, method: Method, task: Task) -> Views:
    """Compute both models' outputs and heatmaps on `inputs`, how similar these are, and the kind of every input."""
    models = (pruned.dense, pruned.model)
    outputs = tuple(compute_outputs(model, inputs.values, task) for model in models)
    logits = tuple(_compute_logits(model, inputs.values) for model in models)
    columns, own_columns = (explained_columns(each) for each in logits)
    maps = tuple(heatmaps(model, inputs.values, columns, method) for model in models)
    own, differs = maps[1].clone(), columns != own_columns
    if differs.any():
        own[differs] = heatmaps(pruned.model, inputs.values[differs], own_columns[differs], method)
    similarity = {name: measure(*(each.flatten(1) for each in maps)) for name, measure in SIMILARITIES.items()}
    agreement = task.agreement(outputs[1], outputs[0])
    return Views(
        outputs=(outputs[0], outputs[1]),
        logits=(logits[0], logits[1]),
        columns=(columns, own_columns),
        maps=(maps[0], maps[1]),
        own=own,
        similarity=similarity,
        agreement=agreement,
        kinds=_name_kinds((outputs[0], outputs[1]), inputs.targets, agreement, task),
    )


def compute_outputs(model: nn.Module, values: Tensor, task: Task) -> Outputs:
    """All outputs of a model for `values`, by name, on the CPU."""
    with evaluating(model), torch.no_grad():
        parts = [named_outputs(model, part.to(device_of(model)), task.output_name) for part in values.split(CHUNK)]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def _compute_logits(model: nn.Module, values: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part.to(device_of(model))).cpu() for part in values.split(CHUNK)])


KINDS = {(True, True): "agreeing", (True, False): "newly wrong", (False, True): "newly right"}
"""Kind of an input by whether the dense and the pruned model are right."""

TYPICAL_KINDS = ("agreeing", "as good")
"""Kinds of inputs whose answer did not get worse or better; for these, typical inputs are shown as cases."""

CHANGED_KINDS = ("newly wrong", "newly right", "worse", "better")
"""Kinds of inputs whose answer changed."""


def _name_kinds(outputs: tuple[Outputs, Outputs], targets: Tensor | None, agreement: Tensor, task: Task) -> list[str]:
    """The kind of every input, such as "newly wrong": by right and wrong, by the task's loss, or by agreement alone."""
    if targets is None:
        return [
            "same decision" if is_same else "another decision"
            for is_same in (agreement > 1 - NOTICEABLE_CHANGE).tolist()
        ]
    results = [task.complete(task.statistics(each, targets, outputs[0])) for each in outputs]
    if isinstance(task, Classification):
        right = zip(*((each[:, 0] > 0.5).tolist() for each in results), strict=True)
        return [KINDS.get((was, now), "both wrong") for was, now in right]
    growth = task.loss(results[1]) - task.loss(results[0])
    return [
        "worse" if by > NOTICEABLE_CHANGE else "better" if by < -NOTICEABLE_CHANGE else "as good"
        for by in growth.tolist()
    ]
