"""Certificates: p-values against slow exact ones, testing against closed testing, decisions, refusals, words."""

import dataclasses
import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxcompress import choices
from pxcompress.certify.learn_then_test import BOUNDS, binomial, fixed_sequence
from pxcompress.certify.parts import Part
from pxcompress.certify.path import (
    RISKS,
    Candidate,
    RiskLimit,
    by_class,
    certify,
    check_samples,
    confidence,
    losses,
    sentence,
    spent,
)
from pxcompress.certify.record import CertificateRecord
from pxcompress.certify.used import check_disjoint, split_hash
from pxcompress.checks import read_record
from pxcompress.errors import DataError, InputError


def exact_tail(errors, n, alpha):
    """P(Bin(n, alpha) <= errors) term by term, in fractions."""
    a = Fraction(alpha)
    return sum(math.comb(n, k) * a**k * (1 - a) ** (n - k) for k in range(errors + 1))


def errors_of(count, n):
    """n losses, `count` of them 1."""
    return np.arange(n) < count


def path_of(counts, n=1000):
    """A path whose candidates made `counts` errors."""
    return [Candidate(f"m{i}", 1 - i / 100, errors_of(count, n)) for i, count in enumerate(counts)]


# --- reference numbers and p-values


@pytest.mark.parametrize(("alpha", "most"), [(0.03, 129), (0.05, 224)])
def test_reference_numbers(alpha, most):
    limit = RiskLimit(alpha=alpha, delta=0.05)
    assert certify([Candidate("m", 1, errors_of(most, 5000))], limit).chosen == 0
    assert certify([Candidate("m", 1, errors_of(most + 1, 5000))], limit).chosen is None


@given(st.integers(1, 60), st.data())
def test_binomial_is_exact(n, data):
    errors = data.draw(st.integers(0, n))
    alpha = data.draw(st.sampled_from([0.01, 0.03, 0.125, 0.5, 0.9]))
    assert binomial(errors_of(errors, n), alpha) == pytest.approx(float(exact_tail(errors, n, alpha)), rel=1e-9)


@pytest.mark.parametrize("bound", sorted(BOUNDS))
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_p_values_are_valid_at_the_edge(bound, alpha):
    """P(p <= delta) <= delta where the risk equals alpha; 4000 draws, 3 standard errors."""
    values = (np.random.default_rng(1).random((4000, 250)) < alpha).astype(float)
    p_values = BOUNDS[bound](values, alpha)
    for delta in (0.02, 0.05, 0.1, 0.5):
        assert (p_values <= delta).mean() <= delta + 3 * math.sqrt(delta * (1 - delta) / 4000)
    assert ((p_values >= 0) & (p_values <= 1)).all()


@pytest.mark.parametrize("bound", sorted(BOUNDS))
def test_p_values_work_on_stacks_and_fall_with_the_losses(bound):
    stack = np.stack([errors_of(count, 400).astype(float) for count in (0, 4, 20, 60)])
    p_values = BOUNDS[bound](stack, 0.1)
    assert p_values == pytest.approx([float(BOUNDS[bound](row, 0.1)) for row in stack])
    assert (np.diff(p_values) >= 0).all()
    assert p_values[0] < 0.05 < p_values[-1]


def test_betting_from_the_paper():
    """Capital_t = prod (1 - bet_i (loss_i - alpha)), bets from the past alone; one step at a time."""
    values, alpha = np.random.default_rng(2).random(80) * 0.4, 0.3
    order = np.random.default_rng(0).permutation(80)
    capital = best = 1.0
    total, spread, variance = 0.5, 0.25, 0.25
    for i, loss in enumerate(values[order], start=1):
        capital *= 1 - min(1, math.sqrt(2 * math.log(20) / (80 * variance))) * (loss - alpha)
        best = max(best, capital)
        total += loss
        spread += (loss - total / (i + 1)) ** 2
        variance = spread / (i + 1)
    assert best > 1
    assert float(BOUNDS["betting"](values, alpha)) == pytest.approx(1 / best)


# --- many models


