"""From activations and multipliers to one number a unit: where backward starts, and how samples are put together.

Everything here works on any backward pass: with LRP's rules attached the multipliers are LRP's, without they are
gradients (Taylor). Relevance of a unit is R = sum over its positions p of a_p m_p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pxcompress.attribution import attributed, parse_composite
from pxcompress.errors import InputError
from pxcompress.passes.collect import Start, Statistic, collect, unit_means
from pxcompress.state import device_of
from pxcompress.types import Batch, Batches, Group, Scores


def _start_at_logit(logits: Tensor, target: Tensor) -> Tensor:
    return one_hot(target, logits.shape[1]).to(logits)


def _start_at_one(logits: Tensor, target: Tensor) -> Tensor:
    """Multipliers (n, classes) with which the target starts with relevance 1: 1 / logit at the target, else 0."""
    value = logits.gather(1, target[:, None])
    return _start_at_logit(logits, target) / torch.where(value.abs() < 1e-6, torch.full_like(value, 1e-6), value)


def _start_at_probability(logits: Tensor, target: Tensor) -> Tensor:
    """Multipliers with which the target starts with a relevance equal to its probability."""
    return _start_at_one(logits, target) * logits.softmax(1).gather(1, target[:, None])


def _start_at_margin(logits: Tensor, target: Tensor) -> Tensor:
    """Multipliers that are the gradient of the target's logit minus the log-sum-exp of the others."""
    hit = _start_at_logit(logits, target)
    return hit - (logits.masked_fill(hit.bool(), -torch.inf)).softmax(1)


def _start_at_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Multipliers that are the gradient of the cross-entropy."""
    return logits.softmax(1) - _start_at_logit(logits, target)


STARTS: Mapping[str, Start] = {
    "logit": _start_at_logit,
    "one": _start_at_one,
    "probability": _start_at_probability,
    "margin": _start_at_margin,
    "loss": _start_at_loss,
}
"""Functions from logits (n, classes) and targets (n,) to multipliers (n, classes).

"logit" starts with the logit itself.
"""


@dataclass(frozen=True)
class Aggregate:
    """How relevances (n, units) become one score a unit: `each` before the mean over samples, then `mean`."""

    each: Callable[[Tensor], Tensor]
    mean: Callable[[Tensor], Tensor]


def _identity(value: Tensor) -> Tensor:
    return value


AGGREGATES: Mapping[str, Aggregate] = {
    "abs": Aggregate(torch.abs, _identity),
    "signed": Aggregate(_identity, _identity),
    "abs-mean": Aggregate(_identity, torch.abs),
    "squared": Aggregate(torch.square, _identity),
}
"""Ways to put relevances R of samples together: mean |R|, mean R, |mean R| and mean R^2."""


@dataclass(frozen=True)
class BatchesForAllClasses:
    """Batches in which every sample occurs once for each class, with that class as its label; for the target "all"."""

    batches: Batches
    classes: int

    def __iter__(self) -> Iterator[Batch]:
        for inputs, labels in self.batches:
            every = torch.arange(self.classes, device=labels.device)
            for part, count in zip(inputs.split(8), labels.split(8), strict=True):
                yield part.repeat_interleave(self.classes, 0), every.repeat(len(count))


def make_start(start: str, target: str) -> Start:
    """A function from logits and labels to multipliers: at the label, or for target "prediction" at the predicted
    class.
    """

    def multipliers(logits: Tensor, labels: Tensor) -> Tensor:
        return STARTS[start](logits, logits.argmax(1) if target == "prediction" else labels)

    return multipliers


def mean_unit_statistic(
    model: nn.Module, groups: Sequence[Group], batches: Batches, statistic: Statistic, composite: str | None = "epsilon"
) -> Scores:
    """Scores: the mean over samples, and over the tensors of a residual stream, of `statistic` for each unit.

    `statistic` gets activations and LRP multipliers by the rules of `composite`, from the logit of the predicted class;
    None means plain gradients. One forward and one backward pass, with LRP on a copy with BatchNorm folded.
    """
    start = make_start("logit", "prediction")
    inputs, _ = next(iter(batches))
    with attributed(model, parse_composite(composite) if composite else None, inputs[:1]) as twin:
        return unit_means(twin.model, groups, batches, statistic, start)


def unit_relevance(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Batches,
    start: Start,
    *,
    aggregate: str = "abs",
    centre: bool = False,
) -> Scores:
    """Relevance of every unit, averaged over samples and, on a residual stream, over the tensors that carry it.

    With `centre` activations count as differences from their mean over the batches, (a - mean_c) m: what a unit
    carries beyond a constant; that takes one more forward pass.
    """
    rule = AGGREGATES[aggregate]
    origin = collect(model, groups, batches, lambda a, m: a.mean(2)) if centre else None
    relevances = collect(model, groups, batches, lambda a, m: rule.each((a * m).sum(2)), start, origin)
    return {name: rule.mean(values).mean(0).float() for name, values in relevances.items()}


PRECISIONS: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions in which autocast may compute products, by name."""

TOLERANCE = 1e-2
"""Largest relative L2 deviation, over all units of all groups, from float32 that scores under autocast may have."""


def relative_error(scores: Scores, exact: Scores) -> float:
    """|scores - exact| / |exact|, with the L2 norm over all units of all groups."""
    approximate, reference = (torch.cat([values.double() for values in each.values()]) for each in (scores, exact))
    return float((approximate - reference).norm() / reference.norm())


def score_in_precision(name: str, model: nn.Module, score: Callable[[Batches], Scores], batches: Batches) -> Scores:
    """`score(batches)` computed in the precision `name`: "none" for the model's own, else one of `PRECISIONS`.

    The first batch is scored both ways; raises `InputError` where the deviation from float32 exceeds `TOLERANCE`.
    """
    if name == "none":
        return score(batches)
    first_batch = [next(iter(batches))]
    exact = score(first_batch)
    with torch.autocast(device_of(model).type, PRECISIONS[name]):
        error = relative_error(score(first_batch), exact)
        if not error <= TOLERANCE:  # also for a deviation that is not a number
            raise InputError(
                f"autocast={name} changes the scores by {error:.1%} on the first batch; expected at most "
                f"{TOLERANCE:.0%} from float32: use autocast=none or another precision"
            )
        return score(batches)
