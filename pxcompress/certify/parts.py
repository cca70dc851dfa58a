"""Which samples a guarantee is about: all, those of which the dense model is confident, or every class by itself.

The rule is fixed before the reserved samples are seen, and takes one sample at a time: what it picks are again
independent samples, of the predictions that it stands for (Geifman and El-Yaniv, 2017).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from pxcompress.certify.learn_then_test import Array
from pxcompress.certify.path import RiskLimit, by_class, check_samples, confidence
from pxcompress.choices import PARTS
from pxcompress.errors import InputError, unknown

COVERAGE = 0.8


@dataclass(frozen=True)
class Part:
    """Which samples a guarantee is about. Raises `InputError` for settings that contradict each other.

    "confident": those whose largest softmax probability in the dense model is at least `threshold`, which is chosen on
    other samples so that the share `coverage` of them is (0.8 where it is not given). "classes": all, and the risk is
    held in every class, by true label.
    """

    part: str = "all"
    coverage: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise unknown("part", self.part, PARTS)
        if self.part == "confident":
            object.__setattr__(self, "coverage", COVERAGE if self.coverage is None else self.coverage)
        elif self.coverage is not None or self.threshold is not None:
            raise InputError(f"coverage has no effect with part {self.part!r}; give part 'confident', or leave it out")
        if self.coverage is not None and not 0 < self.coverage < 1:
            raise InputError(
                f"coverage is {self.coverage}; expected a share of the samples between 0 and 1, such as 0.8"
            )

    def with_threshold_from(self, dense: ArrayLike) -> Part:
        """A copy whose threshold is set by the dense model's logits (n, classes) on samples that certify nothing.

        It is the largest at which at least the share `coverage` of them is confident; more are where values are equal.
        """
        if self.coverage is None:
            return self
        values = np.sort(confidence(dense))
        return replace(self, threshold=float(values[len(values) - math.ceil(round(self.coverage * len(values), 9))]))

    def mask(self, dense: ArrayLike) -> Array | None:
        """Boolean mask (n,) of the samples that count, from the dense model's logits (n, classes).

        None if all count. Raises `ValueError` while no threshold is set.
        """
        if self.coverage is None:
            return None
        if self.threshold is None:
            raise ValueError("the threshold is not chosen yet")
        return confidence(dense) >= self.threshold

    def classes(self, labels: ArrayLike, names: Sequence[str]) -> dict[str, Array]:
        """The classes that each must meet the risk limit, as name -> mask (n,); empty unless the part is "classes"."""
        return by_class(labels, names) if self.part == "classes" else {}

    def with_scope(self, limit: RiskLimit) -> RiskLimit:
        """`limit` with a sentence on which predictions count."""
        if self.threshold is None:
            return limit
        description = (
            f"the predictions of which the dense model is confident (softmax at least {_format_share(self.threshold)})"
        )
        return replace(limit, scope=description)

    def check(self, limit: RiskLimit, counts: Mapping[str, int]) -> None:
        """Raise `DataError` where there are too few samples (class -> number) for a certificate, however good the
        models are.
        """
        total = sum(counts.values())
        if self.part == "classes":
            smallest_class = min(counts, key=lambda name: counts[name])
            check_samples(counts[smallest_class], limit, f"of {smallest_class!r}, the smallest class, to certify on")
        elif self.coverage is not None:
            purpose = f"to certify on that are confident (coverage {self.coverage:g} of {total})"
            check_samples(int(self.coverage * total), limit, purpose)
        else:
            check_samples(total, limit)


def check_groups(limit: RiskLimit, masks: Mapping[str, Array], n: int, where: str = "to certify on") -> None:
    """Raise `DataError` where n samples, or those of the smallest group (name -> mask), are too few to certify."""
    if masks:
        smallest = min(masks, key=lambda name: int(masks[name].sum()))
        n, where = int(masks[smallest].sum()), f"of {smallest!r}, the smallest group, {where}"
    check_samples(n, limit, where)


def _format_share(value: float) -> str:
    """A share as text with three digits or more: one just below 1 gets two digits of the difference."""
    return f"{value:.{max(3, 1 - math.floor(math.log10(1 - value)))}f}" if value < 1 else "1"
