"""Why it still works: what the dense and the pruned model of a run folder look at, side by side.

The dense model is built again from the recipe and must compute what dense.onnx does. Relevance starts at the logit of
the class that the dense model predicts, in both models: another class would have another explanation in any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pxcompress.errors import InputError
from pxcompress.explain.cases import MOST_CASES, attribute_units, choose_cases, make_case, take_first_cases
from pxcompress.explain.heatmaps import CHUNK, METHODS, Method, choose_share
from pxcompress.explain.inputs import load_dense_workload, read_image_files, read_samples
from pxcompress.explain.metrics import (
    SIMILARITIES,
    cosine,
    gini,
    mass_accuracy,
    pixel_flipping,
    rank_accuracy,
)
from pxcompress.explain.similarity import get_composite
from pxcompress.explain.views import KINDS, Views, make_views
from pxcompress.notes import Note, silent
from pxcompress.report.explanation import Explanation, Flipping, KindSimilarity, LayerRelevance, TargetRelevance
from pxcompress.run_folder.saved import load_pruned, read_run
from pxcompress.state import device_of
from pxcompress.types import Pruned

SAMPLES = 128
"""Default number of inputs that are compared."""

TUNING_SAMPLES = 64
"""Number of inputs on which the share of pruned LRP is chosen, and of those whose pixels are flipped."""


@dataclass(frozen=True)
class ExplanationRequest:
    """How to explain: one of `heatmaps.METHODS`; rules "" are the scorer's own; `share` None is chosen."""

    method: str = "lrp"
    composite: str = ""
    share: float | None = None
    samples: int = SAMPLES

    def __post_init__(self) -> None:
        Method(self.method, self.composite or "epsilon", self.share or 0.0)
        if self.share is not None and not METHODS[self.method]:
            raise InputError(f"share {self.share} has no effect on method {self.method!r}; use plrp-lambda or plrp-m")
        if self.samples < 1:
            raise InputError(f"samples is {self.samples}; expected 1 or more inputs to explain")


def explain(
    folder: Path,
    images: Sequence[Path] | None = None,
    data: str = "",
    request: ExplanationRequest | None = None,
    note: Note = silent,
) -> Explanation:
    """Explain both models of a run folder on `images`, or on the test split of `data` (default: that of the run).

    Raises `InputError` for what is no run folder, images that cannot be read, and where the dense model is gone.
    """
    request = request or ExplanationRequest()
    if images is not None and not images:
        raise InputError("no image is given; expected one or more files, or none of the option for the test split")
    recipe = read_run(folder)
    pruned = load_pruned(folder)
    workload = load_dense_workload(folder, data, note)
    dense = workload.loaded.model
    groups = tuple(group for group in pruned.groups if group.kind != "direction")  # which the dense model does not have
    pruned = replace(pruned, dense=dense, model=pruned.model.to(device_of(dense)), groups=groups)
    preprocessing = workload.loaded.preprocessing
    inputs = (
        read_image_files(images, preprocessing) if images else read_samples(workload, data, request.samples, recipe)
    )
    composite = request.composite or get_composite(recipe)
    note(f"explaining {len(inputs.values)} inputs with {request.method} ...")
    method = _choose_method(pruned.dense, inputs.values, request, composite)
    views = make_views(pruned, inputs, method)
    classes = workload.source.classes
    targets = views.decisions[0]
    layer_shares = _measure_layers(pruned, inputs.values, targets, composite)
    cases = [
        make_case(pruned, (inputs, views), index, kind, (classes, preprocessing, composite))
        for index, kind in (take_first_cases(views) if images else choose_cases(views))
    ]
    return Explanation(
        model=recipe.model,
        inputs=inputs.description,
        method=method.name,
        share=method.share,
        composite=composite,
        similarity=_summarise_similarity(views),
        target_relevance=_measure_target_relevance(views, inputs.masks),
        flipping=_measure_flipping(pruned.dense, pruned.model, inputs.values, views),
        layers=layer_shares,
        cases=tuple(cases),
        notes=_list_notes(request, method, len(inputs.values), bool(images)),
    )


