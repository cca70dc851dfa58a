"""The trial that every group must pass: the cut model's outputs, and no other layer that could read the units.

It runs with the example and a perturbed copy of it, which has the example's type and range: a model of spectrograms may
take the logarithm of its input. Before that the dense model runs twice, since one that draws at random can prove
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pxcompress.errors import ModelError, describe
from pxcompress.graph.idle import Idle, idle_layers
from pxcompress.graph.removal import REMOVAL_TOLERANCE, exact_removal_error, prune, removal_error
from pxcompress.models.adapter import all_outputs, perturb
from pxcompress.models.outputs import difference
from pxcompress.state import device_of, evaluating
from pxcompress.types import Group, Plan, Pruned

PROOF_TOLERANCE = 1e-6
"""Largest difference that removal may make in float64, as a share of the outputs' scale.

Outputs that hardly depend on the input, as those of a net with random weights may, would hide a wrong removal below the
tolerance of float32.
"""

NOT_EXACT = "removing its units is not the same as zeroing them"


@dataclass(frozen=True, eq=False)
class Trial:
    """Tests whether groups can be removed, on two inputs (2, ...); it also knows the layers that these do not reach."""

    model: nn.Module
    inputs: Tensor
    idle: Idle

    def fault(self, groups: Sequence[Group]) -> str:
        """The reason why half of the units of all `groups` cannot be removed together; "" if they can.

        The units are drawn at random: every other one may happen to be right.
        """
        draw = torch.Generator().manual_seed(0)
        half = {group.name: torch.randperm(group.units, generator=draw)[: group.units // 2] for group in groups}
        removed_units = {name: tuple(units.tolist()) for name, units in half.items()}
        try:
            pruned = prune(self.model, groups, Plan(removed_units, "trial", "units", 0, 0, 0))
            error, tolerance = _measure_error(pruned, self.inputs)
            if not error <= tolerance:
                return f"{NOT_EXACT}: {_describe_error(error)}"
            return self.idle.fault(pruned.model, self.inputs)
        except Exception as error:  # noqa: BLE001  (torch-pruning and the cut model may fail in any way)
            return f"its units cannot be removed: {describe(error)}"

    def faults(self, groups: Sequence[Group]) -> dict[str, str]:
        """Group name -> the reason why it must stay; all other groups can be removed together.

        Found by halving the set of suspects. Groups with the same first layer are tried apart as well: a forward that
        cuts its outputs in two halves runs where both lose as many.
        """
        faults: dict[str, str] = {}
        self._accept([], groups, faults)
        for part in _separate_shared(groups):
            self._accept([], [group for group in part if group.name not in faults], faults)
        return faults

    def _accept(self, accepted_groups: list[Group], suspects: Sequence[Group], faults: dict[str, str]) -> list[Group]:
        """`accepted_groups` and all suspects that pass together with them; reasons for the others go to `faults`."""
        candidate_groups = [*accepted_groups, *suspects]
        if not suspects or not (fault := self.fault(candidate_groups)):
            return candidate_groups
        if len(suspects) == 1:
            faults[suspects[0].name] = fault
            return accepted_groups
        middle = len(suspects) // 2
        accepted_groups = self._accept(accepted_groups, suspects[:middle], faults)
        return self._accept(accepted_groups, suspects[middle:], faults)


def _measure_error(pruned: Pruned, inputs: Tensor) -> tuple[float, float]:
    """Difference between removing and zeroing units, and the largest difference allowed, which is smaller in
    float64.
    """
    error = removal_error(pruned, inputs)
    if PROOF_TOLERANCE < error <= REMOVAL_TOLERANCE:
        with suppress(RuntimeError, TypeError):  # where it does not run in float64, float32 counts
            return exact_removal_error(pruned, inputs), PROOF_TOLERANCE
    return error, REMOVAL_TOLERANCE


def _separate_shared(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Sets of groups among those that share their first layer with others; no set has two with the same layer."""
    places: dict[str, list[Group]] = {}
    for group in groups:
        places.setdefault(group.members[0].module, []).append(group)
    several = [names for names in places.values() if len(names) > 1]
    for place in range(max(map(len, several), default=0)):
        yield [names[place] for names in several if place < len(names)]


def prepare_trial(model: nn.Module, example: Tensor) -> Trial:
    """Make a trial for a model. Raises `ModelError` if the dense model does not run in a comparable way."""
    inputs = make_trial_inputs(model, example)
    try:
        return Trial(model, inputs, idle_layers(model, inputs))
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied, or does not run as a copy: {describe(error)}"
        ) from error


def make_trial_inputs(model: nn.Module, example: Tensor) -> Tensor:
    """The example (1, ...) and a perturbed copy of it as one batch (2, ...), on the model's device.

    The model runs on both without NaN and gives the same each time. Raises `ModelError` if there are no such inputs.
    """
    example = example.to(device_of(model))
    outputs = _run_outputs(model, example, "does not run on the example")
    valid_inputs = [each for each in (example, perturb(model, example)) if _is_defined(model, each)]
    if not valid_inputs:
        shapes = ", ".join(str(tuple(value.shape)) for value in outputs)
        raise ModelError(
            f"{type(model).__name__} returns NaN for the example (outputs of shape {shapes}); expected an input that "
            "the model is made for, and finite weights"
        )
    inputs = torch.cat([valid_inputs[0], valid_inputs[-1]])
    first, second = (_run_outputs(model, inputs, "runs on one sample, but not on two at once") for _ in range(2))
    if not (error := difference(second, first)) <= REMOVAL_TOLERANCE:
        raise ModelError(
            f"{type(model).__name__} gives another output for the same input each time ({_describe_error(error)}): it "
            "draws at random or keeps a state; expected a forward that repeats itself in eval mode, such as "
            "F.dropout(x, p, self.training)"
        )
    return inputs


def _run_outputs(model: nn.Module, inputs: Tensor, failure: str) -> list[Tensor]:
    try:
        with torch.no_grad(), evaluating(model):
            return all_outputs(model, inputs)
    except ModelError:
        raise
    except Exception as error:  # a user's forward may raise anything
        raise ModelError(f"{type(model).__name__} {failure}: {describe(error)}") from error


def _is_defined(model: nn.Module, inputs: Tensor) -> bool:
    """Whether the model runs on `inputs` without a NaN."""
    try:
        return not any(bool(value.isnan().any()) for value in _run_outputs(model, inputs, ""))
    except ModelError:
        return False


def _describe_error(error: float) -> str:
    """A difference between outputs in words."""
    return "a shape or type changes" if error == torch.inf else f"outputs differ by {error:.1e} of their scale"
