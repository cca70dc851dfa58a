"""Temperature scaling: divides the slim model's logits by a number, so that its probabilities are calibrated."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from pxcompress.certify.calibration import fit_temperature, log_probabilities
from pxcompress.errors import InputError, ResultError
from pxcompress.models.adapter import named_outputs
from pxcompress.models.loading import classifier_names
from pxcompress.passes.memory import in_smaller_batches
from pxcompress.processes import gather_rows
from pxcompress.run import Run
from pxcompress.state import device_of, evaluating
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.task import Task
from pxcompress.types import Batches, PruneResult

TOLERANCE = 1e-4
"""Largest accepted error of log-probabilities after dividing the last layer, as a share of their scale."""


def with_temperature(slim: PruneResult, example: Tensor, run: Run) -> PruneResult:
    """`slim` with its logits divided by a fitted temperature, if the recipe asks for it; changes its model.

    The temperature is fitted to labels of held-out samples. Weights and bias of the last layer are divided by it, so
    that nothing is added to the ONNX graph, and no prediction changes. Raises `InputError` if no labelled samples are
    held out, `ResultError` if the logits are not directly the last layer's.
    """
    if not run.recipe.temperature_scaling:
        return slim
    if not run.held_out:
        raise InputError("temperature scaling needs labelled samples that are held out; give more, or leave it out")
    task, model = run.task or Classification(), slim.pruned.model
    with run.clock.stage("temperature"):
        read = partial(_read_outputs, model, task=task)
        outputs, labels = in_smaller_batches(read, run.held_out, run.clock.say)
        temperature = fit_temperature(outputs.numpy(), labels.numpy())
        divide_logits_(model, classifier_names(model, example), temperature)
        divided, _ = in_smaller_batches(read, run.held_out, run.clock.say)
    _check_divided(outputs, divided, temperature)
    return replace(slim, temperature=temperature)


def divide_logits_(model: nn.Module, names: tuple[str, ...], temperature: float) -> None:
    """Divide weights and bias of the layers `names`, which compute the logits, by `temperature`, in place."""
    with torch.no_grad():
        for name in names:
            for value in model.get_submodule(name).parameters(recurse=False):
                value.div_(temperature)


def _read_outputs(model: nn.Module, batches: Batches, task: Task) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and labels (n,) of all samples of all processes, on the CPU."""
    outputs, labels = [], []
    with evaluating(model), torch.no_grad():
        for inputs, targets in batches:
            outputs.append(task.logits(named_outputs(model, inputs.to(device_of(model)), task.output_name)))
            labels.append(targets)
    return gather_rows(outputs), gather_rows(labels)


def _check_divided(before: Tensor, after: Tensor, temperature: float) -> None:
    """Raise `ResultError` if the outputs `after` are not those `before` divided by `temperature`."""
    expected = log_probabilities(log_probabilities(before.numpy()) / temperature)
    actual = log_probabilities(after.numpy())
    error = float(np.abs(actual - expected).max() / max(1.0, float(np.abs(expected).max())))
    if not error <= TOLERANCE:
        raise ResultError(
            f"dividing the last layer by the temperature {temperature:.3g} changes the log-probabilities by "
            f"{error:.1e} of their scale more than it should: something else stands between it and the output; leave "
            "--temperature-scaling out"
        )
