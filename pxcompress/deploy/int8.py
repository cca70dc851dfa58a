"""Quantises a model to int8 with little loss: it tries several ranges, corrects biases, leaves costly parts in float32.

All of it is judged on files, by samples that ranges and biases are not fitted to.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from onnxruntime.quantization.calibrate import TensorsData

from pxcompress.deploy import runtime
from pxcompress.deploy.export import onnx_files
from pxcompress.deploy.qdq import (
    METHODS,
    Style,
    correct_biases,
    measure_ranges,
    name_nodes,
    quantisable_nodes,
    write_quantised,
)
from pxcompress.passes.parts import spread_samples
from pxcompress.tasks.agreement import Agreement
from pxcompress.tasks.task import Outputs, Task
from pxcompress.types import Batch, Batches

MAX_DROP = 0.005
"""Default of how much of the metric int8 may lose: a share of the samples, or of the metric's own value."""

MOST_PARTS = 24
"""Most parts of consecutive nodes that a graph is cut into, to try each one alone in int8."""

MOST_JUDGE_SAMPLES = 500
"""Most samples on which an int8 file is judged."""

RANKING_SAMPLES = 64
"""Number of samples used to rank the parts of a graph by their loss in int8."""

BIAS_CORRECTIONS = 2
"""Number of times that all biases are corrected: each correction changes the inputs of later layers."""


@dataclass(frozen=True, eq=False)
class Judge:
    """How an int8 file is judged: on `provider` it may lose `max_drop` of the task's metric, on the batches `check`.

    Without `check` batches no alternatives are tried, and ranges are the extremes.
    """

    check: Batches = ()
    task: Task = field(default_factory=Agreement)
    max_drop: float = MAX_DROP
    provider: str = "cpu"

    @property
    def style(self) -> Style:
        """The integer types that suit the provider's device."""
        return Style(gpu=runtime.get_device(self.provider) == "cuda")


@dataclass(frozen=True)
class Rating:
    """How far an int8 file is from the float32 one: divergence of outputs (`error`), and loss of the metric
    (`drop`).
    """

    error: float
    drop: float


@dataclass(frozen=True)
class QuantisedFile:
    """An int8 file, its loss, and how it was made; the nodes `in_float`, of `nodes` in all, stayed in float32."""

    path: Path
    rating: Rating
    method: str
    nodes: int
    biases: int = 0
    in_float: tuple[str, ...] = ()

    @property
    def recipe(self) -> str:
        """A text for the report on how the file was made."""
        parts = [f"ranges by {self.method}"]
        if self.biases:
            parts.append(f"{self.biases} biases corrected")
        if self.in_float:
            parts.append(f"{len(self.in_float)} of {self.nodes} operators left in float32")
        return ", ".join(parts)


class _Trials:
    """Makes int8 files of one model in a temporary folder, and rates each against the float32 file."""

    def __init__(self, source: Path, folder: Path, batches: Batches, judge: Judge) -> None:
        self.source, self.folder, self.batches, self.judge = folder / "source.onnx", folder, batches, judge
        name_nodes(source, self.source)
        self.nodes = quantisable_nodes(self.source)
        self._all, self._few = (take_evenly(judge.check, count) for count in (MOST_JUDGE_SAMPLES, RANKING_SAMPLES))
        self._outputs = outputs_of(self.source, self._all)
        self._few_outputs = outputs_of(self.source, self._few)
        self._ranges: dict[str, TensorsData] = {}
        self.count = 0

    def make(self, method: str) -> QuantisedFile:
        """Quantise the model with the ranges of activations that `method` measures, and rate it."""
        self._ranges[method] = measure_ranges(self.source, self.batches, method)
        return self.write(QuantisedFile(self.source, Rating(0.0, 0.0), method, len(self.nodes)), self.source)

    def write(self, made: QuantisedFile, source: Path, *, few: bool = False) -> QuantisedFile:
        """Write the file that `made` describes, from `source`, and rate it on all samples, or with `few` on a few."""
        self.count += 1
        path = self.folder / f"trial-{self.count}.onnx"
        write_quantised(source, path, self._ranges[made.method], self.judge.style, made.in_float)
        check, outputs = (self._few, self._few_outputs) if few else (self._all, self._outputs)
        return replace(made, path=path, rating=rate_file(path, check, outputs, self.judge))


