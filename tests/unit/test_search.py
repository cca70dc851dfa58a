"""A search: its space, its two objectives, its study."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from models import FlattenCNN, Subject, subject

from pxcompress.attribution import COMPOSITES, has_attention, parse_composite
from pxcompress.errors import ResultError
from pxcompress.graph import mask_units
from pxcompress.layout.rows import input_layouts
from pxcompress.passes.moments import MomentCache, collect_moments
from pxcompress.preparation import prepare
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.scorers import SCORERS
from pxcompress.search.objectives import PXP_RATES, Workbench, masked_area, prune_at, shipped_quality
from pxcompress.search.space import Space, make_pxp_space, make_space
from pxcompress.search.study import SAMPLERS, SearchPlan, load_optuna, open_storage, open_study, work
from pxcompress.stages import prune_and_repair
from pxcompress.state import seeded
from pxcompress.tasks.agreement import Agreement
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.regression import Regression
from pxcompress.tasks.task import Task
from pxcompress.types import Batch, Plan

TASKS_OF_LOGITS = (Classification(), Regression(), Agreement())
"""Tasks for outputs (n, classes), with different measures of how near they are to the dense ones."""

RECIPE = Recipe(model="m", ratio=0.5, budget="macs", round_to=1)


def _space(**fields: Any) -> Space:
    return make_space(RECIPE.but(**fields), attention=True)


def test_every_searched_option_is_a_parameter_and_nothing_else() -> None:
    names = {parameter.name for parameter in _space().parameters}
    scorers = {"start", "aggregate", "centre", "metric", "follow"}
    parts = ("low", "mid", "high", "classifier")
    rules = {*parts, *(f"{part}.{name}" for part in parts for name in ("epsilon", "gamma")), "softmax"}
    assert names == {*scorers, *rules, "scorer", "normalise"}
    assert "softmax" not in {each.name for each in make_space(RECIPE, attention=False).parameters}


def test_scorers_that_share_a_parameter_agree_on_it() -> None:
    seen: dict[str, Any] = {}
    for name, field in itertools.chain.from_iterable(
        ((field.name, field) for field in SCORERS.options(scorer)) for scorer in ("lrp", "lrp-residual")
    ):
        if field.metadata.get("searched"):
            assert seen.setdefault(name, field.metadata["choices"]) == field.metadata["choices"]


@pytest.mark.parametrize("scorer", ["lrp-residual", "lrp:aggregate=squared,target=label", "lrp-residual:ridge=0.1"])
@pytest.mark.parametrize("composite", ["epsilon", "pxp-cnn", "zplus"])
def test_the_defaults_are_the_recipe(scorer: str, composite: str) -> None:
    sign = "," if ":" in scorer else ":"
    space = _space(scorer=f"{scorer}{sign}composite={composite}")
    assert space.recipe_at(space.defaults) == space.recipe


def test_the_default_may_be_a_scorer_without_rules() -> None:
    space = _space(scorer="taylor:start=logit")
    assert space.recipe_at(space.defaults) == space.recipe
    assert {recipe.scorer.partition(":")[0] for recipe in map(space.recipe_at, space.starts()[1:])} == {"lrp-residual"}


def test_a_choice_by_hand() -> None:
    space = _space()
    chosen = {"low": "gamma", "low.gamma": 0.12345, "classifier": "zplus", "softmax": "attn"}
    recipe = space.recipe_at({**space.defaults, **chosen, "scorer": "lrp", "centre": "true", "normalise": "max"})
    text = "low=gamma(0.123)/gamma(0.0246)|mid=epsilon|high=epsilon|classifier=zplus|softmax=attn"
    assert recipe.scorer == f"lrp:composite={text},centre=true"
    assert (recipe.normalise, recipe.repair) == ("max", RECIPE.repair)
    assert str(parse_composite(text)) == text


@pytest.mark.parametrize("make", [make_space, make_pxp_space])
def test_a_search_begins_with_the_default_and_the_named_composites(make: Any) -> None:
    space = make(RECIPE, attention=True)
    recipes = [space.recipe_at(values) for values in space.starts()]
    assert recipes[0] == space.recipe_at(space.defaults)
    composites = [parse_composite(SCORERS.build(recipe.scorer).composite) for recipe in recipes]
    named = ("epsilon", "gamma", "zplus", "alpha2beta1", "pxp-cnn", "pxp-vit")
    assert set(composites) == {parse_composite(COMPOSITES[key]) for key in named}
    assert len({recipe.scorer for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize(("attention", "choices"), [(False, 512), (True, 1536)])
def test_pxps_space_is_as_large_as_pxps(attention: bool, choices: int) -> None:
    space = make_pxp_space(RECIPE, attention=attention)
    grid = itertools.product(*(parameter.choices for parameter in space.parameters))
    names = [parameter.name for parameter in space.parameters]
    assert len({space.recipe_at(dict(zip(names, values, strict=True))).scorer for values in grid}) == choices


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return _bench(subject("flatten_cnn"))


def _bench(net: Subject, *, recipe: Recipe = RECIPE, task: Task | None = None) -> Workbench:
    with seeded(5):
        parts = {role: _batches(net) for role in ("score", "repair", "select")}
    return Workbench(*prepare(net.model, net.inputs[:1], Run(recipe, parts, task=task or Classification())))


def _batches(net: Subject) -> list[Batch]:
    inputs = [torch.randn(12, *net.inputs.shape[1:]) for _ in range(3)]
    with torch.no_grad():  # labels that the model mostly gets right, so that accuracy says something
        return [(x, net.model(x + 0.3 * torch.randn_like(x)).argmax(1)) for x in inputs]


def test_pxp_is_the_mean_accuracy_of_masked_models(bench: Workbench) -> None:
    space = make_pxp_space(RECIPE, attention=False)
    groups = bench.prepared.structure.groups
    scores = SCORERS.build("lrp")(bench.prepared.model, groups, bench.run.parts["score"])
    order = sorted(
        (float(value), place, unit)
        for place, group in enumerate(groups)
        for unit, value in enumerate(scores[group.name])
    )
    total = 0.0
    for rate in PXP_RATES:
        lowest = order[: round(rate * len(order))]
        removed = {
            group.name: tuple(unit for _, place, unit in lowest if place == here) for here, group in enumerate(groups)
        }
        total += _accuracy(
            mask_units(bench.prepared.model, groups, Plan(removed, "", "", 0, 0, 0)), bench.run.parts["select"]
        )
    assert tuple(k / 20 for k in range(20)) == PXP_RATES
    assert masked_area(bench, space.recipe_at(space.defaults)) == pytest.approx(total / 20)


def _accuracy(model: torch.nn.Module, batches: Any) -> float:
    with torch.no_grad():
        right = [
            float(label) == float(logits.argmax())
            for x, y in batches
            for logits, label in zip(model(x), y, strict=True)
        ]
    return sum(right) / len(right)


@pytest.mark.parametrize(
    "changes",
    [
        *({"scorer": name} for name in SCORERS),
        {"normalise": "knapsack", "min_keep": 0.2},
        {"repair": ("fold", "finetune:steps=3"), "seed": 7},
        {"repair": (), "normalise": "mean", "budget": "params", "ratio": 0.3},
        {"class_scores": True, "scope": "inner", "floors": ("*=0.2",)},
    ],
    ids=str,
)
def test_what_is_measured_is_what_run_makes(changes: dict[str, Any]) -> None:
    _assert_that_a_trial_measures_what_run_makes("flatten_cnn", RECIPE.but(**changes), Classification())


@pytest.mark.parametrize("task", TASKS_OF_LOGITS, ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("family", ["flatten_cnn", "vit"])
def test_streams_are_rotated_and_repairs_are_chosen_as_the_task_says(family: str, task: Task) -> None:
    recipe = RECIPE.but(repair=("fold", "batchnorm"), temperature_scaling=isinstance(task, Classification))
    _assert_that_a_trial_measures_what_run_makes(family, recipe.but(scorer="magnitude"), task)


def _assert_that_a_trial_measures_what_run_makes(family: str, recipe: Recipe, task: Task) -> None:
    net = subject(family)
    bench = _bench(net, recipe=recipe, task=task)
    measured = prune_at(bench, recipe)
    with seeded(recipe.seed):
        torch.rand(3)  # where the generator stands does not count
        parts = {role: list(part) for role, part in bench.run.parts.items()}
        made = prune_and_repair(net.model, net.inputs[:1], Run(recipe, parts, task=task))
    assert measured.pruned.plan == made.pruned.plan

    assert any(group.kind == "direction" for group in made.pruned.groups) == (family == "vit")
    assert measured.agreements == made.agreements, "the task says how near outputs are"
    assert measured.temperature == made.temperature
    state, expected = measured.pruned.model.state_dict(), made.pruned.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_infinite_scores_end_a_trial(bench: Workbench) -> None:
    spoiled = copy.deepcopy(bench.prepared.model)
    for weight in spoiled.parameters():
        weight.data.fill_(torch.inf)
    there = dataclasses.replace(bench, prepared=dataclasses.replace(bench.prepared, model=spoiled), scored={})
    with pytest.raises(ResultError, match="NaN or infinity"):
        shipped_quality(there, RECIPE.but(scorer="magnitude"))


class _Counted(list[Batch]):
    passes = 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        return super().__iter__()


def test_moments_are_computed_once_for_the_model_they_are_of() -> None:
    net = subject("flatten_cnn")
    batches = _Counted([(net.inputs, torch.zeros(len(net.inputs), dtype=torch.int64))])
    layouts = input_layouts(net.model, net.groups)
    cache = MomentCache(batches, net.model)
    expected = collect_moments(net.model, layouts, batches)
    some = dict(list(layouts.items())[:1])
    for wanted in (some, layouts, some, layouts):
        moments = collect_moments(net.model, wanted, cache)
        assert list(moments) == list(wanted)
        assert all(torch.equal(moments[name].whole.second, expected[name].whole.second) for name in wanted)
    assert batches.passes == 1 + 2  # the first, and one for each set of names that was not known
    with seeded(1):
        other = collect_moments(FlattenCNN().eval(), layouts, cache)
    assert not torch.allclose(other["fc1"].whole.second, expected["fc1"].whole.second)


@pytest.mark.parametrize(("family", "has"), [("vit", True), ("flatten_cnn", False), ("mobilenetv3", False)])
def test_attention_is_found(family: str, has: bool) -> None:
    net = subject(family)
    assert has_attention(net.model, net.inputs[:1]) is has


def test_attention_of_torch_is_found() -> None:
    with seeded(0):
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert has_attention(layer, torch.randn(1, 3, 8))


# --- the study


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_study_goes_on_where_it_was_interrupted(
    bench: Workbench, tmp_path: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, plan = f"sqlite:///{tmp_path}/trials.db", SearchPlan("pxp", sampler, trials=9)
    space, measured = make_pxp_space(RECIPE, attention=False), []

    def area(bench: Workbench, recipe: Recipe, trial: optuna.Trial) -> float:
        measured.append(recipe.scorer)
        if len(measured) == 4:
            raise KeyboardInterrupt
        if len(measured) == 6:
            raise ResultError("no")
        return len(measured) / 100

    monkeypatch.setattr("pxcompress.search.study.masked_area", area)
    notes: list[str] = []
    with load_optuna(url), pytest.raises(KeyboardInterrupt):
        work(open_study(open_storage(url), space, plan), space, plan, bench, notes.append)
    for _ in range(2):
        with load_optuna(url):
            study = open_study(open_storage(url), space, plan)
            work(study, space, plan, bench, notes.append)
    assert len(measured) == 9, "nothing more where all trials are done"
    assert measured[:3] == [space.recipe_at(values).scorer for values in space.starts()[:3]]
    states = [trial.state.name for trial in study.get_trials() if trial.state.is_finished()]
    assert states == ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] + ["FAIL"] + ["COMPLETE"] * 3
    assert "trial 6: fail  no" in notes


def test_bad_trials_end_early(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every choice is worse than those before it."""
    url, plan = f"sqlite:///{tmp_path}/trials.db", SearchPlan("pxp", "random", trials=12)
    space, worth = make_pxp_space(RECIPE, attention=False), dict[str, float]()
    monkeypatch.setattr(
        "pxcompress.search.objectives.masked_quality",
        lambda bench, recipe, rate: worth.setdefault(recipe.scorer, -len(worth)),
    )
    with load_optuna(url):
        study = open_study(open_storage(url), space, plan)
        work(study, space, plan, bench, lambda text: None)
    states = [trial.state.name for trial in study.get_trials() if trial.state.is_finished()]
    assert states[0] == "COMPLETE"
    assert states.count("PRUNED") >= 6


@pytest.mark.parametrize("error", [AssertionError, ValueError])
def test_an_error_of_our_own_ends_the_search(
    bench: Workbench, tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> float:
        raise error("ours")

    monkeypatch.setattr("pxcompress.search.study.masked_area", broken)
    url, plan, space = f"sqlite:///{tmp_path}/t.db", SearchPlan("pxp"), make_pxp_space(RECIPE, attention=False)
    with load_optuna(url), pytest.raises(error, match="ours"):
        work(open_study(open_storage(url), space, plan), space, plan, bench, lambda text: None)
