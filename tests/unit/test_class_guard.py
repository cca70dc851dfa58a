"""What a plan removes of each class, and the guard of what single classes rest on."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CLASSES, batches_of, plan_of, snapshot
from models import subject as subject_named
from torch import Tensor

from pxcompress import Recipe, compress_module
from pxcompress.attribution.class_relevance import class_relevance, guarded, removed_shares
from pxcompress.errors import InputError
from pxcompress.run import Run
from pxcompress.stages import ever_smaller, plan_at, score
from pxcompress.types import Batch, ClassRelevance

FLAT = subject_named("flatten_cnn")
BATCHES = batches_of(FLAT.inputs, 4)


def relevance_of(*rows: list[float], samples: int = 7) -> ClassRelevance:
    """Relevance in one group, a row a class."""
    return ClassRelevance({"g": torch.tensor(rows)}, (samples,) * len(rows))


def guard(scores: list[float], relevance: ClassRelevance) -> list[float]:
    return guarded({"g": torch.tensor(scores)}, relevance)["g"].tolist()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores (units,) of both signs and relevances (classes, units), zeros among them."""
    classes, units = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    size = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
    rows = draw(st.lists(st.lists(size, min_size=units, max_size=units), min_size=classes, max_size=classes))
    scores = draw(st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=units, max_size=units))
    return torch.tensor(scores), torch.tensor(rows)


# The guard


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=6), st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
def test_where_all_classes_rest_on_the_same_nothing_changes(units: list[float], sizes: list[float]) -> None:
    """However much relevance a class has in all, as relevance is in units of its logit."""
    scores = [3.0 - 2 * place for place in range(len(units))]
    relevance = relevance_of(*([size * unit for unit in units] for size in sizes))
    assert guard(scores, relevance) == pytest.approx(scores, rel=1e-5)


@pytest.mark.parametrize("classes", [1, 2, 10])
def test_what_one_class_alone_rests_on_counts_as_often_as_there_are_classes(classes: int) -> None:
    relevance = ClassRelevance({"g": torch.eye(classes)}, (1,) * classes)
    assert guard([2.0] * classes, relevance) == pytest.approx([2.0 * classes] * classes)


def test_guard_by_hand() -> None:
    """Shares are (3/4, 1/4, 0) and (1/4, 1/4, 1/2): the largest over the mean is 3/2, 1 and 2."""
    relevance = relevance_of([3.0, 1.0, 0.0], [1.0, 1.0, 2.0])
    assert guard([10.0, 10.0, 10.0], relevance) == pytest.approx([15.0, 10.0, 20.0])
    assert guard([-6.0, -6.0, -6.0], relevance) == pytest.approx([-4.0, -6.0, -3.0])


@given(cases())
def test_no_score_falls_or_changes_its_sign_and_none_grows_beyond_the_number_of_classes(
    case: tuple[Tensor, Tensor],
) -> None:
    scores, rows = case
    found = guarded({"g": scores}, ClassRelevance({"g": rows}, (1,) * len(rows)))["g"]
    slack = 1 + 1e-5
    assert found.dtype == scores.dtype
    assert (found.sign() == scores.sign()).all()
    assert (found >= scores).all()
    assert (found.abs() <= scores.abs() * len(rows) * slack).all()
    assert (found.abs() * len(rows) * slack >= scores.abs()).all()


@given(cases(), st.integers(0, 4))
def test_classes_without_relevance_are_left_out(case: tuple[Tensor, Tensor], place: int) -> None:
    scores, rows = case
    empty = torch.cat([rows[:place], torch.zeros(1, rows.shape[1]), rows[place:]])
    found = guarded({"g": scores}, ClassRelevance({"g": empty}, (1,) * len(empty)))["g"]
    assert torch.equal(found, guarded({"g": scores}, ClassRelevance({"g": rows}, (1,) * len(rows)))["g"])


def test_units_that_no_class_rests_on_stay_and_those_that_are_gone_stay_gone() -> None:
    assert guard([5.0, -math.inf, 1.0], relevance_of([0.0, 1.0, 1.0], [0.0, 0.0, 1.0])) == pytest.approx(
        [5.0, -math.inf, 1.0 * 4 / 3]
    )
    assert guard([5.0, -1.0], relevance_of([0.0, 0.0])) == [5.0, -1.0]


