"""Small models to fine-tune, their data, and how near two of them are."""

from __future__ import annotations

import torch
from models import batches_of, plan_of, random_plan
from models import subject as subject_named
from torch import Tensor, nn

from pxcompress.graph import prune
from pxcompress.repair import REPAIRS
from pxcompress.state import seeded
from pxcompress.types import Batch, Pruned

INPUTS, CLASSES = 6, 4


def net(width: int) -> nn.Module:
    """Two layers with normalisation on vectors; a slim one and a dense one differ in width."""
    with seeded(width):
        model = nn.Sequential(nn.Linear(INPUTS, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, CLASSES))
        nn.init.normal_(model[3].weight)
        model[1].running_mean.normal_()
    return model.eval()


def pair() -> Pruned:
    return Pruned(net(5), net(16), (), plan_of({}))


def near() -> Pruned:
    """A slim model that does almost what the dense one does: hardly any step helps."""
    pruned = Pruned(net(16), net(16), (), plan_of({}))
    with torch.no_grad():
        pruned.model[3].bias += torch.arange(CLASSES) / 100
    return pruned


def data(count: int, size: int, seed: int = 0) -> list[Batch]:
    """Drawn inputs with drawn labels."""
    with seeded(seed):
        inputs, labels = torch.randn(count, INPUTS), torch.randint(CLASSES, (count,))
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def small_cnn() -> Pruned:
    subject = subject_named("flatten_cnn")
    return prune(subject.model, subject.groups, random_plan(subject.groups, 1))


def images(count: int, size: int) -> list[Batch]:
    """For `small_cnn`."""
    with seeded(count):
        return batches_of(torch.randn(count, 3, 32, 32), size)


def tuned(
    text: str, pruned: Pruned, batches: list[Batch], held_out: list[Batch] | tuple[()] = (), seed: int = 3
) -> Pruned:
    with seeded(seed):
        return REPAIRS.build(f"finetune:{text}" if text else "finetune")(pruned, batches, held_out)


def state(pruned: Pruned) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pruned.model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def divergence(pruned: Pruned, batches: list[Batch]) -> float:
    """Mean over samples of sum_c p_c (log p_c - log q_c)."""
    inputs = torch.cat([inputs for inputs, _ in batches])
    with torch.no_grad():
        p, q = pruned.whole.dense(inputs).double().softmax(1), pruned.model(inputs).double().softmax(1)
    return float((p * (p.log() - q.log())).sum(1).mean())


def top1(pruned: Pruned, batches: list[Batch]) -> float:
    with torch.no_grad():
        right = [float((pruned.model(inputs).argmax(1) == labels).sum()) for inputs, labels in batches]
    return sum(right) / sum(len(labels) for _, labels in batches)


class Counted:
    """Counts how often a model is run."""

    def __init__(self, model: nn.Module) -> None:
        self.runs = 0
        model.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.runs += 1
