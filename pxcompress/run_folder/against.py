"""Measures models that could be shipped instead: the dense one in other forms, and models that the user names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import timm

from pxcompress.checks import make_file_name
from pxcompress.cost.count import count_macs, count_params
from pxcompress.data import load_splits
from pxcompress.deploy import runtime
from pxcompress.deploy.comparison import Candidate
from pxcompress.deploy.feeds import get_image_shape
from pxcompress.deploy.intervals import estimate_speedup
from pxcompress.deploy.measure import FileTiming, file_bytes, latency, time_and_predict_apart
from pxcompress.deploy.precision import convert
from pxcompress.errors import InputError, ModelError, PxError, short
from pxcompress.models.onnx_file import is_onnx
from pxcompress.onnx_in import OnnxModule
from pxcompress.proof import Contender, ContenderKind, Warning
from pxcompress.recipe import ModelAndData, Recipe
from pxcompress.run import Run
from pxcompress.run_folder.names import AGAINST
from pxcompress.run_folder.saved import preprocessing_of
from pxcompress.run_folder.smaller_images import resize_model, scale_side
from pxcompress.run_folder.written import Files, export_dense
from pxcompress.types import Batches
from pxcompress.workload import Workload, load_workload, with_baseline

SCALES = (0.86, 0.75)
"""Sides of smaller images, as shares of the dense model's; about 3/4 and 9/16 of its MACs."""


_KINDS: tuple[tuple[ContenderKind, ContenderKind], ...] = (("dense", "dense-int8"), ("pruned", "pruned-int8"))


@dataclass(frozen=True, eq=False)
class _Entry:
    """A file to measure with its own inputs; costs are None if only the file is known."""

    name: str
    kind: ContenderKind
    path: Path
    batches: Batches
    params: int | None = None
    macs: int | None = None


def check_against(recipe: Recipe, workload: Workload) -> None:
    """Raise `InputError`, before any work, for a rival that cannot be found, and for tasks without labels."""
    if recipe.against and workload.task.reads_dense:
        raise InputError("--against needs labels that say how good any model is, and this task judges by the dense one")
    for text in recipe.against:
        name, _, checkpoint = text.partition("=")
        for file in (checkpoint, name if is_onnx(name) else ""):
            if file and not Path(file).is_file():
                raise InputError(f"--against {text!r}: no file {file!r}; give MODEL, MODEL=CHECKPOINT or FILE.onnx")
        plain = ":" not in name and not is_onnx(name)
        if plain and not timm.is_model(name.partition(".")[0]):
            raise InputError(
                f"--against {text!r}: timm has no model {name!r}; give MODEL, MODEL=CHECKPOINT or FILE.onnx"
            )


def measure_contenders(
    files: Files, models: tuple[Candidate, Candidate], workload: Workload, run: Run
) -> tuple[tuple[Contender, ...], tuple[Warning, ...]]:
    """Measure side by side: dense and pruned model, both in int8, the dense one on smaller images, and rivals.

    Rivals are the models that the recipe names in `against`. New files are in the folder `AGAINST` beside the models.
    Warnings say what could not be made. The result is empty if the recipe names no rival.
    """
    if not run.recipe.against:
        return (), ()
    place = files.dense.path.parent / AGAINST
    place.mkdir()
    with run.clock.stage("make rivals"):
        made = list(_entries(files, models, workload, run, place))
    entries = [each for each in made if isinstance(each, _Entry)]
    notes = tuple(each for each in made if isinstance(each, Warning))
    with run.clock.stage("measure rivals"):
        pairs = {entry.name: (entry.path, entry.batches) for entry in entries}
        try:
            timings = time_and_predict_apart(pairs, workload.task, **asdict(run.recipe.bench))
        except PxError as error:  # the pruned model is none the worse for it
            return (), (*notes, Warning("against", f"what could be shipped instead was not measured: {error}"))
    return tuple(_contender(entry, timings) for entry in entries), notes


