"""Trains a dense baseline for an embedded data set on the spot, and stores it in the cache folder.

From scratch on small images: AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101) under one learning-rate
cycle (Smith and Topin, https://arxiv.org/abs/1708.07120), small random shifts, turns and zooms where they leave the
targets as they are; no flips, since characters are not their mirror images. Not a general trainer: it lets a model
without weights be tried.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sized
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pxcompress.cache import cache_dir, whole_file
from pxcompress.data import Source, training_batches
from pxcompress.data.samples import Samples
from pxcompress.demo.losses import ClassLoss, Loss, loss_for
from pxcompress.deploy.predictions import torch_quality
from pxcompress.errors import DataError, ModelError, short
from pxcompress.models.adapter import has_whole_numbers, named_outputs
from pxcompress.models.checkpoint import load_state
from pxcompress.models.loading import Architecture, LoadedModel
from pxcompress.models.training import adamw, deterministic, flushed_denormals, move_images, update, zero_denormals
from pxcompress.notes import Note
from pxcompress.registry import option
from pxcompress.state import device_of, evaluating, seeded
from pxcompress.tasks.classification import Classification
from pxcompress.tasks.task import Task
from pxcompress.types import Batches, Preprocessing, Splits

TRAINER_VERSION = 1
"""Part of every cache key: raise it when the training changes, so that older baselines are not used any more."""

WARM_UP = 0.2  # share of the steps
SATURATED_METRIC = 0.999
"""Training stops early when the metric on select is this high twice in a row, in the second half of the schedule."""


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a training; there are at least `epochs`, and more until `steps` steps are reached."""

    steps: int
    epochs: int
    learning_rate: float
    weight_decay: float = 0.05


SCHEDULES = {
    "plain": Schedule(steps=60, epochs=4, learning_rate=2e-4),
    "depthwise": Schedule(steps=400, epochs=4, learning_rate=6e-3),
    "batch norm": Schedule(steps=180, epochs=4, learning_rate=2e-3),
    "layer norm": Schedule(steps=600, epochs=6, learning_rate=5e-4),
    "both norms": Schedule(steps=180, epochs=8, learning_rate=2e-3),
    "numbers": Schedule(steps=600, epochs=4, learning_rate=5e-3, weight_decay=1e-3),
    "texts": Schedule(steps=500, epochs=3, learning_rate=1e-3),
}
"""Schedule by kind of model; "numbers" is for inputs that are no images, "texts" for tokens.

Tuned on `digits`: ResNet, MobileNetV2 and VGG-11 at 32 pixels, small ViT at 64; on `glyphs`: a ViT behind convolutions
with BatchNorm; on `spiral` and `dna`: the nets of `pxcompress.demo.nets`.
"""

WIDE_INPUTS = 20_000
"""From this number of inputs on, a layer (such as the first dense one of a VGG) needs smaller steps of Adam."""


@dataclass(frozen=True)
class BaselineInfo:
    """Quality of a baseline on select, by its task's metric, and the cost of training; `cached` if it was only read."""

    quality: float
    epochs: int
    seconds: float
    cached: bool = False


@dataclass(frozen=True, eq=False)
class Problem:
    """What a baseline is trained on: batches of `training`, by default for classes, and of `select` to judge it.

    `training` should come in a new order every epoch.
    """

    training: Batches
    select: Batches
    task: Task = field(default_factory=Classification)
    loss: Loss = field(default_factory=ClassLoss)


class DataWithBaseline:
    """A base class of embedded data sets whose baselines are trained when they are first needed."""

    def train_baseline(
        self, loaded: LoadedModel, source: Source, splits: Splits, task: Task, seed: int, note: Note
    ) -> LoadedModel:
        """Train `loaded`, or read its weights from the cache, in place; returns it."""
        training = training_batches(source, loaded.preprocessing, batch_size=64, seed=seed)
        with evaluating(loaded.model), torch.no_grad():
            outputs = named_outputs(loaded.model, splits.example.to(device_of(loaded.model)), task.output_name)
        with seeded(seed):
            loss = loss_for(task, source, outputs).to(device_of(loaded.model))
        name = source.name if isinstance(loss, ClassLoss) else f"{source.name} by {type(loss).__name__}"
        key = baseline_key(loaded.architecture, name, loaded.preprocessing, seed)
        problem = Problem(training, splits.select, task, loss)
        train_baseline(loaded.model, problem, key=key, seed=seed, note=note)
        return replace(loaded, weights="trained-here")


@dataclass(frozen=True)
class GeneratedData(DataWithBaseline):
    """A base class of data sets whose samples are generated; its fields say how many samples each part has."""

    train: int = option(12000, "samples to train, score and repair on", low=1)
    select: int = option(1000, "samples to select with", low=1)
    held_out: int = option(4000, "samples to certify and test on", low=1)

    def pools(self, pool: Callable[[str, int], Samples]) -> tuple[Samples, Samples, Samples]:
        """The train, select and held-out samples, each made by `pool`, called with the part's name and number of
        samples.
        """
        return pool("train", self.train), pool("select", self.select), pool("held-out", self.held_out)


def baseline_key(architecture: Architecture, data: str, preprocessing: Preprocessing, seed: int) -> str:
    """The file name of a baseline in the cache: hex digits that change whenever the trained weights would."""
    facts = [architecture.to_json(), data, asdict(preprocessing), seed, TRAINER_VERSION]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:24]


