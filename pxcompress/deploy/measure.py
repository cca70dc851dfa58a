"""What a model costs and how often it is right, measured on the exported file; and the verdict in plain words."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pxcompress.deploy import hardware, runtime, stopwatch
from pxcompress.deploy.export import OPSET, onnx_files
from pxcompress.deploy.intervals import Seconds, drop, noise, speedup
from pxcompress.deploy.operators import operator_shares
from pxcompress.deploy.runtime import Array, Session
from pxcompress.errors import DataError, InputError, ModelError, ResultError
from pxcompress.passes.ranks import summed
from pxcompress.proof import Latency, Measurement, OperatorTime, Placement, Ratios, Speedup
from pxcompress.state import device_of, observed
from pxcompress.types import Batches

_PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "zennit", "onnx", "onnxscript", "numpy")


@dataclass(frozen=True)
class Candidate:
    """An exported model and what was counted on its PyTorch form."""

    path: Path
    params: int
    macs: int


@dataclass(frozen=True)
class Answers:
    """How a file decides on samples. `agreeing` and `max_abs`, the largest difference of a logit, are to a reference.

    `broken` counts samples with logits that are not finite; `both` those that the
    reference is right on as well; `seen` and `hits` count samples and right ones by class.
    """

    samples: int = 0
    right: int = 0
    agreeing: int = 0
    broken: int = 0
    max_abs: float = 0.0
    both: int = 0
    seen: tuple[int, ...] = ()
    hits: tuple[int, ...] = ()

    @property
    def top1(self) -> float:
        """Share in [0, 1]."""
        return self.right / self.samples


@dataclass(frozen=True, eq=False)
class Tried:
    """One file, measured beside others: seconds of every call with `batch_size` samples, and its answers."""

    session: Session
    seconds: Seconds
    answers: Answers
    batch_size: int


@dataclass(frozen=True)
class Comparison:
    """Dense and pruned, measured in turns on the same provider; `threads` are CPU threads, `noise` the larger one.

    `both_right` counts samples that both are right on; `by_class` has samples, those that dense is right on and those
    that pruned is; `operators` are shares of time.
    """

    dense: Measurement
    pruned: Measurement
    placement: Placement
    speedup: Speedup
    threads: int
    noise: float = 0.0
    both_right: int | None = None
    by_class: tuple[tuple[int, int, int], ...] = ()
    operators: tuple[OperatorTime, ...] = ()


def answers(sessions: Mapping[str, Session], reference: str, batches: Batches) -> dict[str, Answers]:
    """How every session decides on `batches`, and how far it is from the one named `reference`."""
    found = dict.fromkeys(sessions, Answers())
    for inputs, labels in batches:
        logits = {name: session.predict(inputs) for name, session in sessions.items()}
        for name, values in logits.items():
            found[name] = _with(found[name], values, logits[reference], labels.cpu().numpy())
    if not found[reference].samples:
        raise DataError("no samples to measure accuracy on; expected at least one")
    return found


def _with(so_far: Answers, logits: Array, reference: Array, labels: Array) -> Answers:
    """`so_far` and one batch: logits (n, classes), labels (n,)."""
    decided = logits.argmax(1)
    with np.errstate(invalid="ignore"):  # infinity less infinity; `broken` counts them
        difference = float(np.abs(logits - reference).max())
    return Answers(
        samples=so_far.samples + len(labels),
        right=so_far.right + int((decided == labels).sum()),
        agreeing=so_far.agreeing + int((decided == reference.argmax(1)).sum()),
        broken=so_far.broken + int((~np.isfinite(logits).all(1)).sum()),
        max_abs=max(so_far.max_abs, difference),
        both=so_far.both + int(((decided == labels) & (reference.argmax(1) == labels)).sum()),
        seen=_added(so_far.seen, labels, logits.shape[1]),
        hits=_added(so_far.hits, labels[decided == labels], logits.shape[1]),
    )


def _added(so_far: tuple[int, ...], labels: npt.NDArray[np.int64], classes: int) -> tuple[int, ...]:
    """Counts by class, (classes,), and those of `labels` (n,)."""
    counts = np.bincount(labels, minlength=classes)[:classes]
    return tuple((counts + np.array(so_far or [0] * classes)).tolist())


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
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 99]) * 1e3)
    spread = tuple(np.round(np.percentile(seconds, range(0, 101, 5)) * 1e3, 6).tolist())
    return Latency(float(seconds.mean() * 1e3), p50, p90, p99, len(seconds), spread)


def try_files(
    paths: Sequence[Path],
    batches: Batches,
    *,
    timed: Sequence[Path] = (),
    batch_size: int = 1,
    provider: str = "auto",
    threads: int = 0,
) -> tuple[Tried, ...]:
    """Answers on `batches` of every file of `paths`, with the second as the reference, and the latency of all files.

    They take turns. The files `timed` come last, without answers. Raises `ResultError` when one of them runs on another
    provider than the others.
    """
    check_batch_size(batch_size)
    sessions = {path.name: runtime.session(path, provider, threads=threads) for path in (*paths, *timed)}
    used = {name: session.placement.got for name, session in sessions.items()}
    if len(set(used.values())) > 1:
        told = " and ".join(f"{name} on {where}" for name, where in used.items())
        raise ResultError(f"{told}: their speeds cannot be compared; use provider cpu")
    example = next((inputs for inputs, _ in batches), None)
    if example is None:
        raise DataError("no samples to measure on; expected at least one")
    found = answers({path.name: sessions[path.name] for path in paths}, paths[1].name, batches)
    limit = stopwatch.SECONDS * len(sessions)
    seconds = runtime.time_runs(sessions, example.cpu().numpy(), batch_size=batch_size, max_seconds=limit)
    return tuple(
        Tried(session, seconds[name], found.get(name, Answers()), batch_size) for name, session in sessions.items()
    )


def compare(dense: Candidate, pruned: Candidate, tried: Sequence[Tried]) -> Comparison:
    """Dense and pruned as the first two of the files that were `tried`."""
    first, second = tried[:2]
    return Comparison(
        dense=_measurement(dense, first),
        pruned=_measurement(pruned, second),
        placement=second.session.placement,
        speedup=speedup(first.seconds, second.seconds),
        threads=second.session.threads,
        noise=max(noise(first.seconds), noise(second.seconds)),
        both_right=first.answers.both,
        by_class=tuple(zip(first.answers.seen, first.answers.hits, second.answers.hits, strict=True)),
        operators=_operators(first, second),
    )


def _operators(first: Tried, second: Tried) -> tuple[OperatorTime, ...]:
    """Shares of time by type of operator, largest of the first model first."""
    shape = tuple(size or first.batch_size for size in first.session.input.shape)
    inputs = np.zeros(shape, first.session.input.dtype)
    dense, pruned = (operator_shares(each.session, inputs) for each in (first, second))
    return tuple(OperatorTime(name, dense.get(name, 0.0), pruned.get(name, 0.0)) for name in {**dense, **pruned})


def _measurement(candidate: Candidate, tried: Tried) -> Measurement:
    return Measurement(
        top1=tried.answers.top1,
        samples=tried.answers.samples,
        params=candidate.params,
        macs=candidate.macs,
        onnx_bytes=file_bytes(candidate.path),
        latency_ms=latency(tried.seconds),
        throughput=throughput(tried),
        batch_size=tried.batch_size,
        provider=tried.session.placement.got,
        precision=tried.session.precision,
    )


def throughput(tried: Tried) -> float:
    """Samples a second."""
    return float(tried.batch_size / tried.seconds.mean())


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
    lost = drop(dense, pruned, comparison.both_right)
    change = f"95 % interval of the change {-100 * lost.high:+.1f} to {-100 * lost.low:+.1f} points"
    accuracies = f"{dense.top1:.1%} -> {pruned.top1:.1%} ({pruned.samples} samples, {change})"
    shown = "top-1" if lost.low > 0 or lost.high < 0 else "no top-1 difference shown:"
    return f"{', '.join(parts)}, {shown} {accuracies}"


def _speed(comparison: Comparison) -> str:
    """The speed-up in words, with its conditions; "faster" only where the whole interval is."""
    change, batch = comparison.speedup, comparison.pruned.batch_size
    where = f"p50, batch {batch}, {_hardware(comparison)}, 95 % interval {change.interval}"
    if change.low > 1:
        return f"{change.ratio:.3g}x faster ({where})"
    if change.high < 1:
        return f"NOT FASTER at batch {batch}: {change.ratio:.2f}x ({where})"
    return f"no difference in speed shown at batch {batch}: {change.ratio:.2f}x ({where})"


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
        "onnx_opset": OPSET,
        "device_name": gpu or hardware.cpu_name(),
        "cpu_name": hardware.cpu_name(),
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