def quantise(source: Path, path: Path, batches: Batches, judge: Judge) -> QuantisedFile:
    """Quantise the float32 file `source` to int8 at `path`; `batches` calibrate, `judge` says what may be lost.

    Weights have a scale for each channel. Of the `METHODS` for ranges the one with the smallest error of outputs is
    taken; corrected biases are kept if they lower it. If that loses too much, operators go back to float32, as few as
    needed, those first whose part of the graph costs most, and biases are corrected once more.
    """
    with tempfile.TemporaryDirectory() as folder:
        trials = _Trials(source, Path(folder), batches, judge)
        methods = tuple(METHODS) if judge.check else tuple(METHODS)[:1]
        plain = min((trials.make(method) for method in methods), key=lambda made: made.rating.error)
        best = _with_biases(trials, plain) if judge.check else plain
        if best.rating.drop > judge.max_drop:
            best = _with_biases(trials, _with_float(trials, plain))
        file, *weights = onnx_files(best.path)
        shutil.copyfile(file, path)
        for beside in weights:  # the file names them
            shutil.copyfile(beside, path.parent / beside.name)
        return replace(best, path=path)


def _with_biases(trials: _Trials, plain: QuantisedFile) -> QuantisedFile:
    """`plain` with corrected biases if that lowers its error, else `plain`."""
    best, latest, source = plain, plain, trials.source
    allowed = max(plain.rating.drop, trials.judge.max_drop)
    if len(onnx_files(source)) > 1:  # such a model is large enough
        return plain
    for _ in range(BIAS_CORRECTIONS):
        corrected = trials.folder / f"corrected-{trials.count}.onnx"
        biases = correct_biases(trials.source, source, latest.path, corrected, trials.batches)
        latest, source = trials.write(replace(latest, biases=biases), corrected), corrected
        if latest.rating.error < best.rating.error and latest.rating.drop <= allowed:
            best = latest
    return best


def _with_float(trials: _Trials, plain: QuantisedFile) -> QuantisedFile:
    """`plain` with just enough operators in float32 to meet the limit, by bisection.

    The most costly parts come first.
    """
    order = _order_parts(trials, plain)
    fails, holds, chosen = 0, len(order), None
    while holds - fails > 1:
        count = 1 if holds == len(order) and fails == 0 else (fails + holds) // 2
        trial = trials.write(replace(plain, in_float=_first(order, count)), trials.source)
        if trial.rating.drop <= trials.judge.max_drop:
            holds, chosen = count, trial
        else:
            fails = count
    return chosen or trials.write(replace(plain, in_float=_first(order, holds)), trials.source)


def _order_parts(trials: _Trials, plain: QuantisedFile) -> list[Sequence[str]]:
    """Parts of the graph (names of nodes), sorted by the error of a file with that part alone in int8, largest
    first.
    """
    size = math.ceil(len(trials.nodes) / MOST_PARTS)
    parts = [trials.nodes[start : start + size] for start in range(0, len(trials.nodes), size)]
    errors = []
    for part in parts:
        others = tuple(name for name in trials.nodes if name not in part)
        errors.append(trials.write(replace(plain, in_float=others), trials.source, few=True).rating.error)
    return [parts[place] for place in sorted(range(len(parts)), key=errors.__getitem__, reverse=True)]


def _first(parts: Sequence[Sequence[str]], count: int) -> tuple[str, ...]:
    return tuple(name for part in parts[:count] for name in part)


def take_evenly(batches: Batches, count: int) -> list[Batch]:
    """About `count` samples, taken evenly from all batches; all samples if there are fewer."""
    return spread_samples(batches, count) if batches else []


def outputs_of(path: Path, batches: Batches) -> list[Outputs]:
    """Outputs of a float32 file for every batch, computed on the CPU."""
    session = runtime.open_session(path, "cpu")
    return [session.outputs_of(inputs) for inputs, _ in batches]


def rate_file(path: Path, batches: Batches, reference: Sequence[Outputs], judge: Judge) -> Rating:
    """Rate a file by comparing its outputs with `reference`, those of the float32 file; NaN gives an infinite error."""
    session, task = runtime.open_session(path, judge.provider), judge.task
    distances, rows, before = [], [], []
    for (inputs, targets), expected in zip(batches, reference, strict=True):
        outputs = session.outputs_of(inputs)
        distances.append(task.divergence(outputs, expected))
        rows.append(task.statistics(outputs, targets.cpu(), expected))
        before.append(task.statistics(expected, targets.cpu(), expected))
    if not rows:
        return Rating(0.0, 0.0)
    error = float(torch.cat(distances).mean())
    if not math.isfinite(error):
        return Rating(math.inf, math.inf)
    old, new = (task.quality(task.complete(torch.cat(each))) for each in (before, rows))
    lost = -task.metric.gain(new - old)
    return Rating(error, lost if task.metric.unit == "share" else lost / max(abs(old), 1e-12))