def test_fixed_sequence_stops_at_the_first_failure():
    assert fixed_sequence([0.01, 0.05, 0.06, 0.0], 0.05) == 2
    assert fixed_sequence([0.06, 0.0], 0.05) == 0
    assert fixed_sequence([0.0, 0.0], 0.05) == 2


# --- risks


def logits_for(classes, rng):
    classes = np.asarray(classes)
    values = rng.random((len(classes), 4))
    values[np.arange(len(classes)), classes] += 2
    return values


def test_risks_on_a_table_of_all_cases():
    dense = np.array([0, 0, 1, 1, 1])
    pruned = np.array([0, 1, 0, 1, 2])
    labels = np.array([0, 0, 0, 0, 0])
    expected = {
        "negative-flips": [0, 1, 0, 0, 0],
        "disagreement": [0, 1, 1, 0, 1],
        "accuracy-drop": [0, 1, -1, 0, 0],
        "top1-error": [0, 1, 0, 1, 1],
    }
    assert set(expected) == set(choices.RISKS)
    rng = np.random.default_rng(0)
    for risk, values in expected.items():
        assert losses(risk, dense, pruned, labels).tolist() == values
        assert losses(risk, logits_for(dense, rng), logits_for(pruned, rng), labels).tolist() == values
        assert losses(risk, dense, pruned, labels, dense == labels).tolist() == values[:2]


def test_only_disagreement_goes_without_labels():
    for name in choices.RISKS:
        risk = RISKS[name]
        assert risk.needs_labels == (name != "disagreement")
        if risk.needs_labels:
            with pytest.raises(InputError, match="needs labels"):
                losses(name, [0], [1])
    assert losses("disagreement", [0, 1], [1, 1]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("negative-flip", [0], [0], [0]), "did you mean negative-flips"),
        (("disagreement", [0, 1], [0]), "2 dense, 1 pruned"),
        (("disagreement", [0.5], [0]), "whole class numbers"),
        (("disagreement", [[float("nan"), 1.0]], [0]), "not finite"),
        (("disagreement", [0, 1], [0, 1], None, [1, 0]), "true or false"),
        (("disagreement", [0, 1], [0, 1], None, [True]), r"expected \(2,\)"),
    ],
)
def test_losses_refuse(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        losses(*arguments)
    assert "\n" not in str(caught.value)


def test_confidence_is_the_largest_softmax():
    logits = np.random.default_rng(0).normal(size=(5, 3)) * 400
    exact = [max(math.exp(x - max(row)) for x in row) / sum(math.exp(x - max(row)) for x in row) for row in logits]
    assert confidence(logits) == pytest.approx(exact)


def test_probabilities_are_taken_as_they_are():
    logits = np.random.default_rng(0).normal(size=(50, 4))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert confidence(shares) == pytest.approx(confidence(logits))
    assert confidence(shares.astype(np.float16)) == pytest.approx(confidence(logits), abs=1e-3)
    assert confidence(shares[:, :3]) != pytest.approx(shares[:, :3].max(axis=1)), "no shares: they do not sum to 1"


# --- certificates


def test_an_always_failing_path_chooses_none_never_the_sparsest():
    certificate = certify(path_of([900, 900, 0, 0]), RiskLimit())
    assert certificate.chosen is None
    assert certificate.chosen_name is None
    assert certificate.certified == (False,) * 4
    assert sentence(certificate).startswith("Not certified")


def test_the_last_before_the_first_failure_is_chosen():
    certificate = certify(path_of([0, 10, 15, 60, 0]), RiskLimit(alpha=0.03, delta=0.05))
    assert certificate.chosen_name == "m2"
    assert [row.errors for row in certificate.rows] == [0, 10, 15, 60, 0]
    assert certificate.rows[1].p_value == pytest.approx(float(exact_tail(10, 1000, 0.03)))


@pytest.mark.parametrize("delta", [0.3, 0.05, 1e-3, 1e-6])
def test_judging_at_another_delta_equals_certifying_at_it(delta):
    path = path_of([0, 5, 15, 20, 25])
    assert certify(path, RiskLimit()).at(delta) == certify(path, RiskLimit(delta=delta))


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], "no candidates"),
        (
            [Candidate("a", 0.5, [0]), Candidate("b", 0.6, [0])],
            "path out of order: 'b' has size 0.6 after 'a' of size 0.5",
        ),
        ([Candidate("a", float("nan"), [0])], "out of order"),
        ([Candidate("a", 1, [0]), Candidate("a", 1, [0])], "given twice"),
        ([Candidate("a", 1, [[0, 1]])], "expected one loss per sample"),
        ([Candidate("a", 1, [0, float("nan")])], r"leave \[0, 1\]"),
        ([Candidate("a", 1, [0, -1])], r"leave \[0, 1\]"),
        ([Candidate("a", 1, [0, 0.5])], "not all 0 or 1"),
    ],
)
def test_certify_refuses(candidates, message):
    with pytest.raises(InputError, match=message) as caught:
        certify(candidates, RiskLimit())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"risk": "disagreements"}, "did you mean disagreement"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": 3}, "alpha is 3"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"delta": 0}, "delta is 0"),
    ],
)
def test_goals_refuse(options, message):
    with pytest.raises(InputError, match=message):
        RiskLimit(**options)