def train_baseline(model: nn.Module, problem: Problem, *, key: str, seed: int = 0, note: Note) -> BaselineInfo:
    """Give `model` trained weights, in place: those cached under `key`, or new ones, which are then cached.

    The model is left in eval mode. Same initial weights, batches, seed and machine: same weights. `note` is told about
    every epoch. Raises `ModelError` when training diverges.
    """
    path = cache_dir() / "baselines" / f"{key}.safetensors"
    cached_info = _read(model, path, note)
    if cached_info is not None:
        value = _format_quality(problem.task, cached_info.quality)
        note(f"baseline read from {path}: select {value} after {cached_info.epochs} epochs")
        return cached_info
    with seeded(seed), flushed_denormals(), deterministic():
        info = _train(model, problem, note)
    _write(model, path, info, note)
    return info


def _train(model: nn.Module, problem: Problem, note: Note) -> BaselineInfo:
    start, training, metric = time.perf_counter(), problem.training, problem.task.metric
    steps = len(training) if isinstance(training, Sized) else sum(1 for _ in training)
    if not steps:
        raise DataError("no image to train a baseline on; give data with more images, or weights with --checkpoint")
    images = next(iter(problem.select))[0].ndim == 4
    other = SCHEDULES["texts" if has_whole_numbers(model) else "numbers"]
    schedule = _choose_schedule(model) if images else other
    epochs = math.ceil(problem.loss.duration * max(schedule.epochs, math.ceil(schedule.steps / steps)))
    if images:
        model.to(memory_format=torch.channels_last)
    learner = nn.ModuleList([model, problem.loss])
    optimizer = adamw(learner, schedule.learning_rate, schedule.weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.learning_rate, total_steps=max(epochs * steps, 2), pct_start=WARM_UP, cycle_momentum=False
    )
    history: list[float] = []
    for epoch in range(1, epochs + 1):
        loss = _train_epoch(learner, problem, optimizer, cycle)
        if not math.isfinite(loss):
            raise ModelError(
                f"training a baseline diverged in epoch {epoch} (loss {loss}); give weights with --checkpoint"
            )
        history.append(torch_quality(model.eval(), problem.select, problem.task))
        quality_text = _format_quality(problem.task, history[-1])
        note(f"baseline: epoch {epoch} of at most {epochs}, loss {loss:.3f}, select {quality_text}")
        is_saturated = metric.unit == "share" and len(history) > 1 and min(history[-2:]) >= SATURATED_METRIC
        if 2 * epoch >= epochs and is_saturated:
            break
    zero_denormals(model)
    model.to(memory_format=torch.contiguous_format)
    return BaselineInfo(history[-1], len(history), time.perf_counter() - start)


def _format_quality(task: Task, value: float) -> str:
    return f"{task.metric.name} {task.metric.format(value)}"


def _choose_schedule(model: nn.Module) -> Schedule:
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, nn.Linear | nn.Conv2d)]
    if any(layer.weight[0].numel() > WIDE_INPUTS for layer in layers):
        return SCHEDULES["plain"]
    over_batch = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)
    over_layer = any(isinstance(module, nn.LayerNorm | nn.GroupNorm) for module in modules)
    if over_batch and over_layer:
        return SCHEDULES["both norms"]
    if over_layer:
        return SCHEDULES["layer norm"]
    depthwise = any(isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1 for layer in layers)
    return SCHEDULES["plain" if not over_batch else "depthwise" if depthwise else "batch norm"]


def _train_epoch(
    learner: nn.Module,
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    cycle: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Train for one pass over the batches and return the mean loss; `learner` contains the model and its loss."""
    model, compute_loss = learner.children()
    device = device_of(model)
    losses: list[Tensor] = []
    learner.train()
    for inputs, targets in problem.training:
        outputs = named_outputs(
            model, _prepare_inputs(inputs, device, moves=problem.loss.moves), problem.task.output_name
        )
        loss = compute_loss(outputs, targets.to(device))
        loss.backward()
        update(learner, optimizer)
        cycle.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def _prepare_inputs(inputs: Tensor, device: torch.device, *, moves: bool = False) -> Tensor:
    """Inputs on the device, images in channels-last layout; with `moves`, images are shifted a little at random."""
    if inputs.ndim != 4:
        return inputs.to(device)
    return (move_images(inputs) if moves else inputs).to(device, memory_format=torch.channels_last)


def _read(model: nn.Module, path: Path, note: Note) -> BaselineInfo | None:
    """Load a cached baseline from `path` into the model; returns None if there is none that fits."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["baseline"])
        quality = facts["quality"] if "quality" in facts else facts["top1"]  # as it was called before there were tasks
        info = BaselineInfo(quality, facts["epochs"], facts["seconds"], cached=True)
        load_state(model, load_file(path), (), f"baseline {str(path)!r}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, ModelError) as error:
        note(f"baseline {path} cannot be used ({short(error)}); training it again")
        return None
    model.eval()
    return info


def _write(model: nn.Module, path: Path, info: BaselineInfo, note: Note) -> None:
    """Cache the model's weights. If the disk is full or read-only, only the cache is missing."""
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    try:
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as beside:
            save_file(state, beside, metadata={"baseline": json.dumps(asdict(info))})
    except (OSError, SafetensorError) as error:
        note(f"baseline is not kept: {short(error)}")
