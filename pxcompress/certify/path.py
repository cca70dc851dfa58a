"""Which model of a frozen path is good enough, with a known chance of error: Learn then Test on arrays of losses.

    outputs -> losses() -> Candidate ... -> certify(candidates, RiskLimit) -> Certificate -> sentence()

With probability at least 1 - delta over the draw of the calibration samples, the risk of the chosen model is at most
alpha. It needs independent samples that chose nothing else: neither the path, nor a threshold, nor a repair. Only NumPy
and SciPy, so that anybody can check it; the statistics are in `learn_then_test`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pxcompress.certify.learn_then_test import BOUNDS, Array, first_whole, fixed_sequence
from pxcompress.choices import LOSS_RISKS
from pxcompress.errors import DataError, InputError, unknown

# --- risks: outputs of the dense and of the pruned model -> one loss a sample ---------------------------------------


@dataclass(frozen=True)
class Risk:
    """A loss per sample whose mean is to stay at or below alpha.

    `function` maps predicted classes (dense, pruned, labels), each (n,), to losses (n,) in [low, high]; for
    `LOSS_RISKS`, which hold for any task, losses in [0, 1] of the dense and the pruned model's outputs. `bound` names
    the p-value, one of `BOUNDS`; `promise` is the sentence with {alpha} and {scope} left open. `zero_where_equal` says
    that the loss is 0 wherever both models answer alike, whatever the label is.
    """

    function: Callable[[Array, Array, Array], Array]
    needs_labels: bool
    bound: str
    promise: str
    low: float = 0.0
    high: float = 1.0
    zero_where_equal: bool = True


RISKS: dict[str, Risk] = {
    "negative-flips": Risk(
        lambda dense, pruned, labels: (dense == labels) & (pruned != labels),
        needs_labels=True,
        bound="binomial",
        promise="at most {alpha} of {scope} turn from right to wrong",
    ),
    "disagreement": Risk(
        lambda dense, pruned, labels: dense != pruned,
        needs_labels=False,
        bound="binomial",
        promise="at most {alpha} of {scope} differ from the dense model's",
    ),
    "accuracy-drop": Risk(
        lambda dense, pruned, labels: (dense == labels) * 1.0 - (pruned == labels),
        needs_labels=True,
        bound="betting",
        promise="the accuracy over {scope} is at most {alpha} (absolute) below the dense model's",
        low=-1.0,
    ),
    "top1-error": Risk(
        lambda dense, pruned, labels: pruned != labels,
        needs_labels=True,
        bound="binomial",
        promise="at most {alpha} of {scope} are wrong",
        zero_where_equal=False,
    ),
    "mean-loss": Risk(
        lambda dense, pruned, labels: pruned,
        needs_labels=True,
        bound="betting",
        promise="the mean loss over {scope} is at most {alpha} of the largest possible",
        zero_where_equal=False,
    ),
    "loss-increase": Risk(
        lambda dense, pruned, labels: pruned - dense,
        needs_labels=True,
        bound="betting",
        promise="the mean loss over {scope} is at most {alpha} (absolute) above the dense model's",
        low=-1.0,
        zero_where_equal=False,
    ),
}
"""The risks by name.

`negative-flips` counts over all samples, as the negative flip rate does (Yan et al., 2021). For the share of the
predictions that were right, give `losses` the mask "dense is right" and the limit that scope.
"""


def losses(
    risk: str, dense: ArrayLike, pruned: ArrayLike, labels: ArrayLike | None = None, mask: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Losses of one pruned model, shape (n,), or (mask.sum(),) where a mask picks the part that counts.

    `dense` and `pruned` are logits (n, classes) or predicted classes (n,); `labels` (n,) may be left out where the
    risk needs none. A mask must come from a rule frozen beforehand and applied sample by sample: the dense model is
    right, or `confidence` is above a threshold chosen on another split. Raises `InputError`.
    """
    if risk not in RISKS:
        raise unknown("risk", risk, RISKS)
    if risk in LOSS_RISKS:
        raise InputError(f"risk {risk!r} is of losses, not of classes; give a table of them, with certify --losses")
    if labels is None and RISKS[risk].needs_labels:
        raise InputError(f"risk {risk!r} needs labels; give them, or use 'disagreement', which needs none")
    dense_classes, pruned_classes = _classes(dense, "dense"), _classes(pruned, "pruned")
    truth = dense_classes if labels is None else _classes(labels, "labels")
    if not dense_classes.shape == pruned_classes.shape == truth.shape:
        counts = f"{len(dense_classes)} dense, {len(pruned_classes)} pruned, {len(truth)} labels"
        raise InputError(f"{counts}; expected one of each per sample, in the same order")
    values = np.asarray(RISKS[risk].function(dense_classes, pruned_classes, truth), dtype=np.float64)
    return values if mask is None else values[_mask(mask, len(values), "the mask")]