def test_accuracy_drop_is_rescaled():
    changes = np.zeros(2000)
    changes[:20], changes[20:30] = 1, -1
    path = [Candidate("m", 1, changes)]
    certificate = certify(path, RiskLimit("accuracy-drop", 0.03))
    assert certificate.chosen == 0
    assert certificate.rows[0].errors == 10
    assert certificate.rows[0].p_value == pytest.approx(float(BOUNDS["betting"]((changes + 1) / 2, 0.515)))


def test_every_class_must_pass_and_the_weakest_is_named():
    labels = np.repeat([0, 1], 500)
    masks = by_class(labels, ["cat", "dog"])
    wrong = np.zeros(1000)
    wrong[500:512] = 1
    path = [Candidate("m", 1, wrong)]
    assert certify(path, RiskLimit(alpha=0.03)).chosen == 0
    certificate = certify(path, RiskLimit(alpha=0.03), masks)
    assert certificate.chosen is None
    assert (certificate.rows[0].weakest.name, certificate.rows[0].weakest.errors) == ("dog", 12)
    assert certificate.rows[0].p_value == pytest.approx(float(exact_tail(12, 500, 0.03)))
    assert "'dog'" in sentence(certificate)
    assert certify(path, RiskLimit(alpha=0.06), masks).chosen == 0


def test_a_class_without_samples_cannot_pass():
    masks = by_class(np.zeros(1000, dtype=int), ["seen", "never seen"])
    certificate = certify([Candidate("m", 1, np.zeros(1000))], RiskLimit(), masks)
    assert certificate.chosen is None
    assert certificate.rows[0].weakest.name == "never seen"


def test_without_samples_nothing_passes_and_the_words_say_how_many_it_takes():
    certificate = certify([Candidate("dense", 1, []), Candidate("m", 0.5, [])], RiskLimit(alpha=0.3))
    assert certificate.chosen is None
    assert [row.p_value for row in certificate.rows] == [1, 1]
    assert "lost 0 of 0 samples (p = 1; it takes at least 9 samples)" in sentence(certificate)
    assert "it takes" not in sentence(certify(path_of([900]), RiskLimit()))


def test_class_masks_of_another_length_are_refused():
    with pytest.raises(InputError, match="dog"):
        certify([Candidate("m", 1, [0, 1])], RiskLimit(), {"dog": [True]})


@pytest.mark.parametrize("risk", sorted(RISKS))
@pytest.mark.parametrize("counts", [[0, 5, 60], [900]])
def test_json_round_trip(risk, counts):
    masks = by_class(np.arange(1000) % 2, ["even", "odd"]) if risk == "disagreement" else None
    certificate = certify(path_of(counts), RiskLimit(risk, 0.04, scope="confident predictions"), masks)
    record = record_of(certificate)
    text = json.dumps(dataclasses.asdict(record))
    again = read_record(CertificateRecord, text, "certificate.json")
    assert again == record
    assert (again.certificate, again.counted) == (certificate, Part("confident", 0.5, 0.9))
    data = json.loads(text)
    assert (data["risk"], data["alpha"], data["delta"], data["n"]) == (risk, 0.04, 0.05, 1000)
    assert data["sentence"] == sentence(certificate)


