"""Explains a run folder: compares heatmaps of the dense and the pruned model.

The dense model is built again from the recipe and must compute what dense.onnx does. Relevance starts at the logit of
the class that the dense model predicts, in both models: another class would have another explanation in any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pxcompress.errors import InputError
from pxcompress.explain.cases import MOST_CASES, Context, attribute_units, choose_cases, make_case
from pxcompress.explain.heatmaps import CHUNK, METHODS, Method, choose_share, explained_columns
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
from pxcompress.explain.views import CHANGED_KINDS, TYPICAL_KINDS, Views, compute_outputs, make_views
from pxcompress.notes import Note, begin, silent
from pxcompress.report.explanation import Explanation, Flipping, KindSimilarity, LayerRelevance, TargetRelevance
from pxcompress.run_folder.saved import load_pruned, read_run
from pxcompress.state import device_of
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.task import Outputs, Task
from pxcompress.types import Pruned

SAMPLES = 128
"""Default number of inputs that are compared."""

TUNING_SAMPLES = 64
"""Number of inputs used to choose the share of pruned LRP, and for pixel flipping."""


@dataclass(frozen=True)
class ExplanationRequest:
    """Settings of an explanation: one of `heatmaps.METHODS`; "" for `composite` means the scorer's.

    `share` None is chosen.
    """

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

    Raises `InputError` for a folder that is no run folder, images that cannot be read, and a dense model that is gone.
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
    note(begin(f"explaining {len(inputs.values)} inputs with {request.method}"))
    method = _choose_method(pruned.dense, inputs.values, request, composite)
    views = make_views(pruned, inputs, method, workload.task)
    context = Context(workload.task, workload.source.classes, preprocessing, composite)
    chosen = list(enumerate(views.kinds))[:MOST_CASES] if images else choose_cases(views)
    cases = [make_case(pruned, inputs, views, case, context) for case in chosen]
    return Explanation(
        model=recipe.model,
        inputs=inputs.description,
        method=method.name,
        share=method.share,
        composite=composite,
        subject=context.subject_of_all,
        similarity=_summarise_similarity(views),
        target_relevance=_measure_target_relevance(views, inputs.masks),
        flipping=_measure_flipping((pruned.dense, pruned.model), inputs.values, views, workload.task),
        layers=_measure_layers(pruned, inputs.values, views.columns[0], composite),
        cases=tuple(cases),
        notes=_list_notes(request, method, len(inputs.values), bool(images)),
    )


def _choose_method(dense: nn.Module, values: Tensor, request: ExplanationRequest, composite: str) -> Method:
    share = request.share
    if share is None:
        with torch.no_grad():
            targets = explained_columns(dense(values[:TUNING_SAMPLES].to(device_of(dense)))).cpu()
        share = choose_share(dense, values[:TUNING_SAMPLES], targets, request.method, composite)
    return Method(request.method, composite, share)


def _summarise_similarity(views: Views) -> tuple[KindSimilarity, ...]:
    """Similarity of both models' heatmaps: a row for all inputs, then one for each kind of input."""
    dense, _ = flat = [each.flatten(1) for each in views.maps]
    others = [cosine(dense, views.own.flatten(1)), *map(gini, flat)]
    rows = []
    for kind in ("all", *dict.fromkeys([*TYPICAL_KINDS, *CHANGED_KINDS, *views.kinds])):
        mask = torch.tensor([kind in ("all", kind_shown) for kind_shown in views.kinds])
        if mask.any():
            columns = [*(views.similarity[name] for name in SIMILARITIES), *others]
            rows.append(KindSimilarity(kind, int(mask.sum()), *(float(column[mask].mean()) for column in columns)))
    return tuple(rows)


def _measure_flipping(models: tuple[nn.Module, nn.Module], values: Tensor, views: Views, task: Task) -> Flipping:
    """Areas under pixel-flipping curves: of each model by its own heatmaps, and of the dense one by random maps."""
    values = values[:TUNING_SAMPLES]
    maps = [each[: len(values)].flatten(1) for each in views.maps]
    chance = torch.rand(maps[0].shape, generator=torch.Generator().manual_seed(0))
    dense, pruned = (
        _judge(model, {name: each[: len(values)] for name, each in outputs.items()}, views.columns[0], task)
        for model, outputs in zip(models, views.outputs, strict=True)
    )
    pairs = ((dense, maps[0]), (pruned, maps[1]), (dense, chance))
    by_dense, by_pruned, by_chance = (float(pixel_flipping(judge, values, each).mean()) for judge, each in pairs)
    measure = "probability of the class" if isinstance(task, Classification) else "agreement with the answer"
    return Flipping(by_dense, by_pruned, by_chance, len(values), measure)


def _judge(model: nn.Module, whole: Outputs, classes: Tensor, task: Task) -> Callable[[Tensor], Tensor]:
    """A function that says how much of an answer survives on altered inputs, (n,), from 0 to 1.

    It is the probability of the class, or the agreement with the outputs on `whole` inputs. A text without words scores
    0.
    """

    def judge(values: Tensor) -> Tensor:
        outputs = compute_outputs(model, values, task)
        if (logits := task.class_outputs(outputs)) is None:
            return task.agreement(outputs, whole).nan_to_num(0.0)
        return logits.softmax(1).gather(1, classes[: len(values), None])[:, 0].nan_to_num(0.0)

    return judge


def _measure_target_relevance(views: Views, masks: Tensor | None) -> TargetRelevance | None:
    """Share of the relevance that lies in the masks, for both models; None without masks."""
    if masks is None:
        return None
    maps = [each.flatten(1) for each in views.maps]
    (mass_dense, mass_pruned), (rank_dense, rank_pruned) = (
        [float(measure(each, masks).nan_to_num(0.0).mean()) for each in maps]
        for measure in (mass_accuracy, rank_accuracy)
    )
    return TargetRelevance(len(masks), mass_dense, mass_pruned, rank_dense, rank_pruned, float(masks.double().mean()))


def _measure_layers(pruned: Pruned, values: Tensor, targets: Tensor, composite: str) -> tuple[LayerRelevance, ...]:
    """Relevance and removed units of every group, in the order of the model."""
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
