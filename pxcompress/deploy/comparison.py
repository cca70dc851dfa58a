"""Compares the measured dense and pruned model, and sums it up in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pxcompress.deploy.intervals import disagrees_with_mean, estimate_speedup, mean_speedup, measure_noise
from pxcompress.deploy.measure import FileTiming, file_bytes, latency, throughput
from pxcompress.deploy.predictions import class_changes
from pxcompress.deploy.profile import operator_shares
from pxcompress.proof import ClassChange, Estimate, Measurement, Metric, OperatorTime, Placement, Ratios, Speedup


@dataclass(frozen=True)
class Candidate:
    """An exported model, and the numbers counted on its PyTorch form."""

    path: Path
    params: int
    macs: int


@dataclass(frozen=True)
class Comparison:
    """Dense and pruned model, measured in turns on one provider; `threads` are CPU threads, `noise` the larger of two.

    `change` is the change of quality, in terms of `metric`; `classes` says how each class in the samples changed;
    `operators` are shares of the run time.
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
        """Whether one of median and mean latency shows a speed-up and the other a slow-down."""
        return disagrees_with_mean(self.speedup, self.dense.latency_ms, self.pruned.latency_ms)

    @property
    def mean_speedup(self) -> float:
        """Mean latency of the dense model divided by that of the pruned one."""
        return mean_speedup(self.dense.latency_ms, self.pruned.latency_ms)


def compare(dense: Candidate, pruned: Candidate, timings: Sequence[FileTiming], classes: Sequence[str]) -> Comparison:
    """The comparison from `timings`, of which the first two are the dense and the pruned model's.

    `classes` are class names.
    """
    dense_timing, pruned_timing = timings[:2]
    return Comparison(
        dense=_make_measurement(dense, dense_timing),
        pruned=_make_measurement(pruned, pruned_timing),
        placement=pruned_timing.session.placement,
        speedup=estimate_speedup(dense_timing.seconds, pruned_timing.seconds),
        metric=pruned_timing.predictions.task.metric,
        change=pruned_timing.predictions.change(dense_timing.predictions),
        threads=pruned_timing.session.threads,
        noise=max(measure_noise(dense_timing.seconds), measure_noise(pruned_timing.seconds)),
        classes=class_changes(dense_timing.predictions, pruned_timing.predictions, classes),
        operators=_compare_operators(dense_timing, pruned_timing),
    )


def _compare_operators(first: FileTiming, second: FileTiming) -> tuple[OperatorTime, ...]:
    """Shares of the run time by type of operator, sorted by the first model's."""
    dense, pruned = (operator_shares(each.session, each.session.feed(each.inputs)) for each in (first, second))
    return tuple(OperatorTime(name, dense.get(name, 0.0), pruned.get(name, 0.0)) for name in {**dense, **pruned})


def _make_measurement(candidate: Candidate, timing: FileTiming) -> Measurement:
    return Measurement(
        quality=timing.predictions.quality,
        samples=timing.predictions.samples,
        params=candidate.params,
        macs=candidate.macs,
        onnx_bytes=file_bytes(candidate.path),
        latency_ms=latency(timing.seconds),
        throughput=throughput(timing),
        batch_size=timing.batch_size,
        provider=timing.session.placement.got,
        precision=timing.session.precision,
    )


def ratios(dense: Measurement, pruned: Measurement) -> Ratios:
    """Ratios pruned / dense of sizes and costs; for the speed-up, dense / pruned."""
    return Ratios(
        params=pruned.params / dense.params,
        macs=pruned.macs / dense.macs,
        onnx_bytes=pruned.onnx_bytes / dense.onnx_bytes,
        speedup_p50=dense.latency_ms.p50 / pruned.latency_ms.p50,
    )


def verdict(comparison: Comparison) -> str:
    """One line on what was gained and lost; it also says when nothing was gained."""
    dense, pruned = comparison.dense, comparison.pruned
    macs = _format_factor(dense.macs, pruned.macs, "fewer MACs", "more MACs", "same MACs")
    size = _format_factor(dense.onnx_bytes, pruned.onnx_bytes, "smaller file", "larger file", "same file size")
    speed = _describe_speed(comparison)
    faster = comparison.speedup.low > 1 and not comparison.disagrees
    parts = [macs, speed, size] if faster else [speed, macs, size]
    metric, change = comparison.metric, comparison.change
    low, high = metric.format_change(change.low), metric.format_change(change.high)
    interval = f"95 % interval of the change {low} to {high} {metric.change_unit}".rstrip()
    dense_quality, pruned_quality = metric.format(dense.quality.value), metric.format(pruned.quality.value)
    change_text = metric.name if change.is_shown else f"no {metric.name} difference shown:"
    return (
        f"{', '.join(parts)}, {change_text} {dense_quality} -> {pruned_quality} ({pruned.samples} samples, {interval})"
    )


def _describe_speed(comparison: Comparison) -> str:
    """The speed-up in words with its conditions; it is called faster only if the whole interval is above 1."""
    change, batch = comparison.speedup, comparison.pruned.batch_size
    conditions = f"p50, batch {batch}, {_describe_hardware(comparison)}, 95 % interval {change.interval}"
    if comparison.disagrees:
        return (
            f"SPEED UNCLEAR at batch {batch}: {change.ratio:.2f}x by p50, {comparison.mean_speedup:.2f}x by the mean "
            f"({conditions})"
        )
    if change.low > 1:
        return f"{change.ratio:.3g}x faster ({conditions})"
    if change.high < 1:
        return f"NOT FASTER at batch {batch}: {change.ratio:.2f}x ({conditions})"
    return f"no difference in speed shown at batch {batch}: {change.ratio:.2f}x ({conditions})"


def _describe_hardware(comparison: Comparison) -> str:
    name = comparison.placement.got.removesuffix("ExecutionProvider")
    plural = "" if comparison.threads == 1 else "s"
    return f"{name} {comparison.threads} thread{plural}" if name == "CPU" else f"{name} {comparison.pruned.precision}"


def _format_factor(dense: int, pruned: int, less_word: str, more_word: str, same_word: str) -> str:
    """A ratio in words, such as "2.9x fewer MACs"."""
    if dense == pruned:
        return same_word
    return (
        f"{dense / max(pruned, 1):.3g}x {less_word}" if dense > pruned else f"{pruned / max(dense, 1):.3g}x {more_word}"
    )