def _entries(
    files: Files, models: tuple[Candidate, Candidate], workload: Workload, run: Run, place: Path
) -> Iterator[_Entry | Warning]:
    """Everything to measure, dense and pruned first; a warning for each file that cannot be made."""
    test = workload.splits.test
    for (name, _), model in zip(_KINDS, models, strict=True):
        yield _Entry(name, name, model.path, test, model.params, model.macs)
    for (name, kind), model in zip(_KINDS, models, strict=True):
        path = place / f"{model.path.stem}.int8.onnx"
        try:
            convert(model.path, path, "int8", workload.splits.repair)
            yield _Entry(f"{name}, int8", kind, path, test, model.params, model.macs)
        except ModelError as error:
            yield Warning("against", f"{name} could not be made int8: {error}")
    _, *sides = workload.loaded.preprocessing.input_size
    for sizes in dict.fromkeys(tuple(scale_side(side, scale) for side in sides) for scale in SCALES):
        if list(sizes) != sides:
            yield _at_size(sizes, workload, run.recipe, place)
    file_names = [Path(text).name for text in run.recipe.against]
    for text, file_name in zip(run.recipe.against, file_names, strict=True):
        try:
            entry = _load_rival(text, workload, run, place)
            yield replace(entry, name=file_name) if is_onnx(text) and file_names.count(file_name) == 1 else entry
        except PxError as error:
            yield Warning("against", f"{text} was not measured: {error}")


def _at_size(sizes: tuple[int, ...], workload: Workload, recipe: Recipe, place: Path) -> _Entry | Warning:
    """The dense model exported for smaller images, position embeddings resampled; a warning if that is impossible."""
    preprocessing = workload.loaded.preprocessing
    words = "x".join(map(str, sizes)) + " pixels"
    model = workload.loaded.model
    if not preprocessing.is_image or isinstance(model, OnnxModule) or workload.source.layout == "masks":
        return Warning("against", f"the dense model was not tried at {words}: its inputs or targets cannot be resized")
    smaller = replace(preprocessing, input_size=(preprocessing.input_size[0], *sizes))
    try:
        resized = resize_model(model, sizes)
        splits = load_splits(workload.source, smaller, seed=recipe.seed)
        other = replace(workload, loaded=replace(workload.loaded, model=resized, preprocessing=smaller), splits=splits)
        path = place / f"dense-{'x'.join(map(str, sizes))}.onnx"
        export_dense(path, recipe, other)
        costs = count_params(resized), count_macs(resized, splits.example)
    except (ModelError, RuntimeError, ValueError, AssertionError) as error:
        return Warning("against", f"the dense model does not run at {words}: {short(error)}")
    return _Entry(f"dense at {words}", "smaller-images", path, splits.test, *costs)


def _load_rival(text: str, workload: Workload, run: Run, place: Path) -> _Entry:
    """A model that the user names, exported, or an ONNX file as it is. Raises `InputError` if classes differ."""
    recipe, (name, _, checkpoint) = run.recipe, text.partition("=")
    if is_onnx(name):
        session = runtime.open_session(Path(name), "cpu")
        metadata = session.metadata
        preprocessing = (
            preprocessing_of(metadata, Path(name).parent) if "input_mean" in metadata else workload.loaded.preprocessing
        )
        shape = get_image_shape(session, None if "input_mean" in metadata else _image(preprocessing.input_size))
        splits = load_splits(workload.source, replace(preprocessing, input_size=shape), seed=recipe.seed)
        return _Entry(text, "given", Path(name), splits.test)
    keys = ("data", "classes", "task", "skip_corrupt", "seed")
    request = ModelAndData(name, checkpoint=checkpoint or None, **{key: getattr(recipe, key) for key in keys})
    rival = with_baseline(load_workload(request), recipe.seed, run.clock.say)
    if rival.source.classes != workload.source.classes:
        raise InputError(f"--against {text!r} has other classes than the dense model; give models of one task")
    path = place / f"{make_file_name(text)}.onnx"
    export_dense(path, recipe, rival)
    model = rival.loaded.model
    costs = count_params(model), count_macs(model, rival.splits.example)
    return _Entry(text, "given", path, rival.splits.test, *costs)


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width


def _contender(entry: _Entry, timings: Mapping[str, FileTiming]) -> Contender:
    timing, dense, pruned = timings[entry.name], timings["dense"], timings["pruned"]
    shape = tuple(int(size) for size in next(iter(entry.batches))[0].shape[1:])
    return Contender(
        name=entry.name,
        kind=entry.kind,
        input_shape=shape,
        params=entry.params,
        macs=entry.macs,
        onnx_bytes=file_bytes(entry.path),
        quality=timing.predictions.quality,
        samples=timing.predictions.samples,
        latency_ms=latency(timing.seconds),
        speedup=estimate_speedup(dense.seconds, timing.seconds),
        change=timing.predictions.change(dense.predictions),
        beside_pruned=timing.predictions.change(pruned.predictions),
    )
