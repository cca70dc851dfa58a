"""The contract of a task. Every method takes the outputs of a batch by name, each a tensor (n, ...)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pxcompress.errors import InputError
from pxcompress.models.outputs import is_real
from pxcompress.proof import Metric
from pxcompress.tasks.answer import MOST_PARTS, Answer, list_parts

Outputs = Mapping[str, Tensor]
"""What a model returns for n samples: every tensor (n, ...) by its name in the ONNX file."""


Layout = Literal["classes", "identities", "masks", "boxes", "keypoints", "labels", "numbers", "unlabelled"]
"""What the targets are: a class, an identity to be found again, a class per pixel, boxes with joints or without,
labels or numbers for each input; or there are none."""


@dataclass(frozen=True)
class Task:
    """What outputs mean. A subclass that is registered is a frozen dataclass; its fields are its options.

    `metric` is what models are judged by on labelled samples. `layouts` are the layouts of data whose targets the task
    reads; a task without any needs no targets.
    """

    metric: ClassVar[Metric]
    layouts: ClassVar[tuple[Layout, ...]] = ()
    output_name: ClassVar[str] = "output"
    """Name in the ONNX file of the output of a model that returns a single tensor."""

    reads_dense: ClassVar[bool] = True
    """Whether `statistics` look at the dense model's outputs; where not, it need not run beside the pruned one."""

    scaled: ClassVar[bool] = False
    """Whether the scale of losses depends on the samples; see `with_scale`."""

    trains_by_divergence: ClassVar[bool] = False
    """Whether a repair that trains makes `divergence` small; else the squared error of all outputs."""

    whole_images: ClassVar[bool] = False
    """Whether the ends of an image count: it then gets a border instead of being cropped."""

    subject: ClassVar[str] = "the output"
    """What relevance explains, where it does not start at single classes or numbers."""

    def logits(self, outputs: Outputs) -> Tensor:
        """The numbers that decisions rest on, (n, k), or (n,) where their size counts: relevance starts there.

        By default the largest value along axis 1 at every position, as a mean, summed over all outputs.
        """
        samples = len(next(iter(outputs.values())))
        largest = [(value if value.dim() > 1 else value[:, None]).amax(1) for value in list_float_outputs(outputs)]
        return torch.stack([value.reshape(samples, -1).mean(1) for value in largest]).sum(0)

    def class_outputs(self, outputs: Outputs) -> Tensor | None:
        """Logits or probabilities of the classes of each sample, (n, classes); None where there are no such."""
        return None

    def statistics(self, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
        """What every sample adds to the quality of a model, (n, s); by default its agreement with the dense model.

        `targets` are those of the data, (n, ...), `dense` are the dense model's outputs for the same samples.
        """
        return self.agreement(outputs, dense)[:, None]

    def complete(self, statistics: Tensor) -> Tensor:
        """Statistics (n, t) after samples were compared with each other, from (n, s) of each; by default unchanged."""
        return statistics

    def quality(self, statistics: Tensor) -> float:
        """The metric over completed statistics (n, t); by default the mean of their first column."""
        return float(statistics[:, 0].double().mean())

    def agreement(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """How far two models agree on each sample, (n,) in [0, 1]; by default 1 less the normalised error."""
        return (1 - self.divergence(outputs, dense)).clamp(0, 1)

    def divergence(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """How far outputs are from the dense model's, (n,), 0 where they are equal: what small changes show in.

        By default the squared error as a share of the dense outputs' variance, as a mean over the outputs.
        """
        pairs = zip(list_float_outputs(outputs), list_float_outputs(dense), strict=True)
        return torch.stack([relative_errors(value, reference) for value, reference in pairs]).mean(0)

    def loss(self, statistics: Tensor) -> Tensor:
        """Loss of every sample, (n,) in [0, 1], from completed statistics; certificates bound its mean."""
        return (1 - statistics[:, 0]).clamp(0, 1)

    def with_scale(self, statistics: Tensor) -> Task:
        """A `scaled` task with the scale of its losses from completed statistics of other samples; others unchanged.

        Losses of samples that share a scale of their own would not be independent, as certificates need them.
        """
        return self

    def check(self, outputs: Outputs, targets: Tensor) -> None:
        """Raise `InputError` where targets do not fit what the model returns."""

    def answer(self, outputs: Outputs, classes: Sequence[str], size: tuple[int, int] | None = None) -> Answer:
        """What the outputs (1, ...) of one sample say to a reader; by default a few numbers, or their shapes.

        `classes` name the data's classes or numbers; `size` is height and width of inputs that are images.
        """
        return Answer(list_parts((f"{name} {_describe_values(value)}" for name, value in outputs.items()), "nothing"))

    def describe_target(self, target: Tensor, classes: Sequence[str]) -> str:
        """The target of one sample in words; "" where there is none to speak of."""
        return ""


def _describe_values(value: Tensor) -> str:
    """The numbers of one sample (1, ...), or their shape where they are many."""
    if value.numel() > MOST_PARTS:
        return str(tuple(value.shape[1:]))
    return " ".join(f"{number:.3g}" for number in value.flatten().tolist())


def list_float_outputs(outputs: Outputs) -> list[Tensor]:
    """The outputs whose values are floating-point numbers."""
    return [value for value in outputs.values() if is_real(value)]


def pick_output(outputs: Outputs, name: str, dim: int, expected: str) -> Tensor:
    """The output `name`, or else the first with `dim` axes. Raises `InputError` where there is none."""
    candidates = (
        [outputs[name]] if name in outputs else [value for value in list_float_outputs(outputs) if value.dim() == dim]
    )
    if not candidates or candidates[0].dim() != dim:
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in outputs.items())
        raise InputError(f"the model returns {shapes}; expected {expected}")
    return candidates[0]


def relative_errors(value: Tensor, reference: Tensor) -> Tensor:
    """Squared error of every sample over the mean squared size of the reference around its mean, (n,)."""
    value, reference = value.double(), reference.double()
    scale = (reference - reference.mean()).square().mean().clamp_min(1e-12)
    return (value - reference).square().reshape(len(value), -1).mean(1) / scale


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL divergence of distributions over axis 1 from those of `reference`, as a mean over positions, (n,)."""
    one, other = reference.double().log_softmax(1), logits.double().log_softmax(1)
    return (one.exp() * (one - other)).sum(1).reshape(len(logits), -1).mean(1)