# What is removed


def test_removed_shares_by_hand() -> None:
    relevance = ClassRelevance(
        {"a": torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 0.0]]), "b": torch.tensor([[1.0], [0.0], [0.0]])}, (3, 4, 0)
    )
    assert removed_shares(relevance, plan_of({"a": [1]})).tolist() == pytest.approx([0.375, 0.25, 0])
    assert removed_shares(relevance, plan_of({})).tolist() == [0, 0, 0]


@given(cases(), st.data())
def test_removed_shares_are_shares_and_grow_with_the_plan(case: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    _, rows = case
    relevance = ClassRelevance({"g": rows}, (1,) * len(rows))
    some = data.draw(st.sets(st.integers(0, rows.shape[1] - 1)))
    more = some | data.draw(st.sets(st.integers(0, rows.shape[1] - 1)))
    small, large = (removed_shares(relevance, plan_of({"g": sorted(units)})) for units in (some, more))
    assert (small >= 0).all()
    assert (small <= large + 1e-9).all()
    assert (large <= 1 + 1e-9).all()


# On a model


def test_the_model_is_left_as_it_was() -> None:
    model = copy.deepcopy(FLAT.model).train()
    next(iter(model.children())).eval()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    found = class_relevance(model, FLAT.groups, BATCHES)
    assert snapshot(model) == before
    with torch.no_grad():
        again = class_relevance(FLAT.model, FLAT.groups, BATCHES)
    assert all(torch.allclose(again.units[name], values, rtol=1e-4) for name, values in found.units.items())
    assert not any(values.requires_grad for values in found.units.values())


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_that_are_no_class_are_refused_in_one_line(label: int) -> None:
    batches = [(inputs, torch.full((len(inputs),), label)) for inputs, _ in BATCHES]
    with pytest.raises(InputError, match=rf"labels go from {label} to {label}; expected 0 to 4") as caught:
        class_relevance(FLAT.model, FLAT.groups, batches)
    assert "\n" not in str(caught.value)
    unlabelled = compress_module(FLAT.model, FLAT.example, batches, 0.3, round_to=1)
    assert unlabelled.class_relevance is None


# In the pipeline


def _removed(batches: list[Batch], **options: object) -> dict[str, tuple[int, ...]]:
    options = {"scorer": "lrp", "round_to": 1, "repair": (), **options}
    slim = compress_module(FLAT.model, FLAT.example, batches, 0.4, **options)
    return dict(slim.pruned.plan.removed)


@pytest.mark.parametrize("rounds", [1, 2])
def test_class_scores_change_nothing_and_the_guard_does(rounds: int) -> None:
    plain = _removed(BATCHES, rounds=rounds)
    assert _removed(BATCHES, rounds=rounds, class_scores=True) == plain
    found = _removed(BATCHES, rounds=rounds, class_guard=True)
    assert found != plain
    assert sum(map(len, found.values())) == sum(map(len, plain.values()))
    assert found == _removed(BATCHES, rounds=rounds, class_guard=True, class_scores=True)


def test_the_plan_is_that_of_guarded_scores_along_the_whole_path() -> None:
    recipe = Recipe("mine", 0.4, scorer="lrp", round_to=1, repair=())
    parts = {"score": BATCHES, "repair": BATCHES}
    run = Run(recipe, parts)
    plain = score(FLAT.model, FLAT.example, run)
    assert plain.class_relevance is None
    assert [stage.name for stage in run.clock.stages][-1] == "score (lrp)"
    guarding = dataclasses.replace(run, recipe=recipe.but(class_guard=True))
    scored = score(FLAT.model, FLAT.example, guarding)
    assert [stage.name for stage in run.clock.stages][-1] == "class scores"
    assert scored.class_relevance is not None
    raised = dataclasses.replace(plain, scores=guarded(plain.scores, scored.class_relevance))
    assert all(torch.equal(values, raised.scores[name]) for name, values in scored.scores.items())
    slims = list(ever_smaller(scored, (0.2, 0.4), guarding))
    assert all(slim.class_relevance is scored.class_relevance for slim in slims)
    assert [slim.pruned.plan for slim in slims[1:]] == [plan_at(raised, ratio, recipe) for ratio in (0.2, 0.4)]
