"""What a model costs and how often it is right, measured on the exported file; and the verdict in plain words."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pxcompress.deploy import runtime, stopwatch
from pxcompress.deploy.export import onnx_files
from pxcompress.deploy.runtime import Session
from pxcompress.errors import DataError, InputError, ModelError, ResultError
from pxcompress.proof import Latency, Measurement, Placement, Ratios, Speedup
from pxcompress.ranks import summed
from pxcompress.state import device_of, observed
from pxcompress.types import Batches

Seconds = npt.NDArray[np.float64]

_PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "zennit", "onnx", "onnxscript", "numpy")
_RESAMPLES = 2000


@dataclass(frozen=True)
class Candidate:
    """An exported model and what was counted on its PyTorch form."""

    path: Path
    params: int
    macs: int


@dataclass(frozen=True)
class Comparison:
    """Dense and pruned, measured in turns on the same provider; `threads` are CPU threads."""

    dense: Measurement
    pruned: Measurement
    placement: Placement
    speedup: Speedup
    threads: int


def accuracy(session: Session, batches: Batches) -> tuple[float, int]:
    """Top-1 accuracy through ONNX Runtime, a share in [0, 1], and the number of samples."""
    right, total = _counts((session.predict(inputs).argmax(1), labels.cpu().numpy()) for inputs, labels in batches)
    return _share(right, total), total


def torch_accuracy(model: nn.Module, batches: Batches) -> float:
    """Top-1 accuracy of a PyTorch model in eval mode on its device, a share in [0, 1]; `model` is left as it was.

    In several processes each has its own batches; the share is that of all samples. Raises `ModelError` for outputs
    that are NaN or infinite.
    """
    device = device_of(model)
    with observed(model), torch.no_grad():
        pairs = ((_decided(model(inputs.to(device))), labels.cpu().numpy()) for inputs, labels in batches)
        right, total = summed(torch.tensor(_counts(pairs), dtype=torch.float64, device=device)).tolist()
    return _share(right, total)


def _decided(logits: Tensor) -> npt.NDArray[np.int64]:
    """Classes (n,) with the largest of `logits` (n, classes)."""
    if broken := int((~logits.isfinite().all(1)).sum()):
        raise ModelError(
            f"the model returns NaN or infinity for {broken} of {len(logits)} samples; check its weights and its inputs"
        )
    return logits.argmax(1).cpu().numpy()


def _counts(pairs: Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> tuple[int, int]:
    """How many of (predicted, labels) agree, and how many there are."""
    right = total = 0
    for predicted, labels in pairs:
        right += int((predicted == labels).sum())
        total += len(labels)
    return right, total


def _share(right: float, total: float) -> float:
    if not total:
        raise DataError("no samples to measure accuracy on; expected at least one")
    return right / total


def latency(seconds: Seconds) -> Latency:
    """Mean and percentiles of seconds per call, in milliseconds."""
    p50, p90, p99 = np.percentile(seconds, [50, 90, 99]) * 1e3
    return Latency(mean=float(seconds.mean() * 1e3), p50=float(p50), p90=float(p90), p99=float(p99), runs=len(seconds))


def speedup(dense: Seconds, pruned: Seconds, *, seed: int = 0) -> Speedup:
    """Ratio of the medians and its 95 % percentile bootstrap interval.

    Run i of both belongs together (see `stopwatch.time_interleaved`). Runs next to each other are alike, so whole
    blocks of them are drawn, the same ones from both: what slows the machine for a while cancels.
    """
    if len(dense) != len(pruned):
        raise ValueError(f"{len(dense)} dense and {len(pruned)} pruned runs; expected as many of both")
    runs = len(dense)
    size = min(stopwatch.BLOCK, max(runs // 5, 1))
    blocks = runs // size
    drawn = np.random.default_rng(seed).integers(0, blocks, (_RESAMPLES, blocks))
    index = (drawn[:, :, None] * size + np.arange(size)).reshape(_RESAMPLES, -1)
    low, high = np.percentile(np.median(dense[index], axis=1) / np.median(pruned[index], axis=1), [2.5, 97.5])
    ratio = float(np.median(dense) / np.median(pruned))
    return Speedup(ratio, min(float(low), ratio), max(float(high), ratio))


def compare(
    dense: Candidate,
    pruned: Candidate,
    batches: Batches,
    *,
    batch_size: int = 1,
    provider: str = "auto",
    threads: int = 0,
) -> Comparison:
    """Accuracy on `batches` and latency of both files through ONNX Runtime, timed in turns on the same input.

    Raises `ResultError` when one of them runs on another provider than the other.
    """
    check_batch_size(batch_size)
    candidates = {"dense": dense, "pruned": pruned}
    sessions = {
        name: runtime.session(candidate.path, provider, threads=threads) for name, candidate in candidates.items()
    }
    placements = [session.placement for session in sessions.values()]
    if placements[0].got != placements[1].got:
        raise ResultError(
            f"dense runs on {placements[0].got} and pruned on {placements[1].got}, so their speeds cannot be compared; "
            "use provider cpu"
        )
    example = next((inputs for inputs, _ in batches), None)
    if example is None:
        raise DataError("no samples to measure on; expected at least one")
    seconds = runtime.time_runs(sessions, example.cpu().numpy(), batch_size=batch_size)
    measured = {
        name: _measurement(candidates[name], session, batches, seconds[name], batch_size)
        for name, session in sessions.items()
    }
    return Comparison(
        dense=measured["dense"],
        pruned=measured["pruned"],
        placement=sessions["pruned"].placement,
        speedup=speedup(seconds["dense"], seconds["pruned"]),
        threads=sessions["pruned"].threads,
    )


def _measurement(
    candidate: Candidate, session: Session, batches: Batches, seconds: Seconds, batch_size: int
) -> Measurement:
    top1, samples = accuracy(session, batches)
    return Measurement(
        top1=top1,
        samples=samples,
        params=candidate.params,
        macs=candidate.macs,
        onnx_bytes=file_bytes(candidate.path),
        latency_ms=latency(seconds),
        throughput=float(batch_size / seconds.mean()),
        batch_size=batch_size,
        provider=session.placement.got,
        precision=session.precision,
    )


def file_bytes(path: Path) -> int:
    """Bytes of an ONNX file and the weights beside it."""
    return sum(file.stat().st_size for file in onnx_files(path))


def ratios(dense: Measurement, pruned: Measurement) -> Ratios:
    """Pruned / dense; dense / pruned for the speed-up; dense - pruned for the accuracy."""
    return Ratios(
        params=pruned.params / dense.params,
        macs=pruned.macs / dense.macs,
        onnx_bytes=pruned.onnx_bytes / dense.onnx_bytes,
        speedup_p50=dense.latency_ms.p50 / pruned.latency_ms.p50,
        top1_drop=dense.top1 - pruned.top1,
    )


def verdict(comparison: Comparison) -> str:
    """What was gained and lost, in one line; says so when nothing was gained."""
    dense, pruned = comparison.dense, comparison.pruned
    macs = _factor(dense.macs, pruned.macs, "fewer MACs", "more MACs", "same MACs")
    size = _factor(dense.onnx_bytes, pruned.onnx_bytes, "smaller file", "larger file", "same file size")
    speed = _speed(comparison)
    parts = [macs, speed, size] if comparison.speedup.low > 1 else [speed, macs, size]
    accuracies = f"top-1 {dense.top1:.1%} -> {pruned.top1:.1%} ({pruned.samples} samples)"
    return f"{', '.join(parts)}, {accuracies}"


def _speed(comparison: Comparison) -> str:
    """The speed-up in words, with its conditions; "faster" only where the whole interval is."""
    change, batch = comparison.speedup, comparison.pruned.batch_size
    interval = f"95 % interval {change.low:.2f} to {change.high:.2f}"
    where = f"p50, batch {batch}, {_hardware(comparison)}, {interval}"
    if change.low > 1:
        return f"{change.ratio:.3g}x faster ({where})"
    if change.high < 1:
        return f"NOT FASTER at batch {batch}: {change.ratio:.2f}x ({where})"
    return f"no difference in speed at batch {batch}: {change.ratio:.2f}x ({where})"


def _hardware(comparison: Comparison) -> str:
    name = comparison.placement.got.removesuffix("ExecutionProvider")
    plural = "" if comparison.threads == 1 else "s"
    return f"{name} {comparison.threads} thread{plural}" if name == "CPU" else f"{name} {comparison.pruned.precision}"


def _factor(dense: int, pruned: int, less: str, more: str, same: str) -> str:
    """ "2.9x fewer MACs"."""
    if dense == pruned:
        return same
    return f"{dense / max(pruned, 1):.3g}x {less}" if dense > pruned else f"{pruned / max(dense, 1):.3g}x {more}"


def environment() -> dict[str, object]:
    """Versions, hardware and thread count that the figures of this process depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name.replace("-", "_"): importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        **versions,
        "onnxruntime": runtime.VERSION,
        "device_name": gpu or runtime.cpu_name(),
        "cpu_name": runtime.cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda if gpu else None,
        "nvidia_tf32_override": os.environ.get("NVIDIA_TF32_OVERRIDE"),
    }


def check_batch_size(batch_size: int) -> None:
    """Raise `InputError` for a batch of no samples."""
    if batch_size < 1:
        raise InputError(f"batch size is {batch_size}; expected 1 or more")
