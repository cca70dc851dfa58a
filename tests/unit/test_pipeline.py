"""The pipeline without files: one's own module in memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import CLASSES, FlattenCNN

from pxcompress import InputError, Recipe, compress_module
from pxcompress.clock import Clock
from pxcompress.errors import BudgetError
from pxcompress.graph import removal_error
from pxcompress.run import Run
from pxcompress.stages import ever_smaller, prune_and_repair, score
from pxcompress.state import seeded
from pxcompress.tasks.classification import Classification
from pxcompress.types import Batch


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    with seeded(0):
        return [(torch.randn(16, 3, 12, 12), torch.randint(CLASSES, (16,))) for _ in range(4)]


def _agreement(first: torch.nn.Module, second: torch.nn.Module, batches: list[Batch]) -> float:
    """Share of the dense logits' variance that the other model explains."""
    with torch.no_grad():
        a, b = (torch.cat([model(inputs) for inputs, _ in batches]) for model in (first, second))
    return float(1 - (a - b).square().sum() / (a - a.mean(0)).square().sum())


def test_a_module_of_ones_own_gets_smaller_and_keeps_its_outputs(batches: list[Batch]) -> None:
    with seeded(3):
        model = FlattenCNN().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"ratio": 0.4, "budget": "channels", "round_to": 1, "scorer": "lrp-residual"}
    slim = compress_module(model, batches[0][0][:1], batches, repair=("fold",), **options)
    bare = compress_module(model, batches[0][0][:1], batches, repair=(), **options)
    units = sum(group.units for group in slim.structure.groups)
    units_left = sum(len(slim.pruned.plan.kept(group)) for group in slim.structure.groups)
    assert units_left == units - -(-units * 4 // 10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert slim.pruned.plan == bare.pruned.plan
    assert removal_error(bare.pruned, batches[0][0]) < 1e-5
    assert _agreement(model, slim.pruned.model, batches) > _agreement(model, bare.pruned.model, batches)


def test_options_are_those_of_the_recipe(batches: list[Batch]) -> None:
    with pytest.raises(InputError, match="lrp"):
        compress_module(FlattenCNN(), batches[0][0][:1], batches, 0.4, scorer="lpr")
    with pytest.raises(BudgetError, match="largest reachable"):
        compress_module(FlattenCNN(), batches[0][0][:1], batches, 0.999, scorer="random")


@pytest.mark.parametrize("scorer", ["random", "lrp-residual"])
def test_the_seed_decides_every_draw(batches: list[Batch], scorer: str) -> None:
    with seeded(3):
        model = FlattenCNN().eval()
    plans = []
    for seed in (1, 1, 2):
        torch.rand(seed)  # whatever was drawn before must not matter
        recipe = {"seed": seed, "scorer": scorer, "round_to": 1, "repair": ()}
        plans.append(compress_module(model, batches[0][0][:1], batches, 0.4, **recipe).pruned.plan)
    assert plans[0] == plans[1]
    assert (plans[0] != plans[2]) == (scorer == "random")


def test_accuracy_is_measured_after_every_stage_that_changes_the_model(batches: list[Batch]) -> None:
    told: list[str] = []
    clock = Clock(told.append)
    parts = {"score": batches, "repair": batches, "select": batches}
    recipe = Recipe("mine", 0.4, scorer="magnitude", round_to=1)
    prune_and_repair(FlattenCNN().eval(), batches[0][0][:1], Run(recipe, parts, clock, Classification()))
    measured = [stage.name for stage in clock.stages if stage.quality_after is not None]
    assert measured == ["prune", "fold", "least-squares", "batchnorm", "finetune"]
    assert any("top-1" in line for line in told)


def test_a_path_starts_dense_and_ends_at_the_asked_ratio(batches: list[Batch]) -> None:
    with seeded(3):
        model = FlattenCNN().eval()
    recipe = Recipe("mine", 0.5, scorer="magnitude", round_to=1, repair=("closed-form",))
    parts = {"score": batches, "repair": batches}
    run = Run(recipe, parts)
    scored = score(model, batches[0][0][:1], run)
    slims = list(ever_smaller(scored, (0.5, 0.25, 0.25001, 0.1), run))
    plans = [slim.pruned.plan for slim in slims]
    assert plans[0].removed == {}
    assert _agreement(model, slims[0].pruned.model, batches) == 1
    assert [plan.cost_planned for plan in plans] == sorted({plan.cost_planned for plan in plans}, reverse=True)
    for larger, smaller in itertools.pairwise(plans[1:]):
        assert all(set(units) <= set(smaller.removed[name]) for name, units in larger.removed.items())
    alone = prune_and_repair(model, batches[0][0][:1], Run(recipe, parts))
    assert alone.pruned.plan == plans[-1]
    assert _agreement(alone.pruned.model, slims[-1].pruned.model, batches) == pytest.approx(1)
    assert [stage.name for stage in run.clock.stages].count("plan") == 1


def test_a_path_that_is_too_steep_is_refused_before_any_cut(batches: list[Batch]) -> None:
    recipe = Recipe("mine", 0.5, scorer="magnitude")
    parts = {"score": batches, "repair": batches}
    run = Run(recipe, parts)
    scored = score(FlattenCNN().eval(), batches[0][0][:1], run)
    with pytest.raises(BudgetError, match=r"no plan removes 0\.999"):
        ever_smaller(scored, (0.1, 0.999), run)


def test_an_unreachable_ratio_is_refused_before_anything_is_scored(batches: list[Batch]) -> None:
    with pytest.raises(BudgetError, match="largest reachable"):
        score(FlattenCNN().eval(), batches[0][0][:1], Run(Recipe("mine", 0.999), {}))
