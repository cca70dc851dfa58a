"""Compares the explanations of the dense and the pruned model cheaply, for the report of every run."""

from __future__ import annotations

from functools import partial

import torch

from pxcompress.clock import Clock
from pxcompress.errors import PxError, ResultError, short
from pxcompress.explain.heatmaps import Method, explained_columns, heatmaps
from pxcompress.explain.metrics import SIMILARITIES, cosine
from pxcompress.passes.memory import in_smaller_batches
from pxcompress.proof import ExplanationSimilarity, Warning
from pxcompress.scorers import SCORERS
from pxcompress.state import device_of
from pxcompress.types import Batch, Batches, Pruned

SAMPLES = 32
"""Number of samples of the select split whose heatmaps a run compares."""


def get_composite(scorer: str) -> str:
    """The LRP rules of a scorer, both as text; the default rules where it has none."""
    return SCORERS.build(scorer).composite or Method.composite


def compare_explanations(
    pruned: Pruned, batches: Batches, scorer: str, clock: Clock
) -> tuple[ExplanationSimilarity | None, tuple[Warning, ...]]:
    """Similarity of both models' heatmaps on the first `SAMPLES` of `batches`, and warnings for the user.

    The heatmaps are made by the LRP rules of `scorer`, given as text.
    A note says why they could not be compared, or that the slim model looks elsewhere. Never raises for what a model
    does: explanations are no reason to lose a run.
    """
    try:
        with clock.stage("compare explanations"):
            compare = partial(explanation_similarity, pruned, Method(composite=get_composite(scorer)))
            similarity = in_smaller_batches(compare, [take_first(batches, SAMPLES)], clock.say)
    except PxError as error:
        text = f"explanations of the two models could not be compared: {short(error)}"
        return None, (Warning("explanations", text),)
    if similarity.cosine >= similarity.least_cosine:
        return similarity, ()
    warning = (
        f"THE SLIM MODEL LOOKS ELSEWHERE: its heatmaps are like the dense model's by a cosine of "
        f"{similarity.cosine:.2f}; below {similarity.least_cosine:.2f} they are nearer to those of other inputs. Look "
        "at some with pxcompress explain"
    )
    clock.say(warning)
    return similarity, (Warning("explanations", warning),)


def take_first(batches: Batches, count: int) -> Batch:
    """The first `count` samples as one batch, or all if there are fewer."""
    needed_batches: list[Batch] = []
    for batch in batches:
        needed_batches.append(batch)
        if sum(len(labels) for _, labels in needed_batches) >= count:
            break
    inputs, labels = (torch.cat(parts)[:count] for parts in zip(*needed_batches, strict=True))
    return inputs, labels


def explanation_similarity(pruned: Pruned, method: Method, batches: Batches) -> ExplanationSimilarity:
    """Mean over all samples of each measure in `SIMILARITIES`, of both models' heatmaps for the dense one's class.

    Raises `ResultError` where a map is not finite.
    """
    values_by_name: dict[str, list[torch.Tensor]] = {name: [] for name in SIMILARITIES}
    dense_maps: list[torch.Tensor] = []
    for inputs, _ in batches:
        with torch.no_grad():
            targets = explained_columns(pruned.dense(inputs.to(device_of(pruned.dense)))).cpu()
        maps = [heatmaps(model, inputs, targets, method).flatten(1) for model in (pruned.dense, pruned.model)]
        if not all(bool(each.isfinite().all()) for each in maps):
            raise ResultError(f"relevance under the rules {method.composite!r} is not finite")
        dense_maps.append(maps[0])
        for name, measure in SIMILARITIES.items():
            values_by_name[name].append(measure(*maps))
    means = {name: torch.cat(values) for name, values in values_by_name.items()}
    all_maps = torch.cat(dense_maps)
    return ExplanationSimilarity(
        samples=len(all_maps),
        composite=method.composite,
        unrelated=float(cosine(all_maps, all_maps.roll(1, 0)).mean()) if len(all_maps) > 1 else 0.0,
        **{name: float(values.mean()) for name, values in means.items()},
    )
