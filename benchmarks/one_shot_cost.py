"""What scoring, planning, folding and refitting cost: time in forward passes over the data used, and peak memory.

Each is measured in a process of its own, because a process's peak memory only ever grows.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import models
import torch

from pxcompress.clock import Clock
from pxcompress.recipe import Recipe
from pxcompress.stages import shrink
from pxcompress.state import observed, seeded
from pxcompress.subject import Subject

REPAIR = ("fold", "least-squares", "batchnorm")


def cost_row(label: str) -> dict[str, Any]:
    """Forward passes and memory of the closed-form way at half the MACs, on as many threads as PyTorch has here."""
    weights, start, passed, forward = _alone(_inference, label)
    _, _, peak, seconds = _alone(_compression, label)
    return {
        "model": label,
        "threads": torch.get_num_threads(),
        "forward_seconds": forward,
        "seconds": seconds,
        "forward_passes": seconds / forward,
        "memory_ratio": (peak - start) / (passed - start + weights),
        "peak_bytes": peak - start,
    }


def _alone(work: Callable[[str, int], tuple[float, ...]], label: str) -> tuple[float, ...]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (label, torch.get_num_threads()))


def _inference(label: str, threads: int) -> tuple[float, ...]:
    subject, weights, start = _loaded(label, threads)
    begin = time.perf_counter()
    with observed(subject.loaded.model) as model, torch.no_grad():
        for part in (subject.splits.score, subject.splits.repair):
            for inputs, _ in part:
                model(inputs)
    return weights, start, _peak(), time.perf_counter() - begin


def _compression(label: str, threads: int) -> tuple[float, ...]:
    subject, weights, start = _loaded(label, threads)
    recipe = Recipe(models.GLYPH_MODELS[label], 0.5, data="glyphs", budget="macs", round_to=4, repair=REPAIR)
    parts = {"score": subject.splits.score, "repair": subject.splits.repair}
    begin = time.perf_counter()
    with seeded(0):
        shrink(subject.loaded.model, subject.splits.example, parts, recipe, Clock(lambda message: None))
    return weights, start, _peak(), time.perf_counter() - begin


def _loaded(label: str, threads: int) -> tuple[Subject, float, float]:
    """The subject, bytes of its weights, and peak memory so far; one image has run."""
    torch.set_num_threads(threads)
    subject = models.subject_of(label)
    with observed(subject.loaded.model) as model, torch.no_grad():
        model(subject.splits.example)
    weights = sum(value.numel() * value.element_size() for value in subject.loaded.model.parameters())
    return subject, float(weights), _peak()


def _peak() -> float:
    """Bytes; Linux counts kilobytes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
