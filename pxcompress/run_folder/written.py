"""Writes the models of a run: recipe, plan, scores, weights, and both ONNX files, compared with PyTorch."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from pxcompress import __version__
from pxcompress.certify.path import are_probabilities
from pxcompress.certify.record import CertificateRecord
from pxcompress.deploy.export import artifact_of, check_outputs, describe_packing, on_cpu
from pxcompress.deploy.parity import resize_doubled, verify_other_sizes, verify_parity
from pxcompress.deploy.runtime import find_backend
from pxcompress.errors import InputError, ModelError, ParityError
from pxcompress.models.rebuilding import unregistered_tensors
from pxcompress.models.signature import Signature
from pxcompress.models.transformers_folder import save_slim
from pxcompress.onnx_in import OnnxModule
from pxcompress.onnx_in.channels import LAST, LAYOUT
from pxcompress.onnx_in.writing import copy_file
from pxcompress.planning.plan_file import plan_to_json
from pxcompress.proof import (
    Artifact,
    Parity,
)
from pxcompress.recipe import Recipe
from pxcompress.run_folder.names import DENSE, PLAN, RECIPE, SLIM, TOKENIZER, WEIGHTS
from pxcompress.run_folder.served import write_served
from pxcompress.state import device_of, evaluating
from pxcompress.tasks import TASKS
from pxcompress.types import ClassRelevance, PruneResult
from pxcompress.workload import Workload


@dataclass(frozen=True)
class Files:
    """The exported models of a run folder, the pruned one's parity with PyTorch, and its certificate if any.

    `loading` says how another library can load the slim model, if it can.
    """

    dense: Artifact
    pruned: Artifact
    parity: Parity
    certificate: CertificateRecord | None = None
    loading: str = ""


def export(folder: Path, recipe: Recipe, workload: Workload, slim: PruneResult) -> Files:
    """Write recipe, plan, scores, weights and both ONNX files.

    Raises `ParityError` if ONNX Runtime computes something else.
    """
    dense = export_dense(folder / DENSE, recipe, workload)
    small = export_slim(folder / SLIM, recipe, workload, slim)
    return write_beside_onnx(folder, recipe, workload, slim, (dense, small))


def export_dense(path: Path, recipe: Recipe, workload: Workload) -> Artifact:
    """Write the dense model as ONNX."""
    metadata = {**_make_metadata(recipe, workload), "pruned": "no"}
    model = workload.loaded.model
    if isinstance(model, OnnxModule) and workload.whole is None and recipe.open_axes.batch is None:
        copy_file(model.source.path, path, {**metadata, **describe_packing(model)})
        return artifact_of(path)
    return _export(workload.loaded.model, path, metadata, recipe, workload)


def export_slim(path: Path, recipe: Recipe, workload: Workload, slim: PruneResult) -> Artifact:
    """Write a slim model as ONNX."""
    plan = sha256(_plan(slim).encode()).hexdigest()
    metadata = {
        **_make_metadata(recipe, workload),
        "pruned": "yes" if slim.pruned.plan.removed else "no",
        "plan_sha256": plan,
    }
    if slim.temperature != 1:
        metadata["temperature"] = f"{slim.temperature:.6g}"
    return _export(slim.pruned.model, path, metadata, recipe, workload)


def _export(model: nn.Module, path: Path, metadata: dict[str, str], recipe: Recipe, workload: Workload) -> Artifact:
    """Write `model` by the backend of the recipe's provider."""
    backend, name = find_backend(recipe.bench.provider), workload.task.output_name
    return backend.export(model, workload.splits.example, path, metadata, axes=recipe.open_axes, output_name=name)


def write_beside_onnx(
    folder: Path, recipe: Recipe, workload: Workload, slim: PruneResult, artifacts: tuple[Artifact, Artifact]
) -> Files:
    """Write recipe, plan, scores and slim weights beside the dense and slim ONNX files, and check parity.

    Raises `ParityError`.
    """
    dense, small = artifacts
    (folder / RECIPE).write_text(recipe.to_json(), encoding="utf-8")
    (folder / PLAN).write_text(_plan(slim), encoding="utf-8")
    scores = {name: values.float().contiguous() for name, values in slim.scores.items()}
    facts = {"made_by": json.dumps({"scorer": slim.scorer, "rates": slim.rates})}  # one key: their order is random
    (folder / "scores.safetensors").write_bytes(save(scores, facts))
    write_served(folder, workload.splits)
    if slim.class_relevance is not None:
        _save_class_relevance(slim.class_relevance, workload, folder / "class_scores.safetensors")
    _save_weights(slim.pruned.model, workload, folder / WEIGHTS)
    if tokenizer := workload.loaded.preprocessing.tokenizer:
        (folder / TOKENIZER).write_text(tokenizer.content, encoding="utf-8")
    loading = save_slim(slim.pruned.model, slim.pruned.whole.dense, folder)
    parity = _verify(slim.pruned.model, small.path, recipe, workload)
    if not parity.passed:
        raise ParityError(
            f"{SLIM} disagrees with PyTorch by up to {parity.max_abs:.2e} on {parity.samples} samples "
            f"({parity.agreement:.1%} of the decisions agree); please report the architecture"
        )
    return Files(dense, small, parity, loading=loading)


