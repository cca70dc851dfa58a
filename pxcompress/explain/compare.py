"""Why it still works: what the dense and the pruned model of a run folder look at, side by side.

The dense model is built again from the recipe and must compute what dense.onnx does. Relevance starts at the logit of
the class that the dense model predicts, in both models: another class would have another explanation in any model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pxcompress.attribution import attributed, parse_composite
from pxcompress.attribution.relevance import started, unit_relevance
from pxcompress.cache import whole_file
from pxcompress.clock import Note
from pxcompress.data import is_embedded, load_splits, open_source, read_files, restricted
from pxcompress.deploy import runtime
from pxcompress.errors import InputError
from pxcompress.explain.heatmaps import CHUNK, METHODS, Method, chosen_share, heatmaps
from pxcompress.explain.metrics import SIMILARITIES, cosine, gini, pixel_flipping
from pxcompress.explain.similarity import composite_of
from pxcompress.recipe import Recipe
from pxcompress.report.explanation import (
    Alike,
    Carried,
    CarryingUnit,
    Case,
    Decision,
    Explanation,
    Flipping,
    Pictures,
    explanation_json,
)
from pxcompress.report.explanation_page import explanation_page
from pxcompress.report.heatmap_figures import figure
from pxcompress.run_folder.contents import DENSE, load_pruned, preprocessing_of, read_run
from pxcompress.state import device_of
from pxcompress.subject import Subject, load_subject, with_baseline
from pxcompress.types import Batch, Group, Plan, Preprocessing, Pruned

PAGE, RECORD, FIGURES = "explain.html", "explain.json", "explain"
"""What `write` puts into a folder; the last is a folder of figures."""

SAMPLES = 128
"""Inputs that are compared where nothing is said."""

TUNED = 64
"""Inputs on which the share of pruned LRP is chosen, and pixels are flipped."""

TOLERANCE = 1e-2
"""Largest difference between the dense model and dense.onnx, as a share of the logits' scale."""

_SHOWN = 2  # cases of each kind
_MOST = 24  # cases of images that were asked for
_UNITS = 6  # carrying units of a case


