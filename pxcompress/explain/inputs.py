"""Loads what to explain: samples of data or image files, and the dense model of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pxcompress.data import EMBEDDED, Source, load_splits, open_source, read_files, restrict_classes
from pxcompress.deploy import runtime
from pxcompress.deploy.parity import file_outputs
from pxcompress.errors import InputError
from pxcompress.explain.similarity import take_first
from pxcompress.models.onnx_file import is_onnx, ports_for
from pxcompress.models.outputs import difference
from pxcompress.notes import Note
from pxcompress.recipe import Recipe
from pxcompress.run_folder.names import DENSE
from pxcompress.run_folder.saved import preprocessing_of, read_run
from pxcompress.state import device_of
from pxcompress.tasks.choice import layout_of
from pxcompress.tasks.classification import Classification
from pxcompress.types import Preprocessing
from pxcompress.workload import Workload, load_workload, with_baseline

TOLERANCE = 1e-2
"""Largest accepted difference between the rebuilt dense model and dense.onnx, as a share of the logits' scale."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs to explain (n, ...), their names, and targets (n, ...) if there are any; `description` is a text for them.

    `masks` (n, positions) are true where the data know that the class is made; `letters` are what the channels of a
    one-hot input stand for.
    """

    values: Tensor
    names: tuple[str, ...]
    description: str
    targets: Tensor | None = None
    masks: Tensor | None = None
    letters: str = ""


def load_dense_workload(folder: Path, data: str, note: Note) -> Workload:
    """Load the model and data of a run. Raises `InputError` if the model differs from the one in dense.onnx."""
    session, recipe = runtime.open_session(folder / DENSE, "cpu"), read_run(folder)
    if data and recipe.data.partition(":")[0] not in EMBEDDED:  # else the weights were trained on the run's own data
        preprocessing = preprocessing_of(session.metadata, folder)
        size = preprocessing.input_size[-2:] if preprocessing.is_image else None
        recipe = recipe.but(data=data, input_size=size)
    if is_onnx(recipe.model):  # its copy is at hand
        recipe = recipe.but(model=str(folder / DENSE))
    workload = with_baseline(load_workload(recipe), recipe.seed, note)
    values = next(iter(workload.splits.test))[0][:16]
    model = workload.loaded.model
    with torch.no_grad():
        outputs = file_outputs(model, values.to(device_of(model)), workload.task.output_name)
    expected = session.outputs_of(values)
    if difference([each.cpu() for each in outputs.values()], [*expected.values()]) > TOLERANCE:
        raise InputError(
            f"the dense model of {str(folder)!r} is gone: what its recipe leads to ({recipe.model}, weights "
            f"{workload.loaded.weights}) does not compute what {DENSE} does; bring its weights back, or run again"
        )
    return workload


def read_samples(workload: Workload, data: str, count: int, recipe: Recipe) -> Inputs:
    """The first `count` samples of the test split, of `data` if given, else of the run's own data."""
    source, splits = workload.source, workload.splits
    if data and data != source.name:
        layout = layout_of(workload.task, data)
        ports = ports_for(workload.loaded.architecture.name, recipe.layout)
        own_source = open_source(data, skip_corrupt=recipe.skip_corrupt, seed=recipe.seed, layout=layout, ports=ports)
        one_class = isinstance(workload.task, Classification)
        source = restrict_classes(own_source, source.classes, recipe.seed) if one_class else own_source
        splits = load_splits(source, workload.loaded.preprocessing, seed=recipe.seed)
    values, targets = take_first(splits.test, count)
    names = splits.ids["test"][: len(values)]
    description = f"{len(values)} inputs of the test split of {source.name}"
    has_targets = source.layout != "unlabelled"
    masks = _find_masks(source, names, values)
    return Inputs(values, names, description, targets if has_targets else None, masks, source.letters)


def _find_masks(source: Source, names: Sequence[str], values: Tensor) -> Tensor | None:
    """Masks (n, positions) of where the class is made; None if the data do not know it at the input's size."""
    if source.mask is None:
        return None
    evidence = [source.mask(name) for name in names]
    if any(mask.ndim == 1 for mask in evidence):  # of texts, as long as each is
        evidence = [np.pad(mask, (0, max(0, values.shape[2] - len(mask)))) for mask in evidence]
    masks = torch.from_numpy(np.stack(evidence))
    return masks.flatten(1) if masks.shape[1:] == values.shape[2:] else None


def read_image_files(paths: Sequence[Path], preprocessing: Preprocessing) -> Inputs:
    """Image files as inputs, resized, cropped and normalised as the run's images were.

    Raises `InputError` if the model takes no images.
    """
    names = tuple(map(str, paths))
    if not preprocessing.is_image:
        shape = "x".join(map(str, preprocessing.input_size))
        raise InputError(f"image {names[0]!r} is given, the model takes inputs of shape {shape}; leave --image out")
    return Inputs(read_files(names, preprocessing), names, f"{len(names)} images")