def record_of(certificate):
    part = Part("confident", 0.5, 0.9)
    return CertificateRecord.of(certificate, part, reserved=2000, hashes={"split": "ab"}, unit="units", data="digits")


def test_a_forged_certificate_is_refused():
    record = record_of(certify(path_of([0, 900]), RiskLimit()))
    with pytest.raises(InputError, match="does not follow"):
        _ = dataclasses.replace(record, chosen=1, certified=(True, True)).certificate
    with pytest.raises(InputError, match="it is missing"):
        read_record(CertificateRecord, json.dumps({"alpha": 0.03}), "certificate.json")


def test_sentence_says_what_is_promised_and_what_is_not():
    text = sentence(certify(path_of([0, 10]), RiskLimit(alpha=0.03, delta=0.05, scope="predictions that were right")))
    start = (
        "With 95 % confidence over the draw of the calibration data, at most 3 % of predictions that were right turn"
    )
    assert text.startswith(start)
    assert "nothing about other predictions or single classes" in text
    assert "differ from these" in text
    assert "10 of 1000" in text
    masks = by_class(np.arange(1000) % 2, ["even", "odd"])
    each = sentence(certify(path_of([0]), RiskLimit(), masks))
    assert "all predictions in each of the 2 classes turn from right to wrong" in each
    assert "0 of 500 samples in 'even', the weakest class" in each
    assert "says nothing" not in each


# --- samples


@pytest.mark.parametrize("risk", sorted(RISKS))
def test_check_samples_names_the_number_that_is_enough(risk):
    limit = RiskLimit(risk, 0.03)
    with pytest.raises(DataError, match="needs at least") as caught:
        check_samples(50, limit)
    needed = int(str(caught.value).split("at least ")[1].split(":")[0])
    check_samples(needed, limit)
    with pytest.raises(DataError):
        check_samples(needed - 1, limit)
    if RISKS[risk].bound == "binomial":
        assert needed == math.ceil(math.log(0.05) / math.log(0.97))


def test_an_improvement_may_be_asked_for():
    check_samples(10, RiskLimit("accuracy-drop", -0.01))
    better = np.where(np.arange(3000) < 300, -1.0, 0.0)
    assert certify([Candidate("m", 1, better)], RiskLimit("accuracy-drop", -0.01)).chosen == 0


def test_overlapping_ids_are_refused():
    check_disjoint(["a", "b"], {"score": ["c"], "test": ["d"]})
    with pytest.raises(DataError, match="also serve 'select', such as 'b'"):
        check_disjoint(["a", "b"], {"score": ["c"], "select": iter(["b", "d"])})
    with pytest.raises(DataError, match="given twice"):
        check_disjoint(["a", "a"], {})


def test_split_hash_knows_the_samples_not_their_order():
    assert split_hash(["a", "b"]) == split_hash(["b", "a"]) != split_hash(["a", "c"])


def test_spent_shares_delta_over_all_uses():
    assert spent(0, 0.05) == (0.05, "")
    again = spent(2, 0.06)
    assert again.delta == pytest.approx(0.02)
    assert "2 times" in again.message
    assert "94 % over all 3 uses" in again.message
    with pytest.raises(InputError):
        spent(-1, 0.05)


# --- the whole


def test_violations_stay_below_delta():
    """Risk of the third model just above alpha, as in benchmarks/certify.py, 1000 draws."""
    rng, draws, limit = np.random.default_rng(5), 1000, RiskLimit(alpha=0.0499, delta=0.1)
    wrong = 0
    for _ in range(draws):
        ease = rng.random(600)
        path = [Candidate(str(risk), 1 - risk, ease < risk) for risk in (0.0, 0.02, 0.05, 0.08)]
        wrong += (certify(path, limit).chosen or 0) >= 2
    assert 0.03 < wrong / draws <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / draws)


def test_importing_it_loads_no_torch():
    code = "import sys, pxcompress.certify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