@dataclass(frozen=True)
class Asked:
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


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What is explained: inputs (n, ...), their names, and labels (n,) where there are any; `told` says what it is."""

    values: Tensor
    names: tuple[str, ...]
    labels: Tensor | None
    told: str


@dataclass(frozen=True, eq=False)
class _Views:
    """What both models say of every input: logits (n, classes), maps (n, ...) of the dense model's class.

    `own` are the pruned model's maps of its own class.
    """

    logits: tuple[Tensor, Tensor]
    maps: tuple[Tensor, Tensor]
    own: Tensor
    similarity: Mapping[str, Tensor]
    kinds: Sequence[str]

    @property
    def decisions(self) -> tuple[Tensor, Tensor]:
        """Predicted classes, (n,)."""
        return self.logits[0].argmax(1), self.logits[1].argmax(1)


def explain(
    folder: Path,
    images: Sequence[Path] | None = None,
    data: str = "",
    asked: Asked | None = None,
    note: Note = lambda message: None,
) -> Explanation:
    """Explain both models of a run folder on `images`, or on the test split of `data` (default: that of the run).

    Raises `InputError` for what is no run folder, images that cannot be read, and where the dense model is gone.
    """
    asked = asked or Asked()
    if images is not None and not images:
        raise InputError("no image is given; expected one or more files, or none of the option for the test split")
    recipe = read_run(folder)
    pruned = load_pruned(folder)
    subject = _dense(folder, data, note)
    pruned = replace(pruned, dense=subject.loaded.model, model=pruned.model.to(device_of(subject.loaded.model)))
    preprocessing = subject.loaded.preprocessing
    inputs = _images(images, preprocessing) if images else _samples(subject, data, asked.samples, recipe)
    composite = asked.composite or composite_of(recipe)
    note(f"explaining {len(inputs.values)} inputs with {asked.method} ...")
    method = _method(pruned.dense, inputs.values, asked, composite)
    views = _views(pruned, inputs, method)
    classes = subject.source.classes
    targets = views.decisions[0]
    removed = _carried(pruned, inputs.values, targets, composite)
    cases = [
        _case(pruned, (inputs, views), index, kind, (classes, preprocessing, composite))
        for index, kind in (_all(views) if images else _chosen(views))
    ]
    return Explanation(
        model=recipe.model,
        inputs=inputs.told,
        method=method.name,
        share=method.share,
        composite=composite,
        alike=_alike(views),
        flipping=_flipping(pruned.dense, pruned.model, inputs.values, views),
        layers=removed,
        cases=tuple(cases),
        notes=_notes(asked, method, len(inputs.values), bool(images)),
    )


def write(found: Explanation, folder: Path) -> None:
    """Write explain.html, explain.json and the figures of all cases; those of an earlier call go."""
    files = {
        f"{FIGURES}/case-{place:02d}.{kind}": file
        for place, case in enumerate(found.cases, 1)
        for kind, file in figure(case).items()
    }
    files |= {PAGE: explanation_page(found).encode(), RECORD: explanation_json(found).encode()}
    try:
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
        for old in (folder / FIGURES).glob("case-*.*"):
            old.unlink()
        for name, content in files.items():
            with whole_file(folder / name) as beside:
                beside.write_bytes(content)
    except OSError as error:
        raise InputError(
            f"cannot write to {str(folder)!r} ({error.strerror}); choose another place with --out"
        ) from error


# --- the dense model and the inputs -----------------------------------------------------------------------------------


def _dense(folder: Path, data: str, note: Note) -> Subject:
    """Model and data of the run; `InputError` where the model is no longer the one in dense.onnx."""
    session, recipe = runtime.session(folder / DENSE, "cpu"), read_run(folder)
    if data and not is_embedded(recipe.data):  # what was trained here was trained on the run's own data
        recipe = recipe.but(data=data, input_size=preprocessing_of(session.metadata).input_size[-1])
    subject = with_baseline(load_subject(recipe), recipe.seed, note)
    values = next(iter(subject.splits.test))[0][:16]
    model = subject.loaded.model
    with torch.no_grad():
        logits = model(values.to(device_of(model))).cpu().numpy()
    expected = session.predict(values)
    same = logits.shape == expected.shape and np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()
    if not same:
        raise InputError(
            f"the dense model of {str(folder)!r} is gone: what its recipe leads to ({recipe.model}, weights "
            f"{subject.loaded.weights}) does not compute what {DENSE} does; bring its weights back, or run again"
        )
    return subject


def _samples(subject: Subject, data: str, count: int, recipe: Recipe) -> _Inputs:
    """The first `count` of the test split, those of `data` where given."""
    source, splits = subject.source, subject.splits
    if data and data != source.name:
        opened = open_source(data, skip_corrupt=recipe.skip_corrupt, seed=recipe.seed)
        source = restricted(opened, source.classes, recipe.seed)
        splits = load_splits(source, subject.loaded.preprocessing, seed=recipe.seed)
    batches: list[Batch] = []
    for batch in splits.test:
        batches.append(batch)
        if sum(len(labels) for _, labels in batches) >= count:
            break
    values, labels = (torch.cat(parts)[:count] for parts in zip(*batches, strict=True))
    names = splits.ids["test"][: len(values)]
    return _Inputs(values, names, labels, f"{len(values)} inputs of the test split of {source.name}")


def _images(paths: Sequence[Path], preprocessing: Preprocessing) -> _Inputs:
    """Image files, resized, cropped and converted as the run's images were."""
    names = tuple(map(str, paths))
    return _Inputs(read_files(names, preprocessing), names, None, f"{len(names)} images")