def are_probabilities(outputs: ArrayLike) -> bool:
    """Whether outputs (n, classes) are probabilities, as after a softmax: none negative, every row sums to 1."""
    values = np.asarray(outputs, dtype=np.float64)
    return bool((values >= 0).all() and (np.abs(values.sum(axis=1) - 1) < 1e-3).all())


def confidence(outputs: ArrayLike) -> NDArray[np.float64]:
    """Largest probability of each row of outputs (n, classes): of logits by softmax, of probabilities as they are."""
    values = np.asarray(outputs, dtype=np.float64)
    if are_probabilities(values):
        return np.asarray(values.max(axis=1), dtype=np.float64)
    weights = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(1 / weights.sum(axis=1), dtype=np.float64)


def by_class(labels: ArrayLike, names: Sequence[str]) -> dict[str, Array]:
    """Class name -> mask (n,) of its samples, for `certify(classes=...)`; a class without samples cannot pass."""
    values = _classes(labels, "labels")
    return {name: values == index for index, name in enumerate(names)}


def _classes(outputs: ArrayLike, model_name: str) -> Array:
    """Predicted classes (n,) of logits (n, classes); classes stay as they are. Raises `InputError`."""
    values = np.asarray(outputs)
    if values.ndim == 2 and np.isfinite(values).all():
        return values.argmax(axis=1)
    if values.ndim == 1 and np.issubdtype(values.dtype, np.integer):
        return values
    problem = "not finite" if values.ndim == 2 else f"of shape {values.shape} and type {values.dtype}"
    raise InputError(f"{model_name}: {problem}; expected finite logits (n, classes) or whole class numbers (n,)")


def _mask(mask: ArrayLike, n: int, mask_name: str) -> Array:
    values = np.asarray(mask)
    if values.shape != (n,) or values.dtype != np.bool_:
        raise InputError(f"{mask_name} has shape {values.shape} and type {values.dtype}; expected ({n},) true or false")
    return values


# --- certificate ----------------------------------------------------------------------------------------------------


EVERYTHING = "all predictions"


@dataclass(frozen=True)
class RiskLimit:
    """What a certificate promises: risk <= alpha with confidence 1 - delta. Raises `InputError` for impossible numbers.

    `scope` names in words the predictions that count; `anytime` says that the test may stop at any time.
    """

    risk: str = "negative-flips"
    alpha: float = 0.03
    delta: float = 0.05
    scope: str = EVERYTHING
    anytime: bool = False

    def __post_init__(self) -> None:
        if self.risk not in RISKS:
            raise unknown("risk", self.risk, RISKS)
        risk = RISKS[self.risk]
        if not risk.low < self.alpha < risk.high:
            raise InputError(f"alpha is {self.alpha}; for {self.risk!r} give a share between {risk.low:g} and 1")
        if not 0 < self.delta < 1:
            raise InputError(f"delta is {self.delta}; give the allowed chance of error, between 0 and 1, such as 0.05")

    @property
    def bound(self) -> str:
        """Name of the method for p-values, one of `BOUNDS`."""
        return "e-process" if self.anytime else RISKS[self.risk].bound

    def p_value(self, values: Array) -> float:
        """P-value of the hypothesis "risk > alpha" for losses (n,) in the risk's own range; 1 without samples."""
        return float(BOUNDS[self.bound](self.in_unit(values), self.in_unit(self.alpha))) if len(values) else 1.0

    def in_unit(self, values: Any) -> Any:
        """Losses, or alpha, scaled from the risk's own range to [0, 1]."""
        low, high = RISKS[self.risk].low, RISKS[self.risk].high
        return (values - low) / (high - low)


class Candidate(NamedTuple):
    """A model of a path, a fixed sequence of ever smaller models: its size, in any unit, and its losses (n,)."""

    name: str
    size: float
    losses: ArrayLike


