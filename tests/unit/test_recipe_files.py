"""Recipes from files and from options of the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pxcompress.commands.options import recipe_of
from pxcompress.errors import InputError
from pxcompress.recipe import Bench, Guarantee, Recipe


def test_a_file_and_options_make_one_recipe(tmp_path: Path) -> None:
    options = {"model": "resnet18", "ratio": 0.5, "batch_size": 4, "max_drop": 0.1, "repair": ["none"]}
    recipe = recipe_of(options, None)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert recipe_of({}, tmp_path / "recipe.json") == recipe
    (tmp_path / "recipe.toml").write_text('model = "resnet18"\nratio = 0.3\nrepair = ["fold"]\n[bench]\nthreads = 2\n')
    read = recipe_of({"seed": 3, "batch_size": 8, "ratio": 0.7}, tmp_path / "recipe.toml")
    assert (read.ratio, read.repair, read.bench, read.seed) == (0.7, ("fold",), Bench(8, "auto", 2), 3)


EVERY = Recipe(
    "resnet50",
    0.7,
    data="glyphs",
    task="segmentation",
    checkpoint="mine.pth",
    input_size=64,
    input_mean="0.4,0.5,0.6",
    input_std="0.2",
    input_scale=255.0,
    layout="nhwc",
    classes=("cat", "dog"),
    skip_corrupt=True,
    seed=7,
    budget="params",
    scorer="lrp:centre=true",
    normalise="norm",
    repair=("fold",),
    round_to=4,
    min_keep=0.2,
    floors=("layer4.*=0.5",),
    only=("layer*",),
    keep=("layer1.*",),
    scope="inner",
    class_scores=True,
    bench=Bench(8, "cpu", 3),
    guarantee=Guarantee(0.05, 0.9, "disagreement", 5, "confident", 0.7),
    targets=("fp32", "int8"),
    max_quant_drop=0.02,
    fixed_batch=True,
    dynamic_size=True,
    temperature_scaling=True,
    against=("resnet18", "small=mine.pth"),
)


NOT_WITH_THE_OTHERS = {"speedup", "latency_ms", "max_bytes", "relevance_share", "rounds", "group"}


def test_a_file_may_hold_options_as_on_the_command_line(tmp_path: Path) -> None:
    """Without the parts of a recipe, with dashes, and as Windows's editor saves it, with a byte-order mark."""
    lines = ('model = "resnet18"', "ratio = 0.3", 'score = "magnitude"', "max-drop = 0.03", 'provider = "cpu"')
    (tmp_path / "recipe.toml").write_text("\ufeff" + "\n".join([*lines, "[bench]", "threads = 2"]), encoding="utf-8")
    read = recipe_of({}, tmp_path / "recipe.toml")
    bench, guarantee = Bench(provider="cpu", threads=2), Guarantee(0.03)
    assert read == Recipe("resnet18", 0.3, scorer="magnitude", bench=bench, guarantee=guarantee)


def test_no_option_is_forgotten_below() -> None:
    default = Recipe("m", 0.5)
    for mine, other in ((EVERY, default), (EVERY.bench, default.bench), (EVERY.guarantee, Guarantee(0.1))):
        same = {f.name for f in dataclasses.fields(mine) if getattr(mine, f.name) == getattr(other, f.name)}
        assert same == NOT_WITH_THE_OTHERS & {f.name for f in dataclasses.fields(mine)}


def _toml(content: dict[str, Any]) -> str:
    """What there is in JSON is the same in TOML, but for null and for tables, which come last."""
    plain = {key: value for key, value in content.items() if value is not None}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items() if not isinstance(value, dict)]
    for key, value in plain.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", *(f"{name} = {json.dumps(part)}" for name, part in value.items())]
    return "\n".join(lines)


@pytest.mark.parametrize("recipe", [EVERY, Recipe("m", speedup=2.0, rounds=1), Recipe("m", relevance_share=0.1)])
@pytest.mark.parametrize(
    ("suffix", "text"), [("json", json.dumps), ("toml", _toml), ("yaml", yaml.safe_dump), ("YML", yaml.safe_dump)]
)
def test_every_option_may_come_from_a_file(
    tmp_path: Path, recipe: Recipe, suffix: str, text: Callable[[dict[str, Any]], str]
) -> None:
    content = {key.replace("_", "-"): value for key, value in json.loads(recipe.to_json()).items()}
    (tmp_path / f"recipe.{suffix}").write_text(text(content))
    read = recipe_of({}, tmp_path / f"recipe.{suffix}")
    assert (read, read.hash) == (recipe, recipe.hash)


@pytest.mark.parametrize("text", ["a: [", "- 1", "1: 2", "model: !!python/object/apply:os.getcwd []", "\t"])
def test_yaml_that_is_no_recipe_is_one_line_and_runs_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        recipe_of({}, tmp_path / "recipe.yaml")
    assert "\n" not in str(caught.value)


def test_a_recipe_of_another_version_is_one_line(tmp_path: Path) -> None:
    content = {**json.loads(EVERY.to_json()), "sharpness": 1}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="unknown recipe key 'sharpness'; known: against, bench") as caught:
        recipe_of({}, tmp_path / "recipe.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "expected .json, .toml or .yaml"), ("[]", "holds a list"), ('{"modle": 1}', "did you mean")],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(InputError, match=message):
        recipe_of({"model": "resnet18", "ratio": 0.5}, tmp_path / "recipe.json")
    with pytest.raises(InputError, match="cannot be read"):
        recipe_of({}, tmp_path / "missing.json")
    with pytest.raises(InputError, match="no model"):
        recipe_of({}, None)