def _method(dense: nn.Module, values: Tensor, asked: Asked, composite: str) -> Method:
    share = asked.share
    if share is None:
        with torch.no_grad():
            targets = dense(values[:TUNED].to(device_of(dense))).argmax(1).cpu()
        share = chosen_share(dense, values[:TUNED], targets, asked.method, composite)
    return Method(asked.method, composite, share)


# --- what both models say ---------------------------------------------------------------------------------------------


def _views(pruned: Pruned, inputs: _Inputs, method: Method) -> _Views:
    logits = tuple(_logits(model, inputs.values) for model in (pruned.dense, pruned.model))
    targets, decided = (each.argmax(1) for each in logits)
    maps = tuple(heatmaps(model, inputs.values, targets, method) for model in (pruned.dense, pruned.model))
    own, changed = maps[1].clone(), targets != decided
    if changed.any():
        own[changed] = heatmaps(pruned.model, inputs.values[changed], decided[changed], method)
    similarity = {name: measure(*(each.flatten(1) for each in maps)) for name, measure in SIMILARITIES.items()}
    return _Views((logits[0], logits[1]), (maps[0], maps[1]), own, similarity, _kinds(logits, inputs.labels))


def _logits(model: nn.Module, values: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part.to(device_of(model))).cpu() for part in values.split(CHUNK)])


_KINDS = {(True, True): "agreeing", (True, False): "newly wrong", (False, True): "newly right"}
"""Whether dense and pruned are right -> kind of an input."""


def _kinds(logits: Sequence[Tensor], labels: Tensor | None) -> list[str]:
    dense, pruned = (each.argmax(1) for each in logits)
    if labels is None:
        return ["same decision" if same else "another decision" for same in (dense == pruned).tolist()]
    right = zip((dense == labels).tolist(), (pruned == labels).tolist(), strict=True)
    return [_KINDS.get(pair, "both wrong") for pair in right]


def _alike(views: _Views) -> tuple[Alike, ...]:
    """All inputs, then those of each kind that there is."""
    dense, _ = flat = [each.flatten(1) for each in views.maps]
    others = [cosine(dense, views.own.flatten(1)), *map(gini, flat)]
    rows = []
    for kind in ("all", *dict.fromkeys([*_KINDS.values(), *views.kinds])):
        which = torch.tensor([kind in ("all", other) for other in views.kinds])
        if which.any():
            columns = [*(views.similarity[name] for name in SIMILARITIES), *others]
            rows.append(Alike(kind, int(which.sum()), *(float(column[which].mean()) for column in columns)))
    return tuple(rows)


def _flipping(dense: nn.Module, pruned: nn.Module, values: Tensor, views: _Views) -> Flipping:
    """Each model by its own maps, the dense one by random ones, too."""
    values, targets = values[:TUNED], views.decisions[0][:TUNED]
    maps = [each[: len(values)].flatten(1) for each in views.maps]
    chance = torch.rand(maps[0].shape, generator=torch.Generator().manual_seed(0))
    pairs = ((dense, values, maps[0]), (pruned, values, maps[1]), (dense, values, chance))
    by_dense, by_pruned, by_chance = (float(pixel_flipping(*each, targets).mean()) for each in pairs)
    return Flipping(by_dense, by_pruned, by_chance, len(values))


def _carried(pruned: Pruned, values: Tensor, targets: Tensor, composite: str) -> tuple[Carried, ...]:
    """Every layer of the plan, in the order of the model."""
    batches = list(zip(values.split(CHUNK), targets.split(CHUNK), strict=True))
    sizes = _unit_relevance(pruned, batches, composite, "abs")
    rows = []
    for group in pruned.groups:
        size, gone = sizes[group.name], list(pruned.plan.removed.get(group.name, ()))
        share = float(size[gone].sum() / size.sum().clamp(min=1e-12))
        rows.append(Carried(group.name, group.kind, group.units, group.units - len(gone), share))
    return tuple(rows)


