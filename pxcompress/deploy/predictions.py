"""How files and models decide on samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pxcompress.deploy.session import Array, Session
from pxcompress.errors import DataError, ModelError
from pxcompress.processes import summed
from pxcompress.proof import ClassChange
from pxcompress.state import device_of, evaluating
from pxcompress.types import Batches

Classes = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a file `decided` on samples, and their `labels`, both (n,).

    `broken` counts samples with logits that are not finite; `max_abs` is the largest difference of a logit to that of
    a reference.
    """

    decided: Classes
    labels: Classes
    broken: int = 0
    max_abs: float = 0.0

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.labels)

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Which of them are right, (n,)."""
        found: npt.NDArray[np.bool_] = self.decided == self.labels
        return found

    @property
    def top1(self) -> float:
        """Share in [0, 1]."""
        return float(self.right.mean())

    def agreement(self, other: Predictions) -> float:
        """Share of the samples on which both decide alike."""
        return float((self.decided == other.decided).mean())


def answers(sessions: Mapping[str, Session], reference: str, batches: Batches) -> dict[str, Predictions]:
    """How every session decides on `batches`, and how far it is from the one named `reference`."""
    found: dict[str, list[Predictions]] = {name: [] for name in sessions}
    for inputs, labels in batches:
        logits = {name: session.predict(inputs) for name, session in sessions.items()}
        for name, values in logits.items():
            found[name].append(_answers(values, logits[reference], labels.cpu().numpy()))
    if not any(batch.samples for batch in found[reference]):
        raise DataError("no samples to measure accuracy on; expected at least one")
    return {name: _together(of) for name, of in found.items()}


def _answers(logits: Array, reference: Array, labels: Classes) -> Predictions:
    """Of one batch: logits (n, classes), labels (n,)."""
    with np.errstate(invalid="ignore"):  # infinity less infinity; `broken` counts them
        difference = float(np.abs(logits - reference).max())
    return Predictions(logits.argmax(1), labels, int((~np.isfinite(logits).all(1)).sum()), difference)


def _together(batches: Sequence[Predictions]) -> Predictions:
    return Predictions(
        np.concatenate([batch.decided for batch in batches]),
        np.concatenate([batch.labels for batch in batches]),
        sum(batch.broken for batch in batches),
        max(batch.max_abs for batch in batches),
    )


def class_changes(dense: Predictions, pruned: Predictions, names: Sequence[str]) -> tuple[ClassChange, ...]:
    """What became of every class that the samples have, in the order of the `names` of all."""
    found = []
    for number, name in enumerate(names):
        before, after = (answers.right[answers.labels == number] for answers in (dense, pruned))
        if len(before):
            found.append(ClassChange(name, len(before), *(int(of.sum()) for of in (before, after, before & after))))
    return tuple(found)


def torch_accuracy(model: nn.Module, batches: Batches) -> float:
    """Top-1 accuracy of a PyTorch model in eval mode on its device, a share in [0, 1]; `model` is left as it was.

    In several processes each has its own batches; the share is that of all samples. Raises `ModelError` for outputs
    that are NaN or infinite.
    """
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        pairs = ((_decided(model(inputs.to(device))), labels.cpu().numpy()) for inputs, labels in batches)
        right, total = summed(torch.tensor(_counts(pairs), dtype=torch.float64, device=device)).tolist()
    return _share(right, total)


def _decided(logits: Tensor) -> npt.NDArray[np.int64]:
    """Classes (n,) with the largest of `logits` (n, classes)."""
    if broken := int((~logits.isfinite().all(1)).sum()):
        raise ModelError(
            f"the model returns NaN or infinity for {broken} of {len(logits)} samples; check its weights and its inputs"
        )
    return logits.argmax(1).cpu().numpy()


def _counts(pairs: Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> tuple[int, int]:
    """How many of (predicted, labels) agree, and how many there are."""
    right = total = 0
    for predicted, labels in pairs:
        right += int((predicted == labels).sum())
        total += len(labels)
    return right, total


def _share(right: float, total: float) -> float:
    if not total:
        raise DataError("no samples to measure accuracy on; expected at least one")
    return right / total
