"""What scoring, planning, folding and refitting cost: time in forward passes over the data used, and peak memory.

Each is measured in a process of its own. Memory is what the process needs at its highest beyond what it holds when the
model and the data are loaded; Linux lets that mark be set back.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import timm
import torch
from torch import Tensor, nn

from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.stages import prune_and_repair
from pxcompress.state import evaluating, seeded
from pxcompress.types import Batches

REPAIR = ("fold", "least-squares", "batchnorm")
LARGE = ("resnet50", "vit_small_patch16_224")
"""Models of timm at 224 pixels, random weights, one batch of 64 images of noise to score and to repair with."""

Case = tuple[nn.Module, Tensor, Mapping[str, Batches]]


def cost_row(label: str) -> dict[str, Any]:
    """Forward passes and memory of the closed-form way at half the MACs, on as many threads as PyTorch has here."""
    weights, inference, forward = _alone(_inference, label)
    _, peak, seconds = _alone(_compression, label)
    return {
        "model": label,
        "threads": torch.get_num_threads(),
        "forward_seconds": forward,
        "seconds": seconds,
        "forward_passes": seconds / forward,
        "inference_bytes": inference,
        "weight_bytes": weights,
        "peak_bytes": peak,
        "memory_ratio": peak / (inference + weights),
    }


def _alone(work: Callable[[str, int], tuple[float, ...]], label: str) -> tuple[float, ...]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (label, torch.get_num_threads()))


def _inference(label: str, threads: int) -> tuple[float, ...]:
    model, example, parts = _case(label, threads)

    def work() -> None:
        with evaluating(model) as watched, torch.no_grad():
            for part in parts.values():
                for inputs, _ in part:
                    watched(inputs)

    return _measured(model, example, work)


def _compression(label: str, threads: int) -> tuple[float, ...]:
    model, example, parts = _case(label, threads)
    recipe = Recipe("model", 0.5, budget="macs", round_to=4, repair=REPAIR)

    def work() -> None:
        with seeded(0):
            prune_and_repair(model, example, Run(recipe, parts))

    return _measured(model, example, work)


def _case(label: str, threads: int) -> Case:
    """A model, an input, and its data by role."""
    torch.set_num_threads(threads)
    if label in LARGE:
        torch.manual_seed(0)
        model = timm.create_model(label, num_classes=100).eval()
        batch = [(torch.randn(64, 3, 224, 224), torch.arange(64))]
        return model, batch[0][0][:1], {"score": batch, "repair": batch}
    subject = models.subject_of(label)
    splits = subject.splits
    return subject.loaded.model, splits.example, {"score": splits.score, "repair": splits.repair}


def _measured(model: nn.Module, example: Tensor, work: Callable[[], None]) -> tuple[float, float, float]:
    """Bytes of the weights, bytes that `work` needs beyond what is there before it, and its seconds."""
    weights = sum(value.numel() * value.element_size() for value in model.parameters())
    with evaluating(model) as watched, torch.no_grad():  # whatever the first call sets up for good
        watched(example)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = _bytes("VmRSS"), time.perf_counter()
    work()
    return float(weights), _bytes("VmHWM") - before, time.perf_counter() - begin


def _bytes(what: str) -> float:
    """A line of the process's memory, which Linux gives in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(f"{what}:")).split()[1])