def _unit_relevance(pruned: Pruned, batches: Sequence[Batch], composite: str, aggregate: str) -> Mapping[str, Tensor]:
    """Relevance of the dense model's units for the classes that stand as labels: group name -> (units,)."""
    with attributed(pruned.dense, parse_composite(composite), batches[0][0][:1]) as twin:
        start = started("logit", "label")
        return unit_relevance(twin.model, pruned.groups, batches, start, aggregate=aggregate)


# --- cases ------------------------------------------------------------------------------------------------------------


def _chosen(views: _Views) -> list[tuple[int, str]]:
    """For the reader: typical ones that agree, the surest of those that changed sides, and the largest changes."""
    alike, chance = views.similarity["cosine"], views.logits[1].softmax(1).amax(1)
    typical = (alike - alike.median()).abs()
    found: dict[int, str] = {}
    for kind, order in (("agreeing", typical), ("newly wrong", -chance), ("newly right", -chance)):
        ranked = [index for index in order.argsort().tolist() if views.kinds[index] == kind]
        found.update(dict.fromkeys(ranked[:_SHOWN], kind))
    left = [index for index in alike.argsort().tolist() if index not in found]
    return [*found.items(), *((index, f"largest change, {views.kinds[index]}") for index in left[:_SHOWN])]


def _all(views: _Views) -> list[tuple[int, str]]:
    return list(enumerate(views.kinds))[:_MOST]


def _case(
    pruned: Pruned,
    compared: tuple[_Inputs, _Views],
    index: int,
    kind: str,
    told: tuple[Sequence[str], Preprocessing, str],
) -> Case:
    """One input with everything about it; `told` are the classes, how pictures became inputs, and the rules."""
    (inputs, views), (classes, preprocessing, composite) = compared, told
    value = inputs.values[index : index + 1]
    dense, other = (each[index] for each in views.decisions)
    return Case(
        sample=inputs.names[index],
        kind=kind,
        label=None if inputs.labels is None else classes[int(inputs.labels[index])],
        dense=_decision(views.logits[0][index], classes),
        pruned=_decision(views.logits[1][index], classes),
        similarity={name: float(values[index]) for name, values in views.similarity.items()},
        units=_units(pruned, (value, dense[None]), float(views.logits[0][index, dense]), composite),
        pictures=Pictures(
            _picture(value[0], preprocessing),
            views.maps[0][index].numpy(),
            views.maps[1][index].numpy(),
            None if dense == other else views.own[index].numpy(),
        ),
    )


def _decision(logits: Tensor, classes: Sequence[str]) -> Decision:
    best = int(logits.argmax())
    return Decision(classes[best], float(logits.softmax(0)[best]))


def _units(pruned: Pruned, batch: Batch, logit: float, composite: str) -> tuple[CarryingUnit, ...]:
    """The units of the dense model with the most relevance for one input, whatever their layer."""
    relevance = _unit_relevance(pruned, [batch], composite, "signed")
    rows = [
        CarryingUnit(group.name, group.kind, unit, value / (logit or 1.0), _is_kept(pruned.plan, group, unit))
        for group in pruned.groups
        for unit, value in enumerate(relevance[group.name].tolist())
    ]
    return tuple(sorted(rows, key=lambda row: -row.relevance)[:_UNITS])


def _is_kept(plan: Plan, group: Group, unit: int) -> bool:
    return unit not in plan.removed.get(group.name, ())


def _picture(value: Tensor, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """A model's input as the image that it was made of, (height, width, 3)."""
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    pixels = (value * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    return pixels.permute(1, 2, 0).numpy()


def _notes(asked: Asked, method: Method, count: int, are_images: bool) -> tuple[str, ...]:
    notes = []
    if METHODS[asked.method] and asked.share is None and not method.share:
        notes.append(
            f"no share that {asked.method} prunes gains more sparsity than it costs similarity to plain LRP here, so "
            "nothing is pruned; other rules (--composite) may help, or a share of your own (--share)"
        )
    if are_images and count > _MOST:
        notes.append(f"the first {_MOST} of {count} images are shown")
    return tuple(notes)