@dataclass(frozen=True)
class ClassResult:
    """The test's result on the samples of one class; `capital` as in `CertificateRow`."""

    name: str
    n: int
    errors: float
    p_value: float
    capital: tuple[float, ...] = ()


@dataclass(frozen=True)
class CertificateRow:
    """The test's result for one model.

    `errors` is the sum of its losses, `p_value` the largest of those of its classes. `capital` holds, for an anytime
    test, the logarithm of each bet's capital, from which a later test can go on.
    """

    name: str
    size: float
    n: int
    errors: float
    p_value: float
    classes: tuple[ClassResult, ...] = ()
    capital: tuple[float, ...] = ()

    @property
    def weakest(self) -> CertificateRow | ClassResult:
        """The class with the largest p-value; the row itself where classes are not tested by themselves."""
        return max(self.classes, key=lambda each: each.p_value, default=self)


@dataclass(frozen=True)
class Certificate:
    """The outcome for a path of models: `chosen` is the index in `rows` of the smallest model that is certified.

    If it is None no model is certified, and the dense one stays.
    """

    limit: RiskLimit
    rows: tuple[CertificateRow, ...]
    certified: tuple[bool, ...]
    chosen: int | None

    @property
    def chosen_name(self) -> str | None:
        """Name of the chosen candidate; None if none is chosen."""
        return None if self.chosen is None else self.rows[self.chosen].name

    def at(self, delta: float) -> Certificate:
        """The certificate for the same p-values at another error probability, `delta`."""
        limit = dataclasses.replace(self.limit, delta=delta)
        return judge(limit, self.rows)


def certify(
    candidates: Iterable[Candidate], limit: RiskLimit, classes: Mapping[str, ArrayLike] | None = None
) -> Certificate:
    """Test the candidates of a path, ordered from dense to smallest, and choose the smallest that passes.

    The path must have been frozen on other data. With `classes` (name -> mask (n,), see `by_class`) every one of them
    must stay at or below alpha: p is the largest of theirs, which takes no correction, since the promise is broken
    as soon as one class breaks it (intersection-union test, Berger 1982). Without any samples nothing passes. Raises
    `InputError` for a path out of order, names that repeat, and losses that are not finite, out of the risk's range or
    of another length than the masks.
    """
    candidates = list(candidates)
    if not candidates:
        raise InputError("no candidates; give at least one model with its losses, the dense one first")
    _check_order(candidates)
    return judge(limit, tuple(_test(candidate, limit, classes or {}) for candidate in candidates))


def _check_order(candidates: Sequence[Candidate]) -> None:
    previous: Candidate | None = None
    names: set[str] = set()
    for candidate in candidates:
        if candidate.name in names:
            raise InputError(f"candidate {candidate.name!r} is given twice; every model of a path needs its own name")
        if not math.isfinite(candidate.size) or (previous and candidate.size > previous.size):
            position = f" after {previous.name!r} of size {previous.size:g}" if previous else ""
            problem = f"{candidate.name!r} has size {candidate.size:g}{position}"
            raise InputError(f"path out of order: {problem}; give the models from dense to smallest")
        previous = candidate
        names.add(candidate.name)


def _test(candidate: Candidate, limit: RiskLimit, masks: Mapping[str, ArrayLike]) -> CertificateRow:
    values = np.asarray(candidate.losses, dtype=np.float64)
    low, high = RISKS[limit.risk].low, RISKS[limit.risk].high
    if values.ndim != 1:
        raise InputError(f"losses of {candidate.name!r} have shape {values.shape}; expected one loss per sample, (n,)")
    if not ((values >= low) & (values <= high)).all():
        raise InputError(f"losses of {candidate.name!r} leave [{low:g}, {high:g}], the range of {limit.risk!r}")
    if limit.bound == "binomial" and not np.isin(values, (0, 1)).all():
        raise InputError(f"losses of {candidate.name!r} are not all 0 or 1, as those of {limit.risk!r} are")
    parts = {name: values[_mask(mask, len(values), name)] for name, mask in masks.items()}
    classes = tuple(
        ClassResult(name, len(part), float(part.sum()), limit.p_value(part)) for name, part in parts.items()
    )
    p_values = [each.p_value for each in classes] or [limit.p_value(values)]
    errors, p_value = float(values.sum()), max(p_values)
    return CertificateRow(candidate.name, float(candidate.size), len(values), errors, p_value, classes)


