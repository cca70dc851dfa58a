"""Dense and pruned beside each other, and the verdict in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pxcompress.deploy.intervals import disagree, mean_speedup, noise, speedup
from pxcompress.deploy.measure import FileTiming, file_bytes, latency, throughput
from pxcompress.deploy.predictions import class_changes
from pxcompress.deploy.profile import operator_shares
from pxcompress.proof import ClassChange, Estimate, Measurement, Metric, OperatorTime, Placement, Ratios, Speedup


@dataclass(frozen=True)
class Candidate:
    """An exported model and what was counted on its PyTorch form."""

    path: Path
    params: int
    macs: int


@dataclass(frozen=True)
class Comparison:
    """Dense and pruned, measured in turns on the same provider; `threads` are CPU threads, `noise` the larger one.

    `change` is that of the quality, by the `metric`; `classes` says what became of every class that the samples have;
    `operators` are shares of time.
    """

    dense: Measurement
    pruned: Measurement
    placement: Placement
    speedup: Speedup
    metric: Metric
    change: Estimate
    threads: int
    classes: tuple[ClassChange, ...]
    noise: float = 0.0
    operators: tuple[OperatorTime, ...] = ()

    @property
    def disagrees(self) -> bool:
        """Whether p50 and the mean say the opposite of each other."""
        return disagree(self.speedup, self.dense.latency_ms, self.pruned.latency_ms)

    @property
    def mean_speedup(self) -> float:
        """How many times faster the pruned model is on average."""
        return mean_speedup(self.dense.latency_ms, self.pruned.latency_ms)


def compare(dense: Candidate, pruned: Candidate, tried: Sequence[FileTiming], classes: Sequence[str]) -> Comparison:
    """Dense and pruned as the first two of the files that were `tried`; `classes` are the names of all."""
    first, second = tried[:2]
    return Comparison(
        dense=_measurement(dense, first),
        pruned=_measurement(pruned, second),
        placement=second.session.placement,
        speedup=speedup(first.seconds, second.seconds),
        metric=second.predictions.task.metric,
        change=second.predictions.change(first.predictions),
        threads=second.session.threads,
        noise=max(noise(first.seconds), noise(second.seconds)),
        classes=class_changes(first.predictions, second.predictions, classes),
        operators=_operators(first, second),
    )


def _operators(first: FileTiming, second: FileTiming) -> tuple[OperatorTime, ...]:
    """Shares of time by type of operator, largest of the first model first."""
    inputs = {
        port.name: np.zeros(tuple(size or first.batch_size for size in port.shape), port.dtype)
        for port in first.session.inputs
    }
    dense, pruned = (operator_shares(each.session, inputs) for each in (first, second))
    return tuple(OperatorTime(name, dense.get(name, 0.0), pruned.get(name, 0.0)) for name in {**dense, **pruned})


def _measurement(candidate: Candidate, tried: FileTiming) -> Measurement:
    return Measurement(
        quality=tried.predictions.quality,
        samples=tried.predictions.samples,
        params=candidate.params,
        macs=candidate.macs,
        onnx_bytes=file_bytes(candidate.path),
        latency_ms=latency(tried.seconds),
        throughput=throughput(tried),
        batch_size=tried.batch_size,
        provider=tried.session.placement.got,
        precision=tried.session.precision,
    )


def ratios(dense: Measurement, pruned: Measurement) -> Ratios:
    """Pruned / dense; dense / pruned for the speed-up."""
    return Ratios(
        params=pruned.params / dense.params,
        macs=pruned.macs / dense.macs,
        onnx_bytes=pruned.onnx_bytes / dense.onnx_bytes,
        speedup_p50=dense.latency_ms.p50 / pruned.latency_ms.p50,
    )


def verdict(comparison: Comparison) -> str:
    """What was gained and lost, in one line; says so when nothing was gained."""
    dense, pruned = comparison.dense, comparison.pruned
    macs = _factor(dense.macs, pruned.macs, "fewer MACs", "more MACs", "same MACs")
    size = _factor(dense.onnx_bytes, pruned.onnx_bytes, "smaller file", "larger file", "same file size")
    speed = _speed(comparison)
    faster = comparison.speedup.low > 1 and not comparison.disagrees
    parts = [macs, speed, size] if faster else [speed, macs, size]
    metric, change = comparison.metric, comparison.change
    low, high = metric.format_change(change.low), metric.format_change(change.high)
    interval = f"95 % interval of the change {low} to {high} {metric.change_unit}".rstrip()
    before, after = metric.format(dense.quality.value), metric.format(pruned.quality.value)
    shown = metric.name if change.is_shown else f"no {metric.name} difference shown:"
    return f"{', '.join(parts)}, {shown} {before} -> {after} ({pruned.samples} samples, {interval})"


def _speed(comparison: Comparison) -> str:
    """The speed-up in words, with its conditions; "faster" only where the whole interval is."""
    change, batch = comparison.speedup, comparison.pruned.batch_size
    where = f"p50, batch {batch}, {_hardware(comparison)}, 95 % interval {change.interval}"
    if comparison.disagrees:
        return (
            f"SPEED UNCLEAR at batch {batch}: {change.ratio:.2f}x by p50, {comparison.mean_speedup:.2f}x by the mean "
            f"({where})"
        )
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
