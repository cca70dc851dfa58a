"""Reads a run folder back: recipe, preprocessing, and the slim model, rebuilt without executing anything from it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pxcompress.checks import read_text
from pxcompress.deploy.parity import verify_parity
from pxcompress.errors import InputError, ParityError, describe
from pxcompress.graph import make_prunable, prune, restore_layer_norms
from pxcompress.models.adapter import release_
from pxcompress.models.checkpoint import load_state
from pxcompress.models.inputs import blank_inputs
from pxcompress.models.loading import Architecture, make_plain
from pxcompress.models.rebuilding import restore_unregistered_
from pxcompress.models.signature import inputs_from_json
from pxcompress.models.task import slice_classes
from pxcompress.models.tokens import IDS, Tokenizer
from pxcompress.planning.plan_file import plan_from_json, read_planned_groups, read_planned_streams
from pxcompress.recipe import Recipe
from pxcompress.report.build import check_files, read_report
from pxcompress.run_folder.names import DENSE, PLAN, RECIPE, SLIM, TOKENIZER, WEIGHTS
from pxcompress.tasks import TASKS
from pxcompress.tasks.agreement import Agreement
from pxcompress.tasks.choice import as_judged
from pxcompress.types import Batches, Input, Preprocessing, Pruned


def preprocessing_of(metadata: Mapping[str, str], folder: Path) -> Preprocessing:
    """The preprocessing in an ONNX file's metadata; for texts, the tokenizer is read from `folder`.

    Raises `InputError` if the metadata have none.
    """
    try:
        inputs = inputs_from_json(metadata.get("inputs", "[]"))
        return Preprocessing(
            input_size=tuple(json.loads(metadata["input_size"])),
            mean=tuple(json.loads(metadata["input_mean"])),
            std=tuple(json.loads(metadata["input_std"])),
            interpolation=metadata["interpolation"],
            crop=json.loads(metadata["crop"]),
            inputs=inputs,
            tokenizer=_tokenizer(inputs, int(metadata["most_tokens"]), folder) if "most_tokens" in metadata else None,
            crop_mode=metadata.get("crop_mode", "center"),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"an ONNX file without preprocessing in its metadata ({type(error).__name__}: {error}); "
            "give files that pxcompress wrote, such as the dense.onnx of a run folder"
        ) from error


def _tokenizer(inputs: Sequence[Input], longest: int, folder: Path) -> Tokenizer:
    """The tokenizer of a run folder. Raises `InputError` if its file is missing."""
    content = read_text(folder / TOKENIZER, "put it beside the ONNX file")
    names = tuple(str(each.name) for each in inputs)
    return Tokenizer(content, names, longest, int(inputs[names.index(IDS)].high) + 1)


def read_run(folder: Path, data: str = "") -> Recipe:
    """The recipe of a run folder, with `data` replaced if given. Raises `InputError` for other folders."""
    path = folder / RECIPE
    recipe = Recipe.from_json(read_text(path, "give a run folder"), repr(str(path)))
    return recipe.but(data=data) if data else recipe


def load(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The slim PyTorch model of a run folder, in eval mode on the CPU.

    It is built from the architecture, plan.json and weights in safetensors. A folder that a module in Python was saved
    to does not say how to build one: then `model`, which is left as it was, must be a module like the dense one, with
    any weights. Raises `InputError` for a folder that is no run folder or was written for another version of the
    architecture, and for a file that has changed. Nothing in the folder is executed.
    """
    slim = load_pruned(Path(folder), model).model
    release_(slim)
    return slim


def check_loads(folder: Path, batches: Batches, model: nn.Module | None = None) -> None:
    """Raise `ParityError` if `load` gives another model than the exported one, tried on the first of `batches`.

    `model` is as in `load`.
    """
    pruned = load_pruned(folder, model)
    parity = verify_parity(pruned.model, folder / SLIM, list(islice(batches, 1)))
    if not parity.passed:
        raise ParityError(
            f"the model that load() builds from the folder differs from {SLIM} by up to {parity.max_abs:.2e}: the "
            "architecture keeps a state in no tensor; register what it draws or counts as buffers"
        )


def load_pruned(folder: Path, model: nn.Module | None = None) -> Pruned:
    """The slim model of a run folder with groups and plan; its `dense` has random weights, not the run's.

    Raises `InputError` for other folders, and if the model cannot be built again.
    """
    check_files(folder, read_report(folder).sha256)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        plan = (folder / PLAN).read_text(encoding="utf-8")
    except (OSError, SafetensorError, UnicodeDecodeError) as error:
        raise InputError(f"{str(folder)!r} is not a run folder ({error}); expected {PLAN} and {WEIGHTS}") from error
    try:
        return _rebuild(metadata, plan, state, folder, model)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:  # what is there does not fit
        reason = describe(error)
        raise InputError(f"the model in {str(folder)!r} cannot be built again ({reason}); run again") from error


def _rebuild(
    metadata: Mapping[str, str], plan: str, state: Mapping[str, Tensor], folder: Path, own: nn.Module | None = None
) -> Pruned:
    """Build the architecture in `metadata`, or copy the module `own`, prune it by `plan`, and load `state` into it."""
    shape = tuple(json.loads(metadata["input_shape"]))
    preprocessing = Preprocessing(shape, inputs=inputs_from_json(metadata.get("inputs", "[]")))
    example = blank_inputs(preprocessing)
    architecture = Architecture.from_json(metadata["architecture"])
    if architecture.is_file:  # the dense model lies in the folder
        architecture = Architecture(str(folder / DENSE), architecture.kwargs)
    built = architecture.build() if own is None or architecture.is_file else copy.deepcopy(own).cpu()
    release_(built)
    dense = make_plain(built, preprocessing)
    dense.eval()
    if "outputs" in metadata and not architecture.is_file:
        dense = slice_classes(dense, example, json.loads(metadata["outputs"]))
    task = Agreement() if architecture.in_python else TASKS.build(metadata.get("task", "classification"))
    dense = as_judged(dense, example, task)
    dense, structure = make_prunable(dense, example, read_planned_streams(plan), prove=False)
    groups = read_planned_groups(plan, structure.groups)
    pruned = restore_layer_norms(prune(dense, groups, plan_from_json(plan, groups)))
    model = pruned.model
    unregistered = {name: state[name] for name in json.loads(metadata.get("outside", "[]"))}
    restore_unregistered_(model, unregistered)
    state = {name: value for name, value in state.items() if name not in unregistered}
    for name in state.keys() - model.state_dict().keys():
        module, _, parameter = name.rpartition(".")
        model.get_submodule(module).register_parameter(parameter, nn.Parameter(state[name]))
    load_state(model, state, (), WEIGHTS)
    return pruned
