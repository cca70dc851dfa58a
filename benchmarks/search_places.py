"""Where the searches of `search.py` take place: models, tasks and images, and what a choice is worth there."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks.models

import models
import optuna

from pxcompress.attribution import has_attention
from pxcompress.data import load_splits, restricted
from pxcompress.graph import masked
from pxcompress.models.task import sliced
from pxcompress.planning.order import lowest
from pxcompress.recipe import Recipe
from pxcompress.search import SearchPlan
from pxcompress.search.objectives import PXP_RATES, Workbench, objective, only_masked, ratios_for, shipped, slim_at
from pxcompress.search.run import Search, work_on_trials
from pxcompress.search.space import space_of, trial_repairs, with_repairs
from pxcompress.search.study import quiet
from pxcompress.subject import Subject
from pxcompress.types import Splits

LABELS = ("VGG", "ResNet", "bottleneck", "ViT")
TASKS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "3 classes": (("2", "3", "4"), ("5", "6", "8"), ("A", "K", "X")),
    "all": ((), (), ()),
}
"""Name of a task -> the classes of each seed."""

RATIOS = {
    "VGG": {"3 classes": 0.92, "all": 0.8},
    "ResNet": {"3 classes": 0.92, "all": 0.75},
    "bottleneck": {"3 classes": 0.92, "all": 0.75},
    "ViT": {"3 classes": 0.8, "all": 0.6},
}
"""Share of the MACs that goes in part "repaired": at a half, repaired models lose too little to tell choices apart."""

IMAGES = {
    "3 classes": {"score": 30, "repair": 192, "select": 120, "certify": 2, "test": 150},
    "all": {"score": 80, "repair": 192, "select": 120, "certify": 2, "test": 150},
}
"""PXP has 10 reference images of each class; of all 40 it is 2 here."""

MODES = {"masked": "pxp", "repaired": "operating-point"}
PRESETS = ("epsilon", "zplus", "gamma")


@dataclass(frozen=True, eq=False)
class Place:
    """A trained model, its task, and the images of one seed; `bench` knows the parts score, repair and select."""

    label: str
    task: str
    seed: int
    recipe: Recipe
    splits: Splits
    bench: Workbench
    mask: Callable[[str], Any]

    @property
    def words(self) -> dict[str, Any]:
        """What a row says of it."""
        return {"model": self.label, "task": self.task, "seed": self.seed, "dense": self.bench.dense}


@cache
def _subject(label: str) -> Subject:
    return models.subject_of(label)


def place_of(label: str, task: str, seed: int, images: Mapping[str, int]) -> Place:
    subject, classes = _subject(label), TASKS[task][seed]
    source, model = subject.source, subject.loaded.model
    if classes:
        model = sliced(model, subject.splits.example, [source.classes.index(name) for name in classes])
        source = restricted(source, classes, seed)
    splits = load_splits(source, subject.loaded.preprocessing, limits=images, seed=seed)
    ratio = RATIOS[label][task]
    recipe = Recipe(model=label, ratio=ratio, budget="macs", round_to=4, data="glyphs", classes=classes, seed=seed)
    bench = Workbench.of(model, splits.example, splits.parts, recipe, labels=True)
    return Place(label, task, seed, recipe, splits, bench, source.mask)


def search_of(place: Place, mode: str, trials: int = 1, sampler: str = "tpe") -> Search:
    """A search on the select part, with the repairs of trials."""
    name = MODES[mode]
    recipe = place.recipe.but(repair=trial_repairs(place.recipe.repair))
    attention = has_attention(place.bench.scored.model, place.splits.example)
    space = space_of(recipe, objective(name).space, attention=attention)
    plan = SearchPlan(objective=name, trials=trials, sampler=sampler)
    return Search(plan, recipe, objective(name), ratios_for(name, recipe, ""), space, place.bench, _silent)


def searched(search: Search) -> optuna.Study:
    """Its trials, in memory."""
    with quiet():
        return work_on_trials(search, optuna.storages.InMemoryStorage())


def _silent(message: str) -> None:
    """Nobody wants to read of every trial."""


def presets_of(search: Search) -> dict[str, Recipe]:
    starts = search.space.starts()
    found = {}
    for name in PRESETS:
        values = next(
            each for each in starts if {each[part] for part in ("low", "mid", "high", "classifier")} == {name}
        )
        found[name] = search.space.recipe_at(values)
    return found


def in_full(place: Place, recipe: Recipe) -> Recipe:
    """With the default repairs, the strength of those that trials have as it was chosen."""
    return with_repairs(recipe, place.recipe.repair)


def value_on_select(place: Place, mode: str, recipe: Recipe) -> float:
    if mode == "masked":
        return sum(only_masked(place.bench, recipe, rate) for rate in PXP_RATES) / len(PXP_RATES)
    return shipped(place.bench, in_full(place, recipe), place.recipe.ratio or 0.0)


def right_on_test(place: Place, mode: str, recipe: Recipe) -> Tensor:
    """Whether the objective's models, one or one a rate, are right on every test image: 0 or 1, (models, images)."""
    if mode == "repaired":
        return hits(slim_model(place, in_full(place, recipe)), place)[None]
    scored = place.bench.with_scores(recipe)
    groups = scored.structure.groups
    plans = (lowest(groups, scored.scores, rate, recipe.normalise) for rate in PXP_RATES)
    return torch.stack([hits(masked(scored.model, groups, plan), place) for plan in plans])


def slim_model(place: Place, recipe: Recipe) -> nn.Module:
    return slim_at(place.bench, recipe, recipe.ratio or 0.0).pruned.model


def hits(model: nn.Module, place: Place) -> Tensor:
    with torch.no_grad():
        return torch.cat([(model(inputs).argmax(1) == labels).double() for inputs, labels in place.splits.test])


def interval(difference: Tensor) -> tuple[float, float]:
    """Mean over the images and half its 95 % interval."""
    return float(difference.mean()), 1.96 * float(difference.std()) / math.sqrt(len(difference))
