"""Recipes: their parts, texts and goals, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxcompress.commands.options import recipe_of
from pxcompress.errors import InputError
from pxcompress.recipe import Bench, Export, Goal, Guarantee, ModelAndData, Recipe, Repairing, Scoring
from pxcompress.recipe.model_and_data import MOST_SEED
from pxcompress.recipe.repairing import DEFAULT_REPAIR
from pxcompress.recipe.scoring import AUTO_SCORERS
from pxcompress.scorers import SCORERS

PARTS = (ModelAndData, Goal, Scoring, Repairing, Export)


FULL: dict[str, Any] = {
    "model": "hf-hub:owner/name",
    "ratio": 0.3,
    "data": "glyphs",
    "classes": ("b", "a"),
    "checkpoint": "weights.safetensors",
    "input_size": 64,
    "scorer": "magnitude:p=1",
    "budget": "params",
    "normalise": "uniform",
    "round_to": 4,
    "min_keep": 0.25,
    "repair": ("fold:ridge=0.01", "batchnorm"),
    "bench": Bench(batch_size=2, provider="cpu", threads=3),
    "guarantee": Guarantee(0.01, 0.9, "disagreement", 3, "confident", 0.7),
    "skip_corrupt": True,
    "seed": 7,
}


def test_defaults() -> None:
    recipe = Recipe("resnet50", 0.5)
    assert recipe.repair == DEFAULT_REPAIR
    assert recipe.scorers == AUTO_SCORERS
    assert Recipe("resnet50", 0.5, scorer="magnitude").scorers == (SCORERS.text(SCORERS.build("magnitude")),)
    assert (recipe.normalise, Recipe("resnet50", 0.5, budget="channels").normalise) == ("knapsack", "mean")
    assert recipe.bench == Bench()
    assert recipe.label == "resnet50-macs-0.50"


@pytest.mark.parametrize("recipe", [Recipe("resnet50", 0.5), Recipe(**FULL)], ids=["defaults", "full"])
def test_json_round_trip(recipe: Recipe) -> None:
    text = recipe.to_json()
    again = Recipe.from_json(text)
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.to_json() == text
    assert again.hash == recipe.hash
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(Recipe)}


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.floats(0.001, 0.999),
    st.integers(1, 64),
    st.floats(0, 0.99),
    st.text(min_size=1, max_size=10),
    st.integers(0, MOST_SEED),
)
def test_json_round_trip_of_odd_values(ratio: float, round_to: int, min_keep: float, model: str, seed: int) -> None:
    recipe = Recipe(model, ratio, round_to=round_to, min_keep=min_keep, seed=seed)
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("repair", "message"),
    [
        (("batchnorm", "fold"), "'batchnorm' stands before 'fold', whose result it needs; swap them"),
        (("fold,batchnorm",), "repeat the option: --repair fold --repair batchnorm"),
        (("fold", "fold:ridge=0.1"), "'fold' is given 2 times; give it once"),
    ],
)
def test_repairs_stand_in_the_order_in_which_they_build_on_each_other(repair: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe("resnet50", 0.5, repair=repair)


def test_fewer_keys_take_the_defaults() -> None:
    assert Recipe.from_json('{"model": "resnet50", "ratio": 0.5}') == Recipe("resnet50", 0.5)
    text = '{"model": "resnet50", "ratio": 0.5, "bench": {"threads": 2}}'
    assert Recipe.from_json(text).bench == Bench(threads=2)


@pytest.mark.parametrize(
    ("options", "canonical"),
    [
        ({"scorer": "magnitude:p=2"}, {"scorer": "magnitude"}),
        ({"scorer": " magnitude : p = 1 "}, {"scorer": "magnitude:p=1"}),
        ({"repair": ("fold:ridge=1e-2,centred=auto", "batchnorm:")}, {"repair": ("fold:ridge=0.01", "batchnorm")}),
        ({"repair": ()}, {"repair": ()}),
        ({"budget": "macs:"}, {"budget": "macs"}),
    ],
)
def test_texts_are_put_in_their_shortest_form(options: dict[str, Any], canonical: dict[str, Any]) -> None:
    recipe = Recipe("resnet50", 0.5, **options)
    assert recipe == Recipe("resnet50", 0.5, **canonical)
    assert recipe.hash == Recipe("resnet50", 0.5, **canonical).hash
    for key, value in canonical.items():
        assert getattr(recipe, key) == value


def test_the_hash_is_of_the_content() -> None:
    recipe = Recipe(**FULL)
    content = json.loads(recipe.to_json())
    shuffled = json.dumps(dict(reversed(content.items())))
    assert Recipe.from_json(shuffled).hash == recipe.hash
    assert len(recipe.hash) == 64
    others = [
        Recipe("resnet50", 0.5, **{key: value}).hash for key, value in FULL.items() if key not in ("model", "ratio")
    ]
    hashes = [Recipe("resnet50", 0.5).hash, Recipe("resnet18", 0.5).hash, Recipe("resnet50", 0.51).hash, *others]
    assert len(set(hashes)) == len(hashes), "a field does not reach the hash"


def test_no_two_parts_have_a_field_of_one_name() -> None:
    """Each field is one option and one key; a second one of its name would replace it in silence."""
    names = [field.name for part in (*PARTS, Bench, Guarantee) for field in dataclasses.fields(part)]
    assert len(names) == len(set(names))
    own = {"against", "bench", "guarantee"}
    assert {field.name for field in dataclasses.fields(Recipe)} == {n for p in PARTS for n in _names(p)} | own


@pytest.mark.parametrize("part", [Goal(0.3), Scoring(class_scores=True), Repairing(rounds=2), Export(fixed_batch=True)])
def test_a_part_is_a_record_of_its_own(part: Any) -> None:
    """With the values that a recipe of the same words has."""
    values = {name: getattr(part, name) for name in _names(type(part))}
    recipe = Recipe("m", **{"ratio": 0.3, **values})
    assert {name: getattr(recipe, name) for name in values} == values
    assert hash(part) == hash(dataclasses.replace(part))


def _names(part: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(part)]


def test_lists_are_as_good_as_tuples() -> None:
    """As TOML and JSON have them."""
    lists: dict[str, Any] = {
        "repair": ["fold"],
        "only": ["a*"],
        "floors": ["a=0.5"],
        "targets": ["int8"],
        "classes": [],
    }
    recipe = Recipe("m", 0.5, **lists)
    assert recipe == Recipe("m", 0.5, **{name: tuple(value) for name, value in lists.items()})
    assert hash(recipe) == hash(Recipe.from_json(recipe.to_json()))
    with pytest.raises(InputError, match="repair is 'fold'"):
        Recipe("m", 0.5, repair="fold")


def test_but_changes_a_copy() -> None:
    recipe = Recipe("resnet50", 0.5)
    changed = recipe.but(ratio=0.25, scorer="magnitude:p=2")
    assert (recipe.ratio, changed.ratio, changed.scorer) == (0.5, 0.25, "magnitude")
    with pytest.raises(InputError):
        recipe.but(ratio=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.ratio = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "label"),
    [
        ("resnet50.a1_in1k", "resnet50.a1_in1k-macs-0.3333"),
        ("hf-hub:timm/some", "hf-hub_timm_some-macs-0.3333"),
        ("local-dir:../x y", "local-dir_.._x_y-macs-0.3333"),
        ("pkg.mod:factory", "pkg.mod_factory-macs-0.3333"),
    ],
)
def test_labels_are_folder_names(model: str, label: str) -> None:
    assert Recipe(model, 1 / 3, budget="macs").label == label


@pytest.mark.parametrize(
    ("guarantee", "label"),
    [
        (Guarantee(0.03), "a-macs-0.50-drop-0.03"),
        (Guarantee(0.03, part="classes"), "a-macs-0.50-drop-0.03-classes"),
        (Guarantee(0.03, part="confident"), "a-macs-0.50-drop-0.03-confident"),
        (Guarantee(0.03, group="the camera"), "a-macs-0.50-drop-0.03-the_camera"),
    ],
)
def test_labels_name_what_is_guaranteed(guarantee: Guarantee, label: str) -> None:
    assert Recipe("a", 0.5, guarantee=guarantee).label == label


def test_a_coverage_belongs_to_the_confident_part() -> None:
    assert Guarantee(0.03, part="confident") == Guarantee(0.03, part="confident", coverage=0.8)
    assert Guarantee(0.03, part="classes").coverage is None
    for part in ("all", "classes"):
        with pytest.raises(InputError, match="no effect"):
            Guarantee(0.03, part=part, coverage=0.8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": -0.5}, "between 0 and 1"),
        ({"ratio": float("nan")}, "ratio"),
        ({"input_size": 7}, "input-size is 7"),
        ({"input_size": 0}, "input-size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**31}, "from 0 to 2147483647"),
        ({"scorer": "magnitud"}, "did you mean magnitude?"),
        ({"scorer": "magnitude:q=1"}, "unknown option"),
        ({"scorer": "magnitude:p=3"}, "from 1 to 2"),
        ({"budget": "flops"}, "unknown budget 'flops'"),
        ({"normalise": "median"}, "unknown normalisation"),
        ({"round_to": -1}, "round-to"),
        ({"min_keep": 1}, "min-keep"),
        ({"repair": ("fold", "batchnrm")}, "did you mean batchnorm?"),
    ],
)
def test_what_is_unknown_or_out_of_range_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Recipe(**{"model": "resnet50", "ratio": 0.5, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, "batch-size is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"provider": "tpu"}, "tpu"),
    ],
)
def test_bench_is_checked(change: dict[str, Any], words: str) -> None:
    """Before the run, not after minutes of it."""
    with pytest.raises(InputError, match=words):
        Recipe("resnet50", 0.5, bench=Bench(**change))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model": "a", "ratio": 0.5, "ration": 0.4}', "did you mean ratio"),
        ('{"model": "a", "ratio": 0.5, "zzz": 0.4}', "unknown recipe key 'zzz'"),
        ('{"model": "a", "ratio": 0.5, "bench": {"bach_size": 1}}', "did you mean batch_size"),
        ('{"model": "a", "ratio": 2}', "ratio is 2"),
    ],
)
def test_unknown_keys_and_values_in_json_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Recipe.from_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "3",
        "null",
        "{}",
        '{"model": "a"}',
        '{"ratio": 0.5}',
        '{"model": "a", "ratio": "half"}',
        '{"model": "a", "ratio": null}',
        '{"model": 3, "ratio": 0.5}',
        '{"model": "a", "ratio": 0.5, "bench": 3}',
        '{"model": "a", "ratio": 0.5, "bench": {"threads": "many"}}',
        '{"model": "a", "ratio": 0.5, "repair": "fold"}',
        '{"model": "a", "ratio": 0.5, "repair": [1]}',
        '{"model": "a", "ratio": 0.5, "round_to": "8"}',
        '{"model": "a", "ratio": 0.5, "round_to": 8.5}',
        '{"model": "a", "ratio": 0.5, "seed": "x"}',
        '{"model": "a", "ratio": 0.5, "scorer": null}',
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        Recipe.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("goal", "budget", "share", "label"),
    [
        ({"ratio": 0.25}, "macs", 0.25, "m-macs-0.25"),
        ({"speedup": "2x"}, "latency", 0.5, "m-latency-2x"),
        ({"latency_ms": 30.0}, "latency", 0.7, "m-latency-30ms"),
        ({"max_bytes": "80"}, "bytes", 0.2, "m-bytes-80B"),
    ],
)
def test_goals_are_shares_of_the_dense_cost(goal: dict[str, Any], budget: str, share: float, label: str) -> None:
    recipe = recipe_of({"model": "m", **goal}, None)
    assert recipe.budget.partition(":")[0] == budget
    assert recipe.share(100.0) == pytest.approx(share)
    assert recipe.label == label
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        ({}, "nothing says how small; give one of --ratio, --speedup, --latency-ms, --max-bytes"),
        ({"ratio": 0.5, "speedup": "2"}, "--ratio and --speedup are given"),
        ({"speedup": "fast"}, "expected a factor above 1"),
        ({"speedup": "1x"}, "expected a factor above 1"),
        ({"max_bytes": "20 parsec"}, "such as 20MB"),
        ({"max_bytes": "9" * 400}, "such as 20MB"),
        ({"ratio": 0.5, "repair": ["none", "fold"]}, "--repair none is given with other repairs"),
        ({"latency_ms": 3.0, "budget": "macs"}, "--latency-ms counts by latency, --budget says macs"),
    ],
)
def test_goals_that_cannot_be_are_refused(goal: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        recipe_of({"model": "m", **goal}, None)


def test_a_goal_that_is_met_already_is_refused() -> None:
    with pytest.raises(InputError, match="the dense model takes 2 already"):
        Recipe("m", latency_ms=3.0).share(2.0)


def test_sizes_are_read_with_their_unit() -> None:
    sizes = {"80": 80, "1.5KB": 1500, "20MB": 20_000_000, "1 MiB": 1 << 20}
    assert {text: recipe_of({"model": "m", "max_bytes": text}, None).max_bytes for text in sizes} == sizes


def test_what_followed_from_an_old_value_does_not_outlive_it(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"

    def again(old: Recipe, **options: object) -> Recipe:
        file.write_text(old.to_json())
        return recipe_of(options, file)

    channels = Recipe("m", 0.5, budget="channels")
    assert again(channels) == channels
    assert again(channels, budget="macs") == Recipe("m", 0.5, budget="macs")
    assert again(channels, classes="a,b") == channels.but(classes=("a", "b"))
    chosen = Recipe("m", 0.5, budget="channels", normalise="cost", round_to=4, repair=("fold",))
    assert again(chosen, budget="macs") == chosen.but(budget="macs")
    assert again(chosen, classes="a,b") == chosen.but(classes=("a", "b"))
    timed = Recipe("m", speedup=2.0, bench=Bench(batch_size=4, threads=2))
    assert again(timed, batch_size=8) == Recipe("m", speedup=2.0, bench=Bench(batch_size=8, threads=2))