def judge(limit: RiskLimit, rows: tuple[CertificateRow, ...]) -> Certificate:
    """Which models of a path pass, by the p-values in its `rows`."""
    passes = fixed_sequence([row.p_value for row in rows], limit.delta)
    certified = tuple(place < passes for place in range(len(rows)))
    return Certificate(limit, rows, certified, passes - 1 if passes else None)


def sentence(certificate: Certificate, group: str = "") -> str:
    """The certificate in plain words, and what it does not promise.

    `group` is the column that its classes come from.
    """
    limit, classes = certificate.limit, len(certificate.rows[0].classes)
    each, every = ("group", f"groups by {group}") if group else ("class", "classes")
    scope = f"{limit.scope} in each of the {classes} {every}" if classes else limit.scope
    promise = RISKS[limit.risk].promise.format(alpha=_format_percent(limit.alpha), scope=scope)
    target = f"With {_format_percent(1 - limit.delta)} confidence over the draw of the calibration data, {promise}"
    row = certificate.rows[certificate.chosen or 0]
    part = row.weakest
    weakest = f" in {part.name!r}, the weakest {each}" if classes else ""
    evidence = f"{part.errors:g} of {part.n} samples{weakest}"
    if certificate.chosen is None:
        short = f"; it takes at least {fewest} samples" if (fewest := _count_needed(limit)) > part.n else ""
        outcome = f"{row.name!r} lost {evidence} (p = {row.p_value:.3g}{short})"
        return f"Not certified; the dense model stays. Not shown: {target[0].lower()}{target[1:]}; {outcome}."
    others = ["other predictions"] * (limit.scope != EVERYTHING) + ["single classes"] * (not classes or bool(group))
    silent = f" It says nothing about {' or '.join(others)}." if others else ""
    limits = "It does not hold for data from elsewhere or later that differ from these."
    return f"{target}. ({row.name!r}: {evidence}, p = {row.p_value:.3g}.) {limits}{silent}"


def _format_percent(share: float) -> str:
    return f"{100 * share:.6g} %"


# --- samples: how many are needed, and what a used split still gives --------------------------------------------------


def check_samples(n: int, limit: RiskLimit, purpose: str = "to certify on") -> None:
    """Raise `DataError` for so few samples, `n`, that no model could pass, not even one without a single error.

    Nothing is raised for alpha <= 0, where the number needed is not known beforehand. `purpose` follows the number in
    the message, such as "of class 'cat'", where every class must pass and n counts those of the smallest.
    """
    # With alpha <= 0 (accuracy-drop) only a model better than the dense one passes: no number is known before.
    if limit.alpha <= 0 or n >= (fewest := _count_needed(limit)):
        return
    limit_text = f"{limit.risk} <= {_format_percent(limit.alpha)} at {_format_percent(1 - limit.delta)} confidence"
    raise DataError(
        f"{n} samples {purpose}; {limit_text} needs at least {fewest}: give more data or a larger --max-drop"
    )


def _count_needed(limit: RiskLimit) -> int:
    """The fewest samples (in each class) with which a model without an error passes; 0 where that cannot be known."""
    if limit.alpha <= 0:
        return 0
    return first_whole(lambda n: limit.p_value(np.zeros(n)) <= limit.delta)


class Spent(NamedTuple):
    """The delta at which all certificates on a split hold together, and a message for the user."""

    delta: float
    message: str


def spent(uses: int, delta: float) -> Spent:
    """What several certificates on one split promise together: `uses` (>= 0) earlier ones and this one, by Bonferroni.

    delta / (uses + 1) is for all uses together, so the earlier ones are judged anew, too (`Certificate.at`). It covers
    trying again after a failure; it does not cover a path that was built with the earlier losses in view.
    """
    if uses < 0 or not 0 < delta < 1:
        raise InputError(f"{uses} uses at delta {delta}; expected 0 or more uses and a delta between 0 and 1")
    each = delta / (uses + 1)
    if not uses:
        return Spent(each, "")
    times = "once" if uses == 1 else f"{uses} times"
    message = (
        f"these samples certified {times} before, so their guarantee is spent: for {_format_percent(1 - delta)} over "
        f"all {uses + 1} uses give each --confidence {1 - each:.6g}, or certify on fresh samples"
    )
    return Spent(each, message)
