"""Which samples need a label: only those on which a model of the path disagrees with the dense one.

Where both agree, the loss of every risk with `zero_where_equal` is 0 whatever the label is. So the labels of the other
samples give the same losses, p-values and choice as labels of all of them: the count is still divided by all n.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pxcompress.certify.learn_then_test import Array
from pxcompress.certify.path import RISKS, losses
from pxcompress.choices import one_of
from pxcompress.errors import InputError

NEITHER, MISSING = -1, -2
"""Labels that are no class: NEITHER where no model's answer is right, MISSING where nobody has given a label."""


def check_few_labels(risk: str) -> None:
    """Raise `InputError` for a risk whose losses depend on the labels of samples on which all models agree."""
    if not RISKS[risk].zero_where_equal:
        possible = one_of(name for name in RISKS if RISKS[name].zero_where_equal)
        raise InputError(f"risk {risk!r} needs the label of every sample; give --data with labels, or use {possible}")


def random_order(n: int, split: str) -> Array:
    """A random order of n samples that is always the same for a split of this hash, since files often come sorted by
    class.

    A test that stops early has then seen a random part of the samples.
    """
    return np.random.default_rng(int(split, 16)).permutation(n)


def samples_to_label(risk: str, predicted: ArrayLike, order: Array, *, anytime: bool) -> Array:
    """Positions of the samples that need a label, in the order in which labels are worth most.

    They are those on which any model predicts another class than the dense one; none where the risk needs no labels.
    `predicted` (models, n) are classes, the dense model's in the first row, then those of ever smaller models. `order`
    (n,) is the order of the samples in an anytime test, which the result keeps. A fixed-size test looks at one model
    after the other, so samples on which the first models disagree come first: labelling can stop where the test does.
    """
    values = np.asarray(predicted)
    differs = values[1:] != values[0]
    if not RISKS[risk].needs_labels or not len(differs):
        return np.empty(0, dtype=np.int64)
    positions = order[differs.any(axis=0)[order]]
    return positions if anytime else positions[np.argsort(differs.argmax(axis=0)[positions], kind="stable")]


def completed_labels(dense: ArrayLike, answers: Mapping[int, int]) -> Array:
    """Labels (n,) that give the same losses as the true ones: the `answers` by position, elsewhere the dense model's
    class.
    """
    labels = np.array(dense, dtype=np.int64)
    for position, label in answers.items():
        labels[position] = label
    return labels


def pessimistic_losses(risk: str, dense: ArrayLike, pruned: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Losses (n,) as from `losses`, but the largest possible one where the label is `MISSING` and the models disagree.

    More errors give a larger binomial p-value, so a certificate from them holds whatever the missing labels are.
    """
    values = losses(risk, dense, pruned, labels)
    unknown = (np.asarray(labels) == MISSING) & (np.asarray(dense) != np.asarray(pruned))
    return np.where(unknown & RISKS[risk].needs_labels, RISKS[risk].high, values)