def _choose_method(dense: nn.Module, values: Tensor, request: ExplanationRequest, composite: str) -> Method:
    share = request.share
    if share is None:
        with torch.no_grad():
            targets = dense(values[:TUNING_SAMPLES].to(device_of(dense))).argmax(1).cpu()
        share = choose_share(dense, values[:TUNING_SAMPLES], targets, request.method, composite)
    return Method(request.method, composite, share)


def _summarise_similarity(views: Views) -> tuple[KindSimilarity, ...]:
    """All inputs, then those of each kind that there is."""
    dense, _ = flat = [each.flatten(1) for each in views.maps]
    others = [cosine(dense, views.own.flatten(1)), *map(gini, flat)]
    rows = []
    for kind in ("all", *dict.fromkeys([*KINDS.values(), *views.kinds])):
        mask = torch.tensor([kind in ("all", kind_shown) for kind_shown in views.kinds])
        if mask.any():
            columns = [*(views.similarity[name] for name in SIMILARITIES), *others]
            rows.append(KindSimilarity(kind, int(mask.sum()), *(float(column[mask].mean()) for column in columns)))
    return tuple(rows)


def _measure_flipping(dense: nn.Module, pruned: nn.Module, values: Tensor, views: Views) -> Flipping:
    """Each model by its own maps, the dense one by random ones, too."""
    values, targets = values[:TUNING_SAMPLES], views.decisions[0][:TUNING_SAMPLES]
    maps = [each[: len(values)].flatten(1) for each in views.maps]
    chance = torch.rand(maps[0].shape, generator=torch.Generator().manual_seed(0))
    pairs = ((dense, values, maps[0]), (pruned, values, maps[1]), (dense, values, chance))
    by_dense, by_pruned, by_chance = (float(pixel_flipping(*each, targets).mean()) for each in pairs)
    return Flipping(by_dense, by_pruned, by_chance, len(values))


def _measure_target_relevance(views: Views, masks: Tensor | None) -> TargetRelevance | None:
    """How much of the relevance lies in the masks; a map without positive relevance has none of it there."""
    if masks is None:
        return None
    maps = [each.flatten(1) for each in views.maps]
    (mass_dense, mass_pruned), (rank_dense, rank_pruned) = (
        [float(measure(each, masks).nan_to_num(0.0).mean()) for each in maps]
        for measure in (mass_accuracy, rank_accuracy)
    )
    return TargetRelevance(len(masks), mass_dense, mass_pruned, rank_dense, rank_pruned, float(masks.double().mean()))


def _measure_layers(pruned: Pruned, values: Tensor, targets: Tensor, composite: str) -> tuple[LayerRelevance, ...]:
    """Every layer of the plan, in the order of the model."""
    batches = list(zip(values.split(CHUNK), targets.split(CHUNK), strict=True))
    sizes = attribute_units(pruned, batches, composite, "abs")
    rows = []
    for group in pruned.groups:
        size, removed_units = sizes[group.name], list(pruned.plan.removed.get(group.name, ()))
        share = float(size[removed_units].sum() / size.sum().clamp(min=1e-12))
        rows.append(LayerRelevance(group.name, group.kind, group.units, group.units - len(removed_units), share))
    return tuple(rows)


def _list_notes(request: ExplanationRequest, method: Method, count: int, are_images: bool) -> tuple[str, ...]:
    notes = []
    if METHODS[request.method] and request.share is None and not method.share:
        notes.append(
            f"no share that {request.method} prunes gains more sparsity than it costs similarity to plain LRP here, so "
            "nothing is pruned; other rules (--composite) may help, or a share of your own (--share)"
        )
    if are_images and count > MOST_CASES:
        notes.append(f"the first {MOST_CASES} of {count} images are shown")
    return tuple(notes)
