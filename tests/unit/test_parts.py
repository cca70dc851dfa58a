"""Which samples a guarantee counts: thresholds and masks against slow ones, refusals, certificates by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from pxcompress.certify.parts import COVERAGE, PARTS, Part
from pxcompress.certify.path import Candidate, RiskLimit, certify, losses, sentence
from pxcompress.errors import DataError, InputError

DRAWN = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def top_softmax(row: np.ndarray) -> float:
    """Largest softmax probability, term by term."""
    return max(math.exp(x - max(row)) / sum(math.exp(y - max(row)) for y in row) for x in row)


def logits(seed: int, n: int, classes: int = 4, digits: int = 6) -> np.ndarray:
    """Rounded, so that some values are equal."""
    return np.random.default_rng(seed).normal(size=(n, classes)).round(digits) * 2


@DRAWN
@given(st.integers(0, 99), st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 6))
def test_the_threshold_is_the_largest_with_that_coverage(seed: int, n: int, coverage: float, digits: int) -> None:
    dense = logits(seed, n, digits=digits)
    part = Part("confident", coverage).with_threshold_from(dense)
    values = np.array([top_softmax(row) for row in dense])
    assert min(abs(values - part.threshold)) < 1e-12
    enough = [value for value in values if (values >= value - 1e-12).mean() >= coverage - 1e-9]
    assert part.threshold == pytest.approx(max(enough), rel=1e-12)
    mask = part.mask(dense)
    assert mask is not None
    assert mask.mean() >= coverage - 1e-9


def test_coverage_of_round_numbers_is_exact() -> None:
    for n in (5, 10, 75, 1000):
        dense = logits(n, n)
        mask = Part("confident", 0.8).with_threshold_from(dense).mask(dense)
        assert mask is not None
        assert mask.sum() == 0.8 * n


def test_the_threshold_does_not_look_at_the_samples_it_is_used_on() -> None:
    part = Part("confident", 0.5).with_threshold_from(logits(0, 100))
    other = logits(1, 60) * 0.01
    mask = part.mask(other)
    assert mask is not None
    assert mask.tolist() == [top_softmax(row) >= part.threshold for row in other] == [False] * 60
    with pytest.raises(ValueError, match="not chosen"):
        Part("confident").mask(other)


@pytest.mark.parametrize("risk", ["negative-flips", "disagreement", "top1-error"])
def test_a_certificate_of_the_confident_part_by_hand(risk: str) -> None:
    dense, pruned, labels = logits(0, 400), logits(0, 400), logits(0, 400).argmax(axis=1)
    pruned[::29] = -pruned[::29]  # turns the answer
    labels[::17] = (labels[::17] + 1) % 4
    part = Part("confident", 0.6).with_threshold_from(logits(1, 200))
    values = losses(risk, dense, pruned, labels, part.mask(dense))
    certificate = certify([Candidate("m", 1, values)], part.with_scope(RiskLimit(risk, 0.1)))

    n = errors = 0
    for first, second, label in zip(dense, pruned, labels, strict=True):
        if top_softmax(first) >= part.threshold:
            n += 1
            right, same = first.argmax() == label, second.argmax() == first.argmax()
            wrong = second.argmax() != label
            errors += {"negative-flips": right and wrong, "disagreement": not same, "top1-error": wrong}[risk]
    (row,) = certificate.rows
    assert 0 < errors < n < 400
    assert (row.n, row.errors) == (n, errors)
    assert row.p_value == pytest.approx(binom.cdf(errors, n, 0.1))


def test_a_certificate_of_every_class_by_hand() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(3, size=600)
    dense, pruned = labels.copy(), np.where(rng.random(600) < 0.03, 3, labels)
    names = ["a", "b", "c"]
    masks = Part("classes").classes(labels, names)
    values = losses("disagreement", dense, pruned)
    certificate = certify([Candidate("m", 1, values)], RiskLimit("disagreement", 0.1), masks)
    expected = []
    for place, name in enumerate(names):
        n = sum(label == place for label in labels)
        errors = sum(label == place and out == 3 for label, out in zip(labels, pruned, strict=True))
        expected.append((name, n, errors, pytest.approx(binom.cdf(errors, n, 0.1))))
    (row,) = certificate.rows
    assert [(each.name, each.n, each.errors, each.p_value) for each in row.classes] == expected
    assert row.p_value == max(each.p_value for each in row.classes)
    assert row.weakest.p_value == max(each.p_value for each in row.classes)
    assert (row.n, row.errors) == (600, values.sum())


def test_only_the_classes_part_has_classes_and_only_the_confident_one_a_mask() -> None:
    labels, dense = np.array([0, 1, 1]), logits(0, 3)
    parts = {name: Part(name).with_threshold_from(dense) for name in PARTS}
    assert {name for name, part in parts.items() if part.classes(labels, ["x", "y"])} == {"classes"}
    assert {name for name, part in parts.items() if part.mask(dense) is not None} == {"confident"}
    assert {name for name, part in parts.items() if part.with_scope(RiskLimit()) != RiskLimit()} == {"confident"}


@pytest.mark.parametrize(("threshold", "words"), [(0.97164, "0.972"), (1 - 1.3e-7, "0.99999987"), (1.0, "1")])
def test_the_sentence_tells_the_threshold_also_just_below_one(threshold: float, words: str) -> None:
    limit = Part("confident", 0.8, threshold).with_scope(RiskLimit())
    text = sentence(certify([Candidate("m", 1, np.zeros(200))], limit))
    assert f"of the predictions of which the dense model is confident (softmax at least {words}) turn" in text
    assert text.endswith("It says nothing about other predictions or single classes.")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"part": "confidence"}, "did you mean confident"),
        ({"part": "classes", "coverage": 0.8}, "no effect with part 'classes'"),
        ({"coverage": 0.8}, "no effect with part 'all'"),
        ({"part": "confident", "coverage": 80.0}, "coverage is 80"),
        ({"part": "confident", "coverage": 0.0}, "coverage is 0"),
        ({"part": "confident", "coverage": float("nan")}, "coverage is nan"),
    ],
)
def test_parts_refuse(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Part(**fields)


def test_the_default_coverage() -> None:
    assert Part("confident").coverage == COVERAGE


# --- too few samples


@pytest.mark.parametrize(
    ("part", "counts", "words"),
    [
        (Part(), {"cat": 20, "dog": 24}, "44 samples to certify on; negative-flips <= 5 % at 95 % confidence needs"),
        (Part("classes"), {"cat": 200, "dog": 24}, "24 samples of 'dog', the smallest class, to certify on; "),
        (Part("confident"), {"cat": 40, "dog": 30}, "56 samples to certify on that are confident (coverage 0.8 of 70)"),
    ],
)
def test_too_few_samples_are_counted_and_the_number_is_told(part: Part, counts: dict[str, int], words: str) -> None:
    limit = RiskLimit(alpha=0.05)
    with pytest.raises(DataError) as caught:
        part.check(limit, counts)
    message = str(caught.value)
    assert message.startswith(words)
    needed = int(message.split("at least ")[1].split(":")[0])
    assert needed == math.ceil(math.log(0.05) / math.log(0.95))
    if part.part == "classes":
        enough = {"cat": needed, "dog": needed}
        fewer = {"cat": 1000, "dog": needed - 1}
    else:
        total = math.ceil(needed / (part.coverage or 1))
        enough, fewer = {"cat": total, "dog": 0}, {"cat": total - 1, "dog": 0}
    part.check(limit, enough)
    with pytest.raises(DataError):
        part.check(limit, fewer)


def test_a_class_without_samples_is_too_few() -> None:
    with pytest.raises(DataError, match="0 samples of 'bird'"):
        Part("classes").check(RiskLimit(alpha=0.5), {"cat": 500, "bird": 0})


def test_what_is_just_enough_passes_without_errors_and_not_with_one_less() -> None:
    """The check before any work and the test after it agree."""
    limit = RiskLimit(alpha=0.1)
    for count in range(20, 60):
        labels = np.repeat([0, 1, 2], [count, 90, 90])
        masks = Part("classes").classes(labels, ["x", "y", "z"])
        certified = certify([Candidate("m", 1, np.zeros(len(labels)))], limit, masks).chosen == 0
        try:
            Part("classes").check(limit, {name: int(mask.sum()) for name, mask in masks.items()})
        except DataError:
            assert not certified
        else:
            assert certified


# --- the whole


def test_violations_stay_below_delta_on_the_confident_part() -> None:
    """The risk among confident samples is just above alpha; the select and the certify samples are drawn each time."""
    rng, draws, delta, alpha = np.random.default_rng(5), 1000, 0.1, 0.05
    wrong = 0
    for _ in range(draws):
        sure = rng.random(900)  # softmax of two classes, as logits (0, x)
        dense = np.stack([np.zeros(900), np.log((1 + sure) / (1 - sure))], axis=1)
        part = Part("confident", 0.5).with_threshold_from(dense[:300])
        threshold = 2 * part.threshold - 1
        # Errors are rarer the surer the model is; their mean over [threshold, 1] is alpha + 1e-4.
        rate = (alpha + 1e-4) * 2 * (1 - sure) / (1 - threshold)
        values = (rng.random(900) < rate)[300:][part.mask(dense[300:])]
        wrong += certify([Candidate("m", 1, values)], RiskLimit(alpha=alpha, delta=delta)).chosen == 0
    assert 0.02 < wrong / draws <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)


def test_judging_at_another_delta_keeps_the_classes() -> None:
    labels = np.arange(300) % 2
    masks = Part("classes").classes(labels, ["x", "y"])
    path = [Candidate("m", 1, np.arange(300) < 4)]
    strict = certify(path, RiskLimit(alpha=0.1, delta=0.001), masks)
    assert certify(path, RiskLimit(alpha=0.1), masks).at(0.001) == strict
    assert dataclasses.replace(strict.rows[0], classes=()).weakest.name == "m"
