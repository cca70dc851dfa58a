"""A short training towards the dense model's predictions, for losses that closed-form repairs leave.

Distillation without labels (Hinton et al., https://arxiv.org/abs/1503.02531) in which both models see the same
augmented images (Beyer et al., https://arxiv.org/abs/2106.05237): the loss is T^2 KL(dense / T || slim / T) over the
classes or, for a model that is no classifier, the squared error of all outputs or, where its task wants it, the task's
divergence. Errors at the outputs of blocks or layers added to it gained nothing on glyphs (a quarter of a ResNet's
MACs: top-1 91.7 % without, 91.2 to 91.6 % with them), nor did a moving average of the weights. Normalisation uses its
running statistics: the slim model is trained as it will be run.

The learning rate rises within a few steps and falls along a cosine. It is too high, as for compact pretrained networks
and for text encoders, where the error on held-out samples is clearly above that of the start right after the rise, or
no lower than it after a third of the steps: training begins again with a third of the rate.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pxcompress import __version__
from pxcompress.cache import cache_dir, whole_file
from pxcompress.cost.count import count_macs
from pxcompress.errors import DataError, ResultError
from pxcompress.models.training import (
    adamw,
    crop_images,
    deterministic,
    flushed_denormals,
    move_images,
    update,
    zero_denormals,
)
from pxcompress.passes.parts import SplitBatches
from pxcompress.passes.shuffled import ShuffledBatches, mix_seed
from pxcompress.processes import from_first, mean_gradients_, processes, rank, sum_over_processes
from pxcompress.registry import option
from pxcompress.repair import REPAIRS
from pxcompress.repair.objective import Objective, Validation, named_predictions
from pxcompress.state import device_of, evaluating, seeded
from pxcompress.types import Batch, Batches, Phase, Pruned, Repair

WARM_UP, TRIAL = 8, 12
"""Number of steps in which the learning rate rises, and number after which the error is compared with the start's.

