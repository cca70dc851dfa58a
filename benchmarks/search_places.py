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
from pxcompress.data import load_splits, restrict_classes
from pxcompress.graph import mask_units
from pxcompress.models.task import slice_classes
from pxcompress.planning.order import find_lowest
from pxcompress.preparation import prepare
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.search import SearchPlan
from pxcompress.search.objectives import PXP_RATES, Workbench, masked_area, prune_at, shipped_quality
from pxcompress.search.run import make_search_space
from pxcompress.search.space import Space
from pxcompress.search.study import load_optuna, open_study, work
from pxcompress.tasks.classification import Classification
from pxcompress.types import Splits
from pxcompress.workload import Workload

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
def _subject(label: str) -> Workload:
    return models.subject_of(label)


def place_of(label: str, task: str, seed: int, images: Mapping[str, int]) -> Place:
    workload, classes = _subject(label), TASKS[task][seed]
    source, model = workload.source, workload.loaded.model
    if classes:
        model = slice_classes(model, workload.splits.example, [source.classes.index(name) for name in classes])
        source = restrict_classes(source, classes, seed)
    splits = load_splits(source, workload.loaded.preprocessing, limits=images, seed=seed)
    ratio = RATIOS[label][task]
    recipe = Recipe(model=label, ratio=ratio, budget="macs", round_to=4, data="glyphs", classes=classes, seed=seed)
    bench = Workbench(*prepare(model, splits.example, Run(recipe, splits.parts, task=Classification())))
    return Place(label, task, seed, recipe, splits, bench, source.mask)


def space_at(place: Place, mode: str) -> Space:
    """What a search varies, with the repairs of trials."""
    attention = has_attention(place.bench.prepared.model, place.splits.example)
    return make_search_space(place.recipe, MODES[mode], attention=attention)


def searched(place: Place, mode: str, trials: int, space: Space | None = None) -> optuna.Study:
    """A search on the select part, in memory."""
    plan, space = SearchPlan(MODES[mode], trials=trials), space or space_at(place, mode)
    with load_optuna(""):
        study = open_study(optuna.storages.InMemoryStorage(), space, plan)
        work(study, space, plan, place.bench, _silent)
    return study


def _silent(message: str) -> None:
    """Nobody wants to read of every trial."""


def presets_of(space: Space) -> dict[str, Recipe]:
    starts = space.starts()
    recipes = {}
    for name in PRESETS:
        values = next(
            each for each in starts if {each[part] for part in ("low", "mid", "high", "classifier")} == {name}
        )
        recipes[name] = space.recipe_at(values)
    return recipes


def in_full(place: Place, recipe: Recipe) -> Recipe:
    """With the default repairs."""
    return recipe.but(repair=place.recipe.repair)


def value_on_select(place: Place, mode: str, recipe: Recipe) -> float:
    if mode == "masked":
        return masked_area(place.bench, recipe)
    return shipped_quality(place.bench, in_full(place, recipe))


def right_on_test(place: Place, mode: str, recipe: Recipe) -> Tensor:
    """Whether the objective's models, one or one a rate, are right on every test image: 0 or 1, (models, images)."""
    if mode == "repaired":
        return hits(slim_model(place, in_full(place, recipe)), place)[None]
    scored = place.bench.with_scores(recipe)
    groups = scored.structure.groups
    plans = (find_lowest(groups, scored.scores, rate, recipe.normalise) for rate in PXP_RATES)
    return torch.stack([hits(mask_units(scored.model, groups, plan), place) for plan in plans])


def slim_model(place: Place, recipe: Recipe) -> nn.Module:
    return prune_at(place.bench, recipe).pruned.model


def hits(model: nn.Module, place: Place) -> Tensor:
    with torch.no_grad():
        return torch.cat([(model(inputs).argmax(1) == labels).double() for inputs, labels in place.splits.test])


def interval(difference: Tensor) -> tuple[float, float]:
    """Mean over the images and half its 95 % interval."""
    return float(difference.mean()), 1.96 * float(difference.std()) / math.sqrt(len(difference))
