"""Autocast for scores: what deviates too much from float32 is refused."""

from __future__ import annotations

import pytest
import torch
from models import batches_of
from models import subject as subject_named

from pxcompress.attribution.relevance import PRECISIONS, STARTS, TOLERANCE, relative_error, score_in_precision
from pxcompress.errors import InputError
from pxcompress.scorers import SCORERS
from pxcompress.types import Batches, Scores


def test_deviation_is_relative_over_all_units() -> None:
    exact = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert relative_error(exact, exact) == 0
    assert relative_error({"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([4.4])}, exact) == pytest.approx(0.1)


@pytest.mark.parametrize(("name", "precision"), [("flatten_cnn", "bf16"), ("vit", "fp16"), ("resnet_basic", "fp16")])
def test_scores_under_autocast_are_close_but_not_the_same(name: str, precision: str) -> None:
    subject = subject_named(name)
    batches = batches_of(subject.inputs, 3)
    exact = SCORERS.build("lrp")(subject.model, subject.groups, batches)
    scores = SCORERS.build(f"lrp:autocast={precision}")(subject.model, subject.groups, batches)
    assert 0 < relative_error(scores, exact) <= 2 * TOLERANCE


def test_a_model_that_bfloat16_is_too_coarse_for_is_refused() -> None:
    subject = subject_named("resnet_basic")
    batches = batches_of(subject.inputs, 6)
    exact = SCORERS.build("lrp")(subject.model, subject.groups, batches)
    with torch.autocast("cpu", PRECISIONS["bf16"]):
        off = relative_error(SCORERS.build("lrp")(subject.model, subject.groups, batches), exact)
    assert off > TOLERANCE
    with pytest.raises(InputError, match=f"changes the scores by {off:.1%}"):
        SCORERS.build("lrp:autocast=bf16")(subject.model, subject.groups, batches)


@pytest.mark.parametrize("factor", [1 + 2 * TOLERANCE, float("nan")])
def test_what_deviates_too_much_is_refused(factor: float) -> None:
    model = subject_named("flatten_cnn").model
    batch_counts = []

    def score(batches: Batches) -> Scores:
        batch_counts.append(len(list(batches)))
        return {"a": torch.ones(3) * (factor if torch.is_autocast_enabled("cpu") else 1)}

    batches = batches_of(torch.zeros(6, 3, 8, 8), 2)
    with pytest.raises(InputError, match=r"autocast=bf16 changes the scores by .* use autocast=none") as caught:
        score_in_precision("bf16", model, score, batches)
    assert "\n" not in str(caught.value)
    assert batch_counts == [1, 1], "only the first batch is needed to refuse"
    assert not torch.is_autocast_enabled("cpu")
    assert score_in_precision("none", model, score, batches)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("start", list(STARTS))
def test_a_logit_of_zero_starts_with_a_finite_multiplier(start: str) -> None:
    assert STARTS[start](torch.zeros(2, 3), torch.tensor([0, 2])).isfinite().all()