def check_dynamic_size(recipe: Recipe, workload: Workload) -> None:
    """Raise `InputError`, before any work, if files must take images of any size but the dense model cannot."""
    if not recipe.dynamic_size:
        return
    example, preprocessing = workload.splits.example, workload.loaded.preprocessing
    if preprocessing.inputs or example.dim() != 4:
        shape = "x".join(map(str, example.shape[1:]))
        raise InputError(f"--dynamic-size is for images, the model takes inputs of shape {shape}; leave it out")
    model, task = workload.loaded.model, workload.task
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / DENSE
        try:
            with on_cpu(model):
                for images in resize_doubled(example):
                    check_outputs(model, images, task.output_name)
            _export(model, path, {}, recipe, workload)
            parity = verify_other_sizes(model, path, example, task)
        except InputError as error:
            raise ModelError(f"--dynamic-size: {error}; leave it out") from error
    if not parity.passed:
        raise ModelError(
            f"--dynamic-size: the exported file disagrees with PyTorch by up to {parity.max_abs:.2e} on images of "
            "other sizes; leave it out"
        )


def _verify(model: nn.Module, path: Path, recipe: Recipe, workload: Workload) -> Parity:
    """The parity of a file with `model`; if it takes images of any size, the worse of that at several sizes."""
    test = workload.splits.test
    parity = verify_parity(model, path, test, task=workload.task)
    if not recipe.dynamic_size:
        return parity
    other = verify_other_sizes(model, path, next(iter(test))[0], workload.task)
    return replace(parity, max_abs=max(parity.max_abs, other.max_abs), passed=parity.passed and other.passed)


def _plan(slim: PruneResult) -> str:
    return plan_to_json(slim.pruned.plan, slim.pruned.groups)


def _save_weights(model: nn.Module, workload: Workload, path: Path) -> None:
    """Write the slim model's weights, and all that `load` needs to build the module around them."""
    metadata = {
        "format": "pt",
        "architecture": workload.loaded.architecture.to_json(),
        "input_shape": json.dumps(list(workload.splits.example.shape[1:])),
        "pxcompress": __version__,
        "task": TASKS.text(workload.task),
        "inputs": Signature(workload.loaded.preprocessing.inputs).to_json(),
    }
    if workload.whole:
        metadata["outputs"] = json.dumps(workload.whole.outputs)
    unregistered = unregistered_tensors(model)
    metadata["outside"] = json.dumps(sorted(unregistered))
    tensors = {**model.state_dict(), **unregistered}
    state = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    path.write_bytes(save(state, metadata))  # not `save_file`: its errors are no OSError, its files for the owner only


def _save_class_relevance(relevance: ClassRelevance, workload: Workload, path: Path) -> None:
    """Write the relevance for classes: group name -> (classes, units), with names and counts of classes as metadata."""
    metadata = {"classes": json.dumps(workload.source.classes), "samples": json.dumps(relevance.samples)}
    path.write_bytes(save({name: values.contiguous() for name, values in relevance.units.items()}, metadata))


def _make_metadata(recipe: Recipe, workload: Workload) -> dict[str, str]:
    """Metadata of the ONNX files: where they come from, their preprocessing, and what their outputs mean."""
    preprocessing, model = workload.loaded.preprocessing, workload.loaded.model
    return {
        "pxcompress": __version__,
        "recipe_sha256": recipe.hash,
        "model": recipe.model,
        "task": TASKS.text(workload.task),
        "classes": json.dumps(workload.source.classes),
        "input_mean": json.dumps(preprocessing.mean),
        "input_std": json.dumps(preprocessing.std),
        "input_size": json.dumps(list(workload.splits.example.shape[1:])),  # of texts that of a middle length
        "interpolation": preprocessing.interpolation,
        "crop": json.dumps(preprocessing.crop),
        **({"most_tokens": str(preprocessing.tokenizer.longest)} if preprocessing.tokenizer else {}),
        "crop_mode": preprocessing.crop_mode,
        **({LAYOUT: LAST} if isinstance(model, OnnxModule) and model.channels_last else {}),
        "output": "probabilities" if _gives_probabilities(workload) else "logits",
    }


def _gives_probabilities(workload: Workload) -> bool:
    """Whether a classifier ends in a softmax, by its outputs for some samples."""
    if not workload.task.is_classifier:
        return False
    model = workload.loaded.model
    if isinstance(model, OnnxModule) and model.tails:  # the softmax that the module leaves out
        return True
    inputs, _ = next(iter(workload.splits.select))
    with evaluating(model), torch.no_grad():
        return are_probabilities(model(inputs.to(device_of(model))).cpu().numpy())
