"""What each class rests on, and what a plan removes of it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CLASSES, batches_of, plan_of, snapshot
from models import subject as subject_named
from torch import Tensor

from pxcompress import Recipe, compress_module
from pxcompress.attribution.class_relevance import class_relevance, removed_shares
from pxcompress.errors import InputError
from pxcompress.preparation import prepare
from pxcompress.run import Run
from pxcompress.stages import ever_smaller, score
from pxcompress.types import Batch, ClassRelevance

FLAT = subject_named("flatten_cnn")
BATCHES = batches_of(FLAT.inputs, 4)


@st.composite
def relevances(draw: st.DrawFn) -> Tensor:
    """Relevances (classes, units), zeros among them."""
    classes, units = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    size = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
    rows = draw(st.lists(st.lists(size, min_size=units, max_size=units), min_size=classes, max_size=classes))
    return torch.tensor(rows)


# What is removed


def test_removed_shares_by_hand() -> None:
    relevance = ClassRelevance(
        {"a": torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 0.0]]), "b": torch.tensor([[1.0], [0.0], [0.0]])}, (3, 4, 0)
    )
    assert removed_shares(relevance, plan_of({"a": [1]})).tolist() == pytest.approx([0.375, 0.25, 0])
    assert removed_shares(relevance, plan_of({})).tolist() == [0, 0, 0]


@given(relevances(), st.data())
def test_removed_shares_are_shares_and_grow_with_the_plan(rows: Tensor, data: st.DataObject) -> None:
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
    relevance = class_relevance(model, FLAT.groups, BATCHES)
    assert snapshot(model) == before
    with torch.no_grad():
        again = class_relevance(FLAT.model, FLAT.groups, BATCHES)
    assert all(torch.allclose(again.units[name], values, rtol=1e-4) for name, values in relevance.units.items())
    assert not any(values.requires_grad for values in relevance.units.values())


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
def test_class_scores_change_no_plan(rounds: int) -> None:
    assert _removed(BATCHES, rounds=rounds, class_scores=True) == _removed(BATCHES, rounds=rounds)


def test_every_model_of_a_path_has_the_class_relevance_of_the_dense_one() -> None:
    recipe = Recipe("mine", 0.4, scorer="lrp", round_to=1, repair=())
    prepared, run = prepare(FLAT.model, FLAT.example, Run(recipe, {"score": BATCHES, "repair": BATCHES}))
    assert score(prepared, run).class_relevance is None
    assert [stage.name for stage in run.clock.stages][-1] == "score (lrp)"
    asking = Run(recipe.but(class_scores=True), run.parts)
    scored = score(prepared, asking)
    assert [stage.name for stage in asking.clock.stages][-1] == "class scores"
    assert scored.class_relevance is not None
    assert all(slim.class_relevance is scored.class_relevance for slim in ever_smaller(scored, (0.2, 0.4), asking))