Both are at most a tenth of a training.
"""

NEXT_RATE = 0.3
"""Highest learning rate of the next attempt, as a share of that of an attempt whose rate was too high."""

WORSE_AFTER_TRIAL, WORSE_LATER = 1.5, 2.0
"""A learning rate is too high where the error on held-out samples is this many times the least error so far."""

CHECKS = 12
"""Most evaluations on held-out samples, evenly spread over the steps."""

PASSES, MOST_STEPS = 5, 300
"""Default length of training, about as long as the rest of a run: passes over the samples, and most steps."""

LONGER, SMALL_WORK = 4, 3e12
"""Small models train up to `LONGER` times as many steps, as far as `SMALL_WORK` MACs allow: a minute on two cores."""

CROPPED_SIDE = 128
"""Smallest side, in pixels, of images that are cropped at random; a crop of smaller ones may not show the object."""

SAVE_SECONDS = 60.0
"""Seconds between two checkpoints."""


@REPAIRS.register("finetune")
@dataclass(frozen=True)
class FineTune(Repair):
    """Train with AdamW towards the dense model's predictions, without labels.

    The best weights on held-out samples win.
    """

    phase: ClassVar[Phase] = "train"
    costly: ClassVar[bool] = True

    temperature: float = option(4.0, "what both models' logits are divided by", low=0.1, high=100.0, log=True)
    steps: int = option(
        0,
        f"steps of the optimiser; 0: what {PASSES} passes over the samples take, {MOST_STEPS} at most, "
        f"and up to {LONGER} times as many for small models",
        low=0,
        high=10**6,
    )
    learning_rate: float = option(1e-3, "its highest value; it falls to 0 along a cosine", low=1e-7, high=1.0, log=True)
    batch_size: int = option(16, "samples in a batch, in every process", low=1, high=65_536, log=True)
    accumulate: int = option(1, "batches whose gradients are added up for one step", low=1, high=1024, log=True)
    labels: bool = option(False, "add the cross-entropy with the labels to the loss, and choose weights by top-1")
    augment: bool = option(
        True, f"randomly shift, rotate and zoom images, and crop those of {CROPPED_SIDE} pixels or more"
    )
    precision: str = option(
        "fp32", "precision of forward and backward passes; weights stay fp32", choices=("fp32", "bf16")
    )

    @property
    def needs_labels(self) -> bool:
        """Whether it trains on labels (n,), which needs logits (n, classes)."""
        return self.labels

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """Train all weights that require gradients; normalisation statistics stay.

        The best weights on `held_out`, those of the start included, are the result: by the mean distance from the
        dense model or, with labels, by top-1. Without `held_out` it is the last ones. PyTorch's seed decides on
        order and augmentation. A training that is interrupted after more than `SAVE_SECONDS` goes on where it was when
        it is called again, and ends with the same weights. If `batches` are `SplitBatches` with a size, since memory
        allows no more, batches have at most that size, and a step adds up the gradients of more of them. Raises
        `DataError` where there is no sample or an impossible label, `ResultError` when training diverges.
        """
        model, dense, seed = pruned.model, pruned.whole.dense, torch.initial_seed()
        trained_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained_parameters:
            return pruned
        samples, data = _hash_samples(batches)
        if not samples:
            raise DataError("no sample to fine-tune on; give data with more images, or leave repair 'finetune' out")
        held_samples, checks = _hash_samples(held_out)
        options = replace(self, steps=self.steps or self._usual_steps(samples, _training_macs(pruned, batches)))
        options = options._within(batches.size) if isinstance(batches, SplitBatches) and batches.size else options
        facts = [__version__, asdict(options), seed, _hash(model), _hash(dense), data, checks]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        path = cache_dir() / "finetune" / f"{name}.safetensors"
        feed = ShuffledBatches(batches, samples, options.batch_size, seed)
        with (
            evaluating(model),
            evaluating(dense),
            seeded(seed),
            flushed_denormals(),
            deterministic(),
            torch.enable_grad(),
        ):
            for parameter in trained_parameters:
                parameter.requires_grad_(True)
            aim = Objective(dense, options.temperature, options.labels)
            judge = Validation(aim, held_out, held_samples, device_of(model)) if held_samples else None
            _Training(options, model, aim, seed).run(feed, judge, path)
        return pruned

    def _usual_steps(self, samples: int, macs: int) -> int:
        """The default number of steps: `PASSES` over the samples of all processes, but at most `MOST_STEPS`.

        `samples` is the number in this process, `macs` are those of training on one sample. Small models train up to
        `LONGER` times as long, for `SMALL_WORK` MACs at most.
        """
        everyone = int(sum_over_processes(torch.tensor(samples)))
        samples_of_step = self.batch_size * self.accumulate * processes()
        usual = min(MOST_STEPS, -(-PASSES * everyone // samples_of_step))
        return max(usual, min(LONGER * usual, int(SMALL_WORK / (max(macs, 1) * samples_of_step))))

    def _within(self, size: int) -> FineTune:
        """A copy of these options with batches of at most `size` samples, and as many samples in a step as before."""
        if self.batch_size <= size:
            return self
        return replace(self, batch_size=size, accumulate=self.accumulate * -(-self.batch_size // size))


@dataclass
class _Progress:
    """The state of a training in numbers: its step, the least error so far, and the attempt with its first step.

    Every attempt has a lower learning rate than the one before; `error_before` is the least error before it.
    """

    attempt: int
    attempt_begin: int
    error_before: float = math.inf
    step: int = 0
    error: float = math.inf


class _Training:
    """A training in progress: the model's weights, the best weights so far, the optimiser, and the progress."""

    def __init__(self, options: FineTune, model: nn.Module, aim: Objective, seed: int) -> None:
        self._options = options
        self._model = model
        self._aim = aim
        self._seed = seed
        self._device = device_of(model)
        self._weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._best: dict[str, Tensor] = {}
        self._optimizer = adamw(model, options.learning_rate, weight_decay=0.0)
        self._progress = _Progress(attempt=0, attempt_begin=0)

    def run(self, feed: ShuffledBatches, judge: Validation | None, path: Path) -> None:
        """Train to the end, resuming from the checkpoint in `path` if there is one; the model gets the best weights."""
        self._model.zero_grad()
        self._resume(path)
        options, progress = self._options, self._progress
        if judge and not progress.step:
            progress.error_before = self._check(judge)
        batches = feed.iterate_from(progress.step * options.accumulate)
        every, saved_at = -(-options.steps // CHECKS), time.monotonic()
        while progress.step < options.steps:
            self._step(batches)
            after_trial = progress.step - progress.attempt_begin == min(TRIAL, every)
            if judge and (after_trial or progress.step % every == 0 or progress.step == options.steps):
                error = self._check(judge)
                if progress.step < options.steps and not options.labels and self._rate_too_high(error, after_trial):
                    self._begin_attempt()
            if from_first(time.monotonic() - saved_at >= SAVE_SECONDS):
                self._save(path)
                saved_at = time.monotonic()
        self._put(self._best)
        zero_denormals(self._model)
        with suppress(OSError):  # there is none after a short training, or on a disk that cannot be written
            path.unlink()

    def _rate_too_high(self, error: float, after_trial: bool) -> bool:
        """Whether the held-out error is far above the least one, or a third of the attempt has not lowered it."""
        options, progress = self._options, self._progress
        if error > (WORSE_AFTER_TRIAL if after_trial else WORSE_LATER) * progress.error:
            return True
        third = (options.steps - progress.attempt_begin) / 3
        return progress.error >= progress.error_before and progress.step - progress.attempt_begin >= third

    def _begin_attempt(self) -> None:
        """Start again from the best weights at a lower learning rate, for the remaining steps."""
        progress = self._progress
        progress.error_before = progress.error
        self._put(self._best)
        self._optimizer = adamw(self._model, self._options.learning_rate, weight_decay=0.0)
        progress.attempt += 1
        progress.attempt_begin = progress.step

    def _step(self, batches: Iterator[Batch]) -> None:
        """Make one step of the optimiser.

        Its randomness depends on the seed and its number alone, so it can be repeated.
        """
        options, progress = self._options, self._progress
        torch.manual_seed(mix_seed(self._seed, 1 + rank(), progress.step))
        total = 0.0
        for inputs, labels in islice(batches, options.accumulate):
            loss = self._loss(inputs, labels) / options.accumulate
            loss.backward()
            total += float(loss.detach())
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(progress.step)
        mean_gradients_(self._model)
        norm = float(update(self._model, self._optimizer))
        progress.step += 1
        if not math.isfinite(total + norm):
            raise ResultError(
                f"fine-tuning diverged at step {progress.step} (loss {total:.3g}, norm of the gradient {norm:.3g}); "
                f"give a learning_rate below {options.learning_rate:g}"
            )

    def _rate(self, step: int) -> float:
        """The learning rate of a step: in each attempt it rises, then falls to 0 along a cosine."""
        progress = self._progress
        step, length = step - progress.attempt_begin, self._options.steps - progress.attempt_begin
        highest = self._options.learning_rate * NEXT_RATE**progress.attempt
        rise = min((step + 1) / min(WARM_UP, -(-length // CHECKS)), 1.0)
        return highest * rise * (1.0 + math.cos(math.pi * step / length)) / 2.0

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        inputs, labels = inputs.to(self._device), labels.to(self._device)
        if inputs.ndim == 4 and self._options.augment:
            inputs = (crop_images if min(inputs.shape[2:]) >= CROPPED_SIDE else move_images)(inputs)
        if inputs.ndim == 4 and inputs.is_cuda:  # as tensor cores want it; on CPUs it gains nothing
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._options.precision == "bf16"):
            with torch.no_grad():
                target = named_predictions(self._aim.dense, inputs)
            outputs = named_predictions(self._model, inputs)
        return self._aim.loss(outputs, target, labels)

    def _check(self, judge: Validation) -> float:
        """The error of the weights on held-out samples; they are stored if they are the best so far."""
        error = judge(self._model)
        if error < self._progress.error:
            self._progress.error = error
            self._best = _copy_values(self._weights)
        return error

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self._weights[name].copy_(value)

    def _save(self, path: Path) -> None:
        """Write a checkpoint. If the disk is full or read-only, only the checkpoint is missing."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {**self._weights}, "best": self._best}
        for name, value in self._weights.items():
            for kind, moment in self._optimizer.state[value].items():
                parts.setdefault(kind, {})[name] = moment
        state = {f"{part}/{name}": _to_plain(value) for part, values in parts.items() for name, value in values.items()}
        with suppress(OSError, SafetensorError):
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as beside:
                save_file(state, beside, metadata={"progress": json.dumps(asdict(self._progress))})

    def _resume(self, path: Path) -> None:
        """Load the checkpoint in `path`; start anew unless all processes have one, of the same step."""
        progress, state = self._progress, dict[str, Tensor]()
        with (
            suppress(OSError, SafetensorError, TypeError),
            safe_open(path, framework="pt", device=str(self._device)) as file,
        ):
            progress = _Progress(**json.loads(file.metadata()["progress"]))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        if int(sum_over_processes(torch.tensor(progress.step, device=self._device))) != progress.step * processes():
            return
        self._progress = progress
        with torch.no_grad():
            for key, tensor in state.items():
                part, _, name = key.partition("/")
                value = self._weights[name]
                if part == "weights":
                    value.copy_(tensor)
                elif part == "best":
                    self._best[name] = tensor
                else:  # laid out in memory as the weights are, which the optimiser takes for granted
                    laid_out = torch.empty_like(value).copy_(tensor) if tensor.ndim else tensor
                    self._optimizer.state[value][part] = laid_out


def _training_macs(pruned: Pruned, batches: Batches) -> int:
    """Multiply-accumulates of a step for one sample: a forward pass of both models, a backward pass of the slim one.

    A backward pass counts as two forward passes.
    """
    inputs, _ = next(iter(batches))
    example = inputs[:1].to(device_of(pruned.model))
    return count_macs(pruned.whole.dense, example) + 3 * count_macs(pruned.model, example)


def _copy_values(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def _to_plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _hash_samples(batches: Batches) -> tuple[int, str]:
    """Number of samples, and the sha256 of all of them."""
    samples, digest = 0, hashlib.sha256()
    for inputs, labels in batches:
        samples += len(inputs)
        _add(digest, (inputs, labels))
    return samples, digest.hexdigest()


def _hash(model: nn.Module) -> str:
    """sha256 of a model's values, and of which parameters are trained."""
    digest = hashlib.sha256(repr([(name, value.requires_grad) for name, value in model.named_parameters()]).encode())
    _add(digest, model.state_dict().values())
    return digest.hexdigest()


def _add(digest: hashlib._Hash, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
