"""A user's own class of every kind, outside of the package, serves by its name, as an object, and when read back."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pxcompress import compress_module, load
from pxcompress.commands.options import recipe_of
from pxcompress.deploy import runtime
from pxcompress.errors import InputError
from pxcompress.recipe import Bench, Recipe
from pxcompress.registry import name_of
from pxcompress.report.build import read_report

MODULE = """
from dataclasses import dataclass
import torch
from pxcompress.budgets.macs import MACs
from pxcompress.deploy.backends.onnxruntime import OnnxRuntime
from pxcompress.registry import option
from pxcompress.repair.batchnorm import BatchNormStatistics
from pxcompress.tasks.agreement import Agreement
from pxcompress.types import Scorer, Budget, Repair


@dataclass(frozen=True)
class Middle(Scorer):
    power: float = option(1.0, "power", low=0.5)

    def __call__(self, model, groups, batches):
        return {group.name: torch.arange(group.units, dtype=torch.float32) ** self.power for group in groups}


@dataclass(frozen=True)
class Energy(MACs):
    weight: int = option(3, "weight")


@dataclass(frozen=True)
class Norms(BatchNormStatistics):
    strong: bool = option(False, "strong")


@dataclass(frozen=True)
class Alike(Agreement):
    word: str = option("a", "word")


@dataclass(frozen=True)
class Runtime(OnnxRuntime):
    def get_device(self, provider):
        return "cuda"

    def explain_failure(self, provider):
        return ""


@dataclass(frozen=True)
class Plain:
    pass
"""
OWN = {
    "scorer": ("my_methods:Middle:power=2.0", "power"),
    "budget": ("my_methods:Energy:weight=5", "weight"),
    "repair": ("my_methods:Norms:strong=true", "strong"),
    "task": ("my_methods:Alike:word=b", "word"),
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The user's module, in the current folder."""
    (tmp_path / "my_methods.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield import_module("my_methods")
    del sys.modules["my_methods"]


def _recipe(kind: str, value: object) -> Recipe:
    return Recipe("resnet50", 0.5, **{kind: [value] if kind == "repair" else value})  # type: ignore[arg-type]


def _text(recipe: Recipe, kind: str) -> str:
    value = getattr(recipe, kind)
    return str(value[0] if kind == "repair" else value)


@pytest.mark.parametrize("kind", OWN)
def test_a_class_of_every_kind_serves_as_text_as_object_in_files_and_when_read(kind: str, own: Any) -> None:
    text, option = OWN[kind]
    recipe = _recipe(kind, text)
    assert _text(recipe, kind) == text
    assert Recipe.from_json(recipe.to_json()) == recipe
    Path("recipe.toml").write_text(f'model = "resnet50"\nratio = 0.5\n{kind} = "{text}"\n')
    assert recipe_of({}, Path("recipe.toml")) == recipe
    name, _, value = text.rpartition(f":{option}=")
    instance = getattr(own, name.partition(":")[2])(**{option: json.loads(value) if kind != "task" else value})
    assert _recipe(kind, instance) == recipe
    assert name_of(text) == name


@pytest.mark.parametrize("kind", OWN)
def test_what_cannot_be_taken_is_refused_in_one_line(kind: str, own: Any) -> None:
    if kind != "task":  # checked with the data
        with pytest.raises(
            InputError, match=rf"^{kind} 'my_methods:Plain' cannot be taken; expected a dataclass derived"
        ):
            _recipe(kind, "my_methods:Plain")
        with pytest.raises(
            InputError, match=rf"^{kind} 'gone:Class': .* put the folder that holds gone on PYTHONPATH$"
        ):
            _recipe(kind, "gone:Class")
        with pytest.raises(InputError, match="unknown option of"):
            _recipe(kind, f"my_methods:{OWN[kind][0].split(':')[1]}:nothing=1")


def test_a_class_inside_a_function_is_refused(own: Any) -> None:
    class Inner(own.Middle):  # type: ignore[misc]
        pass

    with pytest.raises(InputError, match="expected a class at the top of a module"):
        _recipe("scorer", Inner())


def test_a_backend_says_its_device_whatever_its_providers_are_called(own: Any) -> None:
    assert Bench(provider="my_methods:Runtime").provider == "my_methods:Runtime"
    assert runtime.get_device("my_methods:Runtime") == "cuda"
    with pytest.raises(InputError, match="unknown provider 'nothing'"):
        Bench(provider="nothing")


@pytest.mark.slow
def test_a_saved_folder_is_read_where_the_module_is_and_says_what_is_missing_elsewhere(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    batches = [torch.randn(16, 6) for _ in range(3)]
    slim = compress_module(
        net,
        batches[0][:1],
        batches,
        0.5,
        scorer=own.Middle(2.0),
        budget="my_methods:Energy",
        repair=["my_methods:Norms"],
        task=own.Alike("b"),
        round_to=1,
    )
    slim.save("mine", batches)
    assert read_report(Path("mine")).recipe.scorer == "my_methods:Middle:power=2.0"
    assert load("mine", net)(batches[0]).shape == (16, 4)
    monkeypatch.delitem(sys.modules, "my_methods")
    Path("my_methods.py").rename("elsewhere.txt")
    for read in (lambda: load("mine", net), lambda: read_report(Path("mine"))):
        with pytest.raises(InputError, match="put the folder that holds my_methods on PYTHONPATH") as caught:
            read()
        assert "\n" not in str(caught.value)
    sys.modules["my_methods"] = own
