"""A few hundred steps of training towards the dense model's predictions: for what the closed-form repairs leave over.

Distillation without labels (Hinton et al., https://arxiv.org/abs/1503.02531) in which both models see the same moved
images (Beyer et al., https://arxiv.org/abs/2106.05237): the loss is T^2 KL(dense / T || slim / T) over the classes,
and on request the distance of what the classifiers read (Romero et al., https://arxiv.org/abs/1412.6550).
Normalisation uses its running statistics throughout: the slim model is trained as it will be run, and neither the size
of a batch nor the accumulation of gradients matters to it. Training always goes to its end, since held-out samples are
done worse while the learning rate is high, and better once it falls.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pxcompress import __version__
from pxcompress.cache import cache_dir, whole_file
from pxcompress.errors import DataError, InputError, ResultError
from pxcompress.layout.consumers import consumers
from pxcompress.layout.rows import rows_first
from pxcompress.models.loading import classifier_names
from pxcompress.models.training import adamw, deterministic, flushed_denormals, moved, update, zero_denormals
from pxcompress.passes.parts import InParts
from pxcompress.passes.shuffled import ShuffledBatches, mixed_seed
from pxcompress.processes import from_first, mean_gradients_, processes, rank, summed
from pxcompress.registry import option
from pxcompress.repair import REPAIRS
from pxcompress.state import device_of, evaluating, seeded
from pxcompress.types import Batch, Batches, Phase, Pruned, Repair

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""

CHECKS = 12
"""Most evaluations on held-out samples, spread evenly over the steps."""

SAVE_SECONDS = 60.0
"""Time between two checkpoints, seconds."""


@REPAIRS.register("finetune")
@dataclass(frozen=True)
class FineTune(Repair):
    """AdamW towards the dense model's predictions, without labels; what does best on held-out samples is kept."""

    phase: ClassVar[Phase] = "train"
    costly: ClassVar[bool] = True

    temperature: float = option(4.0, "what both models' logits are divided by", low=0.1, high=100.0, log=True)
    steps: int = option(300, "steps of the optimiser", low=1, high=1_000_000, log=True)
    learning_rate: float = option(1e-3, "at its highest; it falls to 0 along a cosine", low=1e-7, high=1.0, log=True)
    batch_size: int = option(64, "samples of a batch, in every process", low=1, high=65_536, log=True)
    accumulate: int = option(1, "batches of a step, where memory holds no larger ones", low=1, high=1024, log=True)
    labels: bool = option(False, "add the cross-entropy to the labels, and choose by top-1")
    features: float = option(
        0.0, "weight of the squared error, over the variance, of what the classifier reads", low=0.0, high=1000.0
    )
    average: float = option(
        0.0, "decay of a moving average of the weights, to take those; 0: none", low=0.0, high=0.9999
    )
    augment: bool = option(True, "shift, turn and zoom every image a little, anew each time")
    precision: str = option("fp32", "of forward and backward passes; weights stay fp32", choices=("fp32", "bf16"))

    def __call__(self, pruned: Pruned, batches: Batches, held_out: Batches = ()) -> Pruned:
        """Train all weights that require gradients; normalisation statistics stay.

        The best weights on `held_out`, those of the start included, are the result: by the mean KL divergence from the
        dense model or, with labels, by top-1. Without `held_out` it is the last ones. PyTorch's seed decides on
        order and augmentation. A training that is interrupted after more than `SAVE_SECONDS` goes on where it was when
        it is called again, and ends with the same weights. Where memory allows no larger ones, a step takes as many
        samples in batches of the size of `InParts`. Raises `DataError` where there is no sample or an impossible label,
        `ResultError` when training diverges.
        """
        model, dense, seed = pruned.model, pruned.whole.dense, torch.initial_seed()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            return pruned
        samples, data = _survey(batches)
        if not samples:
            raise DataError("no sample to fine-tune on; give data with more images, or leave repair 'finetune' out")
        held, checks = _survey(held_out)
        options = self._within(batches.size) if isinstance(batches, InParts) and batches.size else self
        facts = [__version__, type(self).__name__, asdict(options), seed, _hash(model), _hash(dense), data, checks]
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
            for parameter in trained:
                parameter.requires_grad_(True)
            followed = self._followed(pruned.whole, next(iter(batches))[0][:1]) if self.features else None
            aim = _Aim(dense, options, followed)
            judge = _Judge(aim, held_out, held, device_of(model)) if held else None
            _Training(options, model, aim, seed).run(feed, judge, path)
        return pruned

    def _followed(self, pruned: Pruned, example: Tensor) -> Followed:
        """What `features` weighs: what the classifier reads."""
        return ClassifierInputs(pruned, example)

    def _within(self, size: int) -> FineTune:
        """These options with batches of at most `size` samples, and no fewer samples in a step."""
        if self.batch_size <= size:
            return self
        return replace(self, batch_size=size, accumulate=self.accumulate * -(-self.batch_size // size))


class _Aim:
    """What a slim model is to follow: the dense model and, where asked for, the labels too."""

    def __init__(self, dense: nn.Module, options: FineTune, followed: Followed | None = None) -> None:
        self.dense = dense
        self._options = options
        self._followed = followed

    def loss(self, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Mean over samples of what is minimised. `target` are the dense model's logits, (n, classes)."""
        loss = _divergence(logits, target, self._options.temperature) / len(target)
        if self._followed:
            loss = loss + self._options.features * self._followed.error()
        if not self._options.labels:
            return loss
        low, high, classes = int(labels.min()), int(labels.max()), logits.shape[1]
        if low < 0 or high >= classes:
            raise DataError(
                f"label {low if low < 0 else high} for a model of {classes} classes; expected 0 to {classes - 1}: "
                "correct the labels, or fine-tune without them (labels=false)"
            )
        return loss + F.cross_entropy(logits, labels)

    def error(self, logits: Tensor, target: Tensor, labels: Tensor) -> float:
        """Sum over samples of what weights are chosen by: the divergence or, where labels count, wrong answers."""
        if self._options.labels:
            return float((logits.argmax(dim=1) != labels).sum())
        return float(_divergence(logits, target, 1.0))


class Followed(Protocol):
    """Inner values that a slim model is to have in common with the dense one, each of which has just run."""

    def error(self) -> Tensor:
        """Mean squared difference, over the variance."""
        ...


class ClassifierInputs(Followed):
    """What the classifiers of a slim model and of its dense one read in their last calls."""

    def __init__(self, pruned: Pruned, example: Tensor) -> None:
        names = classifier_names(pruned.dense, example)
        if not names:
            raise InputError("finetune with features=... follows what the classifier reads; this model has none")
        self._rows = next(
            (layer.layout[layer.kept].flatten() for layer in consumers(pruned) if layer.name == names[0]), None
        )
        self._found: dict[str, Tensor] = {}
        for which, model in (("slim", pruned.model), ("dense", pruned.dense)):
            model.get_submodule(names[0]).register_forward_pre_hook(partial(self._keep, which))

    def _keep(self, which: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._found[which] = rows_first(args[0], module).float()

    def error(self) -> Tensor:
        """Mean squared difference of the features that are still there, over their variance."""
        dense = self._found["dense"]
        dense = dense if self._rows is None else dense[:, self._rows.to(dense.device)]
        return F.mse_loss(self._found["slim"], dense) / dense.var().clamp_min(1e-12)


def _divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL(target / T || logits / T), summed over samples; the factor keeps the size of gradients."""
    log_slim, log_dense = (logits / temperature).log_softmax(1), (target / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_slim, log_dense, reduction="sum", log_target=True)


class _Judge:
    """How wrong a model is on held-out samples, on average."""

    def __init__(self, aim: _Aim, held_out: Batches, samples: int, device: torch.device) -> None:
        self._aim = aim
        self._held_out = held_out
        self._samples = samples
        self._device = device
        self._targets = [target for target, _ in self._outputs(aim.dense)]

    def __call__(self, model: nn.Module) -> float:
        """Mean of the aim's error, with the model's weights as they are."""
        outputs = zip(self._outputs(model), self._targets, strict=True)
        wrong = sum(self._aim.error(logits, target, labels) for (logits, labels), target in outputs)
        total, samples = summed(torch.tensor([wrong, self._samples], dtype=torch.float64, device=self._device)).tolist()
        return float(total / samples)

    def _outputs(self, model: nn.Module) -> Iterator[Batch]:
        """Logits and labels, batch by batch."""
        for inputs, labels in self._held_out:
            with torch.no_grad():
                logits = model(inputs.to(self._device))
            yield logits, labels.to(self._device)


@dataclass
class _Progress:
    """How far a training is; `error` is that of the best weights so far."""

    step: int = 0
    error: float = math.inf


class _Training:
    """A slim model on its way: its weights, those that did best, the optimiser, and how far it is."""

    def __init__(self, options: FineTune, model: nn.Module, aim: _Aim, seed: int) -> None:
        self._options = options
        self._model = model
        self._aim = aim
        self._seed = seed
        self._device = device_of(model)
        self._weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._best: dict[str, Tensor] = {}
        self._average = _copied(self._weights) if options.average else {}
        self._optimizer = adamw(model, options.learning_rate, weight_decay=0.0)
        self._progress = _Progress()

    def run(self, feed: ShuffledBatches, judge: _Judge | None, path: Path) -> None:
        """Train to the end, from the checkpoint in `path` on where there is one; what did best is in the model then."""
        self._model.zero_grad()
        self._resume(path)
        options, progress = self._options, self._progress
        if judge and not progress.step:
            self._check(judge)
        batches = feed.after(progress.step * options.accumulate)
        every, saved = -(-options.steps // CHECKS), time.monotonic()
        while progress.step < options.steps:
            self._step(batches)
            if judge and (progress.step % every == 0 or progress.step == options.steps):
                self._check(judge)
            if from_first(time.monotonic() - saved >= SAVE_SECONDS):
                self._save(path)
                saved = time.monotonic()
        self._put(self._best or self._average)
        zero_denormals(self._model)
        with suppress(OSError):  # there is none after a short training, or on a disk that cannot be written
            path.unlink()

    def _step(self, batches: Iterator[Batch]) -> None:
        """One step of the optimiser. What it draws follows from the seed and its number alone: it can be redone."""
        options, progress = self._options, self._progress
        torch.manual_seed(mixed_seed(self._seed, 1 + rank(), progress.step))
        total = 0.0
        for inputs, labels in islice(batches, options.accumulate):
            loss = self._loss(inputs, labels) / options.accumulate
            loss.backward()
            total += float(loss.detach())
        rise = min((progress.step + 1) / (WARM_UP * options.steps), 1.0)
        fall = (1.0 + math.cos(math.pi * progress.step / options.steps)) / 2.0
        for group in self._optimizer.param_groups:
            group["lr"] = options.learning_rate * rise * fall
        mean_gradients_(self._model)
        norm = float(update(self._model, self._optimizer))
        progress.step += 1
        decay = min(options.average, (1 + progress.step) / (10 + progress.step))  # the start soon counts no more
        for name, value in self._average.items():
            value.lerp_(self._weights[name].detach(), 1 - decay)
        if not math.isfinite(total + norm):
            raise ResultError(
                f"fine-tuning diverged at step {progress.step} (loss {total:.3g}, norm of the gradient {norm:.3g}); "
                f"give a learning_rate below {options.learning_rate:g}"
            )

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        inputs, labels = inputs.to(self._device), labels.to(self._device)
        if inputs.ndim == 4 and self._options.augment:
            inputs = moved(inputs)
        if inputs.ndim == 4 and inputs.is_cuda:  # as tensor cores want it; on CPUs it gains nothing
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._options.precision == "bf16"):
            with torch.no_grad():
                target = self._aim.dense(inputs)
            logits = self._model(inputs)
        return self._aim.loss(logits.float(), target.float(), labels)

    def _check(self, judge: _Judge) -> None:
        """Keep the weights, or their average, if they do better than all before."""
        own = _copied(self._weights) if self._average else {}
        self._put(self._average)
        error = judge(self._model)
        if error < self._progress.error:
            self._progress.error = error
            self._best = _copied(self._weights)
        self._put(own)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self._weights[name].copy_(value)

    def _save(self, path: Path) -> None:
        """Keep where the training stands. A full or read-only disk costs only the checkpoint."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {**self._weights}, "best": self._best}
        parts |= {"average": self._average} if self._average else {}
        for name, value in self._weights.items():
            for kind, moment in self._optimizer.state[value].items():
                parts.setdefault(kind, {})[name] = moment
        state = {f"{part}/{name}": _plain(value) for part, named in parts.items() for name, value in named.items()}
        with suppress(OSError, SafetensorError):
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as beside:
                save_file(state, beside, metadata={"progress": json.dumps(asdict(self._progress))})

    def _resume(self, path: Path) -> None:
        """Go on from the checkpoint in `path`; from the start where not every process has one of the same step."""
        progress, state = _Progress(), dict[str, Tensor]()
        with suppress(OSError, SafetensorError), safe_open(path, framework="pt", device=str(self._device)) as file:
            progress = _Progress(**json.loads(file.metadata()["progress"]))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        if int(summed(torch.tensor(progress.step, device=self._device))) != progress.step * processes():
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
                elif part == "average":
                    self._average[name] = tensor
                else:  # laid out in memory as the weights are, which the optimiser takes for granted
                    laid_out = torch.empty_like(value).copy_(tensor) if tensor.ndim else tensor
                    self._optimizer.state[value][part] = laid_out


def _copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _survey(batches: Batches) -> tuple[int, str]:
    """How many samples there are, and the sha256 of all of them."""
    samples, digest = 0, hashlib.sha256()
    for inputs, labels in batches:
        samples += len(inputs)
        _add(digest, (inputs, labels))
    return samples, digest.hexdigest()


def _hash(model: nn.Module) -> str:
    """sha256 of a model's values, and of which of them are trained."""
    digest = hashlib.sha256(repr([(name, value.requires_grad) for name, value in model.named_parameters()]).encode())
    _add(digest, model.state_dict().values())
    return digest.hexdigest()


def _add(digest: hashlib._Hash, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
