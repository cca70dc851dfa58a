"""How near a pruned model's outputs are to the dense model's: what choices are judged by without labels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from pxcompress.models.adapter import Adapter, named_outputs
from pxcompress.models.outputs import is_real
from pxcompress.notes import silent
from pxcompress.passes.memory import in_smaller_batches
from pxcompress.passes.parts import SplitBatches
from pxcompress.processes import sum_over_processes
from pxcompress.state import device_of, evaluating
from pxcompress.tasks.agreement import Agreement as AnyOutputs
from pxcompress.tasks.task import Outputs, Task
from pxcompress.types import Agreement, Batches

KEPT_BYTES = 1 << 28
"""Most bytes of the dense model's outputs that are stored between comparisons.

With more, the model runs again each time.
"""


class DenseOutputs:
    """The dense model's outputs on a set of samples, to compare pruned models with. Empty batches are allowed.

    The `task` says how outputs are compared; without a task, logits are compared where the model has them, else all
    outputs.
    """

    def __init__(self, model: nn.Module, batches: Batches, task: Task | None = None) -> None:
        self._model = model
        self._batches = SplitBatches(batches)
        self._task = task
        self._kept: dict[str, Tensor] | None = None

    def compare(self, model: nn.Module) -> Agreement:
        """Compare the outputs of `model` with the dense model's: the mean agreement and divergence over all samples.

        One pass of `model` over the samples of all processes. The dense model runs too where its outputs were too large
        to store. Batches are made smaller when memory runs out.
        """
        sums = in_smaller_batches(partial(self._sum_agreements, model), self._batches, silent)
        samples, share, divergence = sum_over_processes(sums.to(device_of(model))).tolist()
        return Agreement(int(samples), share / max(samples, 1), divergence / max(samples, 1))

    def _sum_agreements(self, model: nn.Module, batches: Batches) -> Tensor:
        """Number of samples, sum of their agreements and sum of their divergences, as one tensor (3,) float64."""
        task = self._task or AnyOutputs()
        sums = torch.zeros(3, dtype=torch.float64)
        dense_outputs: list[Mapping[str, Tensor]] = []
        samples_before = size = 0
        for inputs, _ in batches:
            dense = self._run_dense(inputs, samples_before)
            samples_before += len(inputs)
            size += sum(value.numel() * value.element_size() for value in dense.values())
            if self._kept is None and size <= KEPT_BYTES:
                dense_outputs.append(dense)
            pruned = _run_outputs(model, inputs, self._task)
            same_decisions, distance = task.agreement(pruned, dense), task.divergence(pruned, dense)
            sums += torch.stack(
                [torch.tensor(float(len(inputs)), dtype=torch.float64), same_decisions.sum(), distance.sum()]
            )
        if self._kept is None and dense_outputs and size <= KEPT_BYTES:
            self._kept = {name: torch.cat([outputs[name] for outputs in dense_outputs]) for name in dense_outputs[0]}
        return sums

    def _run_dense(self, inputs: Tensor, samples_before: int) -> Outputs:
        """The dense model's outputs for `inputs`, which follow `samples_before` others."""
        if self._kept is not None:
            return {name: value[samples_before : samples_before + len(inputs)] for name, value in self._kept.items()}
        return _run_outputs(self._model, inputs, self._task)


def _run_outputs(model: nn.Module, inputs: Tensor, task: Task | None) -> Outputs:
    """The outputs that are compared, by name, on the CPU: every one of floating-point numbers.

    Without a `task` and with a model that has logits, only these.
    """
    with evaluating(model), torch.no_grad():
        inputs = inputs.to(device_of(model))
        if task is None and (not isinstance(model, Adapter) or model.signature_.logits is not None):
            outputs = {"logits": model(inputs)}
        else:
            outputs = named_outputs(model, inputs)
    return {name: value.cpu() for name, value in outputs.items() if is_real(value)}
