"""The base class of all tasks. Its methods take the outputs of a batch by name, each a tensor (n, ...)."""

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
"""A model's outputs for n samples: name in the ONNX file -> tensor (n, ...)."""


Layout = Literal["classes", "identities", "masks", "boxes", "keypoints", "labels", "numbers", "unlabelled"]
"""The kind of targets in some data.

"identities" are classes to be retrieved, "numbers" are vectors or maps, "unlabelled" means that there are none.
"""


@dataclass(frozen=True)
class Task:
    """What a model's outputs mean. A registered subclass is a frozen dataclass; its fields are its options.

    `metric` is the quality by which models are judged on labelled samples. `layouts` are the kinds of targets that the
    task can use; they decide how targets are read that could be of several kinds. A task without any needs no targets.
    """

    metric: ClassVar[Metric]
    layouts: ClassVar[tuple[Layout, ...]] = ()
    output_name: ClassVar[str] = "output"
    """Name in the ONNX file for the output of a model that returns a single tensor."""

    is_classifier: ClassVar[bool] = False
    """Whether every sample has one class, as `classification` reads outputs, targets and statistics."""

    reads_dense: ClassVar[bool] = True
    """Whether `statistics` use the dense model's outputs; if not, the dense model need not run as well."""

    scaled: ClassVar[bool] = False
    """Whether the scale of losses depends on the samples; see `with_scale`."""

    trains_by_divergence: ClassVar[bool] = False
    """Whether training as a repair minimises `divergence`; else it minimises the squared error of all outputs."""

    whole_images: ClassVar[bool] = False
    """Whether the edges of an image matter, so that it is padded instead of cropped."""

    subject: ClassVar[str] = "the output"
    """Words for what relevance explains, if it does not start at single classes or numbers."""

    @property
    def needs_targets(self) -> bool:
        """Whether samples need targets, of one of the `layouts`."""
        return bool(self.layouts) and "unlabelled" not in self.layouts

    def logits(self, outputs: Outputs) -> Tensor:
        """The numbers that decide, (n, k), or (n,) if their size counts; relevance starts at them.

        By default the largest value along axis 1 at every position, as a mean, summed over all outputs.
        """
        samples = len(next(iter(outputs.values())))
        largest = [(value if value.dim() > 1 else value[:, None]).amax(1) for value in list_float_outputs(outputs)]
        return torch.stack([value.reshape(samples, -1).mean(1) for value in largest]).sum(0)

    def class_outputs(self, outputs: Outputs) -> Tensor | None:
        """Logits or probabilities of the classes of each sample, (n, classes); None if the task has no classes."""
        return None

    def statistics(self, outputs: Outputs, targets: Tensor, dense: Outputs) -> Tensor:
        """Numbers for every sample from which quality is computed, (n, s).

        By default its agreement with the dense model. `targets` are those of the data, (n, ...), `dense` are the dense
        model's outputs for the same samples.
        """
        return self.agreement(outputs, dense)[:, None]

    def complete(self, statistics: Tensor) -> Tensor:
        """Final statistics (n, t) from those of single samples (n, s), for tasks that compare samples.

        By default unchanged.
        """
        return statistics

    def quality(self, statistics: Tensor) -> float:
        """The metric, from completed statistics (n, t); by default the mean of their first column."""
        return float(statistics[:, 0].double().mean())

    def agreement(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """How far two models agree on each sample, (n,) in [0, 1]; by default 1 minus the divergence."""
        return (1 - self.divergence(outputs, dense)).clamp(0, 1)

    def divergence(self, outputs: Outputs, dense: Outputs) -> Tensor:
        """Distance of outputs from the dense model's for each sample, (n,), 0 for equal ones; it shows small changes.

        By default the squared error as a share of the dense outputs' variance, as a mean over the outputs.
        """
        pairs = zip(list_float_outputs(outputs), list_float_outputs(dense), strict=True)
        return torch.stack([relative_errors(value, reference) for value, reference in pairs]).mean(0)

    def loss(self, statistics: Tensor) -> Tensor:
        """Loss of each sample, (n,) in [0, 1], from completed statistics; certificates bound its mean."""
        return (1 - statistics[:, 0]).clamp(0, 1)

    def with_scale(self, statistics: Tensor) -> Task:
        """This task with the scale of its losses set from completed statistics of other samples, if it is `scaled`.

        Losses of samples that share a scale of their own would not be independent, as certificates need them.
        """
        return self

    def training_loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        """Loss of a batch, a scalar, by which embedded data train a net; without one the kind of targets decides."""
        raise NotImplementedError

    def check(self, outputs: Outputs, targets: Tensor) -> None:
        """Raise `InputError` if the targets do not fit the model's outputs."""

    def answer(self, outputs: Outputs, classes: Sequence[str], size: tuple[int, int] | None = None) -> Answer:
        """The answer in the outputs (1, ...) of one sample; by default a few numbers, or their shapes.

        `classes` are names of the data's classes or numbers; `size` is height and width of inputs that are images.
        """
        return Answer(list_parts((f"{name} {_describe_values(value)}" for name, value in outputs.items()), "nothing"))

    def describe_target(self, target: Tensor, classes: Sequence[str]) -> str:
        """The target of one sample in words; "" if there is none."""
        return ""


def _describe_values(value: Tensor) -> str:
    """The numbers of one sample (1, ...) as text, or their shape if they are many."""
    if value.numel() > MOST_PARTS:
        return str(tuple(value.shape[1:]))
    return " ".join(f"{number:.3g}" for number in value.flatten().tolist())


def list_float_outputs(outputs: Outputs) -> list[Tensor]:
    """The outputs with floating-point numbers."""
    return [value for value in outputs.values() if is_real(value)]


def pick_output(outputs: Outputs, name: str, dim: int, expected: str) -> Tensor:
    """The output `name`, or else the first with `dim` axes. Raises `InputError` if there is none."""
    candidates = (
        [outputs[name]] if name in outputs else [value for value in list_float_outputs(outputs) if value.dim() == dim]
    )
    if not candidates or candidates[0].dim() != dim:
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in outputs.items())
        raise InputError(f"the model returns {shapes}; expected {expected}")
    return candidates[0]


def relative_errors(value: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error of every sample divided by the variance of the whole reference, (n,)."""
    value, reference = value.double(), reference.double()
    scale = (reference - reference.mean()).square().mean().clamp_min(1e-12)
    return (value - reference).square().reshape(len(value), -1).mean(1) / scale


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL divergence from softmax(reference) to softmax(logits) over axis 1, a mean over positions, (n,)."""
    one, other = reference.double().log_softmax(1), logits.double().log_softmax(1)
    return (one.exp() * (one - other)).sum(1).reshape(len(logits), -1).mean(1)
