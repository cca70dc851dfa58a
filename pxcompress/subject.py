"""What a recipe is about: a model with weights, and data cut into its disjoint roles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pxcompress.baseline import baseline_key, train_baseline
from pxcompress.clock import Note
from pxcompress.data import Source, load_splits, open_source, training_batches
from pxcompress.models import Loaded, load_model
from pxcompress.recipe import Recipe
from pxcompress.state import seeded
from pxcompress.types import Splits


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded model, the data it is for, and where both come from."""

    loaded: Loaded
    source: Source
    splits: Splits


def load_subject(recipe: Recipe) -> Subject:
    """Load model and data of `recipe`. Pretrained weights are asked for only when the data is the user's own."""
    source = open_source(recipe.data, skip_corrupt=recipe.skip_corrupt, seed=recipe.seed)
    with seeded(recipe.seed):
        loaded = load_model(
            recipe.model,
            classes=len(source.classes),
            checkpoint=None if recipe.checkpoint is None else Path(recipe.checkpoint),
            pretrained=not source.embedded,
            input_size=recipe.input_size or source.native_size,
        )
    return Subject(loaded, source, load_splits(source, loaded.preprocessing, seed=recipe.seed))


def with_baseline(subject: Subject, seed: int, note: Note) -> Subject:
    """`subject` with weights: a model that has none is trained on the embedded data, or read from the cache."""
    loaded, source = subject.loaded, subject.source
    if loaded.weights != "untrained":
        return subject
    training = training_batches(source, loaded.preprocessing, batch_size=64, seed=seed)
    key = baseline_key(loaded.architecture, source.name, loaded.preprocessing, seed)
    train_baseline(loaded.model, training, subject.splits.select, key=key, seed=seed, note=note)
    return replace(subject, loaded=replace(loaded, weights="trained-here"))
