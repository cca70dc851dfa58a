"""What every registered budget promises. New budgets are tested by being registered."""

from __future__ import annotations

import copy
import json
from functools import cache

import pytest
import torch
from models import Subject, kept_counts, random_plan, snapshot
from models import subject as subject_named
from torch import nn

from pxcompress.budgets import BUDGETS
from pxcompress.cost.count import count_macs, count_params
from pxcompress.errors import BudgetError
from pxcompress.graph import prune
from pxcompress.planning.limits import Limits
from pxcompress.planning.plan import make_plan
from pxcompress.recipe import Recipe
from pxcompress.types import Budget, Meter, Price

NAMES = list(BUDGETS)
MEASURED = {"latency"}
"""Budgets that read a clock: two meters need not agree to the last digit."""

TIMED = {"conv1d", "grouped", "vit"}
"""Families on which these are tested, which have all kinds of operators: a meter takes seconds."""

EXACT = {
    "channels": lambda slim, groups, plan, example: sum(kept_counts(groups, plan).values()),
    "params": lambda slim, groups, plan, example: count_params(slim),
    "macs": lambda slim, groups, plan, example: count_macs(slim, example),
    "bytes": lambda slim, groups, plan, example: 4 * count_params(slim),
}
"""What a budget's meter must predict, measured on the pruned model."""


@cache
def _measured(name: str, subject: Subject) -> Meter:
    """Made once: it takes seconds."""
    return BUDGETS.build(name).meter(subject.model, subject.groups, subject.example)


def _meter(name: str, subject: Subject, model: nn.Module | None = None) -> Meter:
    if name in MEASURED and subject.name not in TIMED:
        pytest.skip("read by a clock, and tested on other families")
    if name in MEASURED and model is None:
        return _measured(name, subject)
    return BUDGETS.build(name).meter(model or subject.model, subject.groups, subject.example)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_model_has_a_price(name: str, small: Subject) -> None:
    meter = _meter(name, small)
    whole = {group.name: group.units for group in small.groups}
    cost = meter({})
    assert isinstance(cost, float)
    assert 0 < cost < float("inf")
    assert meter(whole) == cost
    assert meter(dict(list(whole.items())[:1])) == cost


@pytest.mark.parametrize("name", NAMES)
def test_the_unit_is_named(name: str) -> None:
    unit = BUDGETS.build(name).unit
    assert isinstance(unit, str)
    assert unit.strip()


@pytest.mark.parametrize("name", NAMES)
def test_fewer_units_never_cost_more(name: str, small: Subject) -> None:
    """The planner's bisection rests on it."""
    meter = _meter(name, small)
    for seed in range(3):
        widths = {group.name: group.units for group in small.groups}
        before = meter(widths)
        order = torch.randperm(len(small.groups), generator=torch.Generator().manual_seed(seed)).tolist()
        for place in order * 3:
            group = small.groups[place]
            widths[group.name] = max(1, widths[group.name] // 2)
            after = meter(widths)
            assert after <= before
            before = after


@pytest.mark.parametrize("name", NAMES)
def test_a_meter_is_a_pure_function(name: str, small: Subject) -> None:
    meter = _meter(name, small)
    widths = kept_counts(small.groups, random_plan(small.groups, 1))
    before = dict(widths)
    first = meter(widths)
    meter({})
    assert meter(widths) == first
    assert widths == before
    if name not in MEASURED:
        assert _meter(name, small)(widths) == first


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_as_it_was(name: str, small: Subject) -> None:
    if name in MEASURED and small.name != "vit":
        return
    model = copy.deepcopy(small.model).train()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    meter = _meter(name, small, model)
    meter(kept_counts(small.groups, random_plan(small.groups, 1)))
    assert snapshot(model) == before


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MEASURED])
def test_the_prediction_comes_true(name: str, small: Subject) -> None:
    assert name in EXACT, "say there how its cost is counted on a slim model, or name it in MEASURED"
    plan = random_plan(small.groups, 6)
    slim = prune(small.model, small.groups, plan).model
    expected = EXACT[name](slim, small.groups, plan, small.example)
    assert _meter(name, small)(kept_counts(small.groups, plan)) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_a_plan_reaches_the_target(name: str, ratio: float, small: Subject) -> None:
    price = Price(name, BUDGETS.build(name).unit, _meter(name, small))
    scores = {group.name: torch.arange(group.units, dtype=torch.float32) for group in small.groups}
    try:
        plan = make_plan(small.groups, scores, price, ratio, Limits("uniform", 1, 0.0))
    except BudgetError:
        if small.name == "vit" or name in MEASURED:  # much is fixed, or dispatch dominates
            return
        raise
    assert plan.cost_planned <= plan.cost_target * (1 + 1e-9)
    assert plan.cost_planned == price(kept_counts(small.groups, plan))
    assert plan.cost_dense == price({})


@pytest.mark.parametrize("name", NAMES)
def test_options_survive_text_and_json(name: str) -> None:
    built = BUDGETS.build(name)
    assert BUDGETS.build(BUDGETS.text(built)) == built
    recipe = Recipe("resnet50", 0.5, budget=name)
    assert BUDGETS.build(Recipe.from_json(json.dumps(json.loads(recipe.to_json()))).budget) == built


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_that_says_nothing_follows_the_budget(name: str) -> None:
    budget = BUDGETS.get(name)
    assert Budget in budget.__mro__
    recipe = Recipe("resnet50", 0.5, budget=name)
    assert (recipe.normalise, recipe.round_to) == (budget.normalise, budget.round_to)


def test_channels_count_every_unit_once() -> None:
    subject = subject_named("vit")
    meter = _meter("channels", subject)
    assert meter({}) == 2 * (4 + 96)
    assert meter({"blocks.0.attn": 1, "blocks.1.mlp.fc1": 10}) == 1 + 96 + 4 + 10
