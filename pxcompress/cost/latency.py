"""Predicts the milliseconds of a model at planned widths, from operators timed one by one on the target machine.

Every operator is timed on ONNX Runtime at a few widths, and times between these are interpolated. They are kept in the
cache folder for each device and version, without the fixed cost of a call and without the change of layout around the
operator. In a whole model weights are read from memory instead of the processor's cache, which is added. The sum is
then corrected by timing the whole model, dense and at smaller widths: operators take another time when they are fused,
and what lies between them takes some too.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls
from torch import Tensor, nn

from pxcompress.cache import cache_dir, whole_file
from pxcompress.cost.count import Widths
from pxcompress.cost.operators import Operator, find_operators
from pxcompress.cost.stairs import Stairs
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.measure import check_batch_size
from pxcompress.deploy.runtime import describe_device, get_device, open_session, time_graph, time_runs
from pxcompress.graph import prune, restore_layer_norms
from pxcompress.types import Group, Meter, OpenAxes, Plan

Array = npt.NDArray[np.float64]

TIMED_SHARES = (0.125, 0.25, 0.5, 1.0)
"""The widths at which an operator is timed, as shares of its dense width."""

TIMED_STEP = 16
"""Operators are timed at multiples of this width, at which no execution provider is slow."""

WHOLE_MODEL_SHARES = (1.0, 0.5, 0.25)
"""The shares of all widths at which the whole model is exported and timed."""


PROBE = 128
PROBES = (
    Operator("conv", (28, 28), PROBE, PROBE, (3, 3), (1, 1), (1, 1), (1, 1), positions=784),
    Operator("conv", (28, 28), PROBE, PROBE, (1, 1), (1, 1), (0, 0), (1, 1), positions=784),
    Operator("linear", (196,), PROBE, PROBE, positions=196),
)
WIDTH_STEPS = (32, 16, 8, 4, 2)
STEP_SAVING = 0.25
"""A step of widths is real if a layer that is half a step narrower saves hardly any time.

Hardly any is at most this share of the time that would be saved if time were proportional to the width.
"""

FIXED_TIME_SHARE = 0.1
"""Smallest share of an operator's stand-alone time that counts as its own, however large the measured overhead."""

EMPTY_OPERATOR = Operator("copy", (1, 1), TIMED_STEP, TIMED_STEP, (1,))
"""An operator with next to no work, whose time is the fixed cost of a call."""

GPU_UNITS: Mapping[str, int] = {"fp32": 8, "fp16": 8, "int8": 16}
"""Precision -> step of widths that tensor cores need; other widths are padded or run without tensor cores."""


MATRIX = Operator("linear", (), 4096, 4096)
CACHE_PROBE = 512
"""Width of a linear layer whose weights fit into the processor's cache.

`MATRIX` does not fit: compared with it, this layer shows what it costs to read a weight from memory.
"""


@dataclass(frozen=True)
class Conditions:
    """The conditions of a latency: samples per call, execution provider, CPU threads (0: all physical cores)."""

    batch_size: int = 1
    provider: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size)

    @property
    def on_gpu(self) -> bool:
        """Whether the provider runs on a GPU, where an operator's time rises in wide steps over its two widths."""
        return get_device(self.provider) == "cuda"


class OperatorTimes:
    """Times of single operators under fixed conditions, read from the cache folder, or measured when first needed."""

    def __init__(self, conditions: Conditions) -> None:
        self._conditions = conditions
        device = describe_device(conditions.provider, conditions.threads)
        name = "".join(letter if letter.isalnum() else "-" for letter in device)
        self._path = cache_dir() / "latency" / f"{name}.json"
        self._times: dict[str, float] = (
            json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        )

    def milliseconds(self, operator: Operator) -> float:
        """Milliseconds that `operator` adds to the call of a whole model: its time alone less `_measure_overhead`."""
        standalone_ms = self._call(operator)
        return max(standalone_ms - self._measure_overhead(operator), FIXED_TIME_SHARE * standalone_ms)

    def _measure_overhead(self, operator: Operator) -> float:
        """Milliseconds in a call for `operator` that are not its own work: fixed cost, and conversions of the layout.

        It is measured with copies, which do next to nothing between a conversion of the layout and the one back, so
        half of their time counts for the input and half for the output. What a copy itself takes is left out: it is
        the difference to a copy that does its work twice.
        """
        return sum(2 * self._call(copy) - self._call(replace(copy, kernel=(2,))) for copy in _make_copies(operator)) / 2

    def measure_memory_read(self) -> float:
        """Milliseconds by which reading one weight from memory, as whole models do, is slower than from the cache."""
        big, small = (MATRIX.at(width, width) for width in (MATRIX.inputs, CACHE_PROBE))
        cached_ms_per_weight = (self._call(small) - self._call(EMPTY_OPERATOR)) / CACHE_PROBE**2
        return max(0.0, self._call(big) / MATRIX.inputs**2 - cached_ms_per_weight)

    def _call(self, operator: Operator) -> float:
        batch = self._conditions.batch_size
        key = f"{batch} {operator}"
        if key not in self._times:
            self._times[key] = 1e3 * time_graph(
                operator.graph(batch), operator.input_shape(batch), self._conditions.provider, self._conditions.threads
            )
        return self._times[key]

    def save(self) -> None:
        """Write the measured times to the cache folder."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self._path) as path:
            path.write_text(json.dumps(self._times), encoding="utf-8")


@dataclass(frozen=True, eq=False)
class _TimeSurface:
    """Milliseconds of one operator over its two widths: `times` (inputs, outputs) never fall along either axis."""

    inputs: Array
    outputs: Array
    times: Array

    def at(self, inputs: float, outputs: float) -> float:
        """Milliseconds at any widths, interpolated bilinearly between the measured ones."""
        (row, row_share), (column, column_share) = (
            _find_between(self.inputs, inputs),
            _find_between(self.outputs, outputs),
        )
        corners = self.times[row : row + 2, column : column + 2]
        lines = corners[:, 0] if corners.shape[1] == 1 else corners @ np.array([1 - column_share, column_share])
        return float(lines[0] if len(lines) == 1 else lines @ np.array([1 - row_share, row_share]))


def _make_copies(operator: Operator) -> tuple[Operator, Operator]:
    """Two operators of little work that convert the layout of the input, and of the output, of `operator`.

    Inputs of only a few channels need no conversion.
    """
    if operator.kind != "conv":
        return EMPTY_OPERATOR, EMPTY_OPERATOR
    source = _make_copy(operator.inputs, math.prod(operator.rows)) if operator.inputs >= TIMED_STEP else EMPTY_OPERATOR
    return source, _make_copy(operator.outputs, operator.positions)


def _make_copy(channels: int, positions: int) -> Operator:
    width = -(-channels // TIMED_STEP) * TIMED_STEP
    return Operator("copy", (positions, 1), width, width, (1,))


def _find_between(points: Array, value: float) -> tuple[int, float]:
    """Index of the measured width below `value`, and how far `value` lies towards the next one, as a share.

    Below the first measured width the line goes on towards 0.
    """
    if len(points) == 1:
        return 0, 0.0
    place = int(np.clip(np.searchsorted(points, value, side="right") - 1, 0, len(points) - 2))
    return place, float((value - points[place]) / (points[place + 1] - points[place]))


def latency_meter(model: nn.Module, groups: Sequence[Group], example: Tensor, conditions: Conditions) -> Meter:
    """A function from kept units to milliseconds of one call, from measured operators.

    The whole model is exported and timed at `WHOLE_MODEL_SHARES` to correct the sum.
    """
    widths, table, step = Widths(model, groups), OperatorTimes(conditions), measure_best_step(conditions)
    dense_operators = find_operators(model, groups, example)
    on_gpu, unit = conditions.on_gpu, GPU_UNITS["fp32"]
    surfaces = {
        name: _time_in_steps(operator, table, unit) if on_gpu else _measure_surface(operator, name, widths, table)
        for name, operator in dense_operators.items()
    }
    measure_memory_read = table.measure_memory_read()
    table.save()

    def parts(kept_units: Mapping[str, int]) -> Array:
        """Milliseconds of all operators one by one, and elements that they write."""
        total = np.zeros(2)
        for name, operator in dense_operators.items():
            inputs, outputs = _plan_widths(operator, name, widths, kept_units)
            if not (inputs and outputs):
                continue
            if operator.kind != "attention":  # what is not a whole step takes as long as one
                inputs, outputs = (
                    min(dense_width, -(-width // step) * step)
                    for width, dense_width in ((inputs, operator.inputs), (outputs, operator.outputs))
                )
            fetch_ms = measure_memory_read * operator.weights(inputs, outputs)
            total += surfaces[name].at(inputs, outputs) + fetch_ms, operator.positions * outputs
        return total

    points = [
        {group.name: _choose_near(group.units, share, group.kind == "head") for group in groups}
        for share in WHOLE_MODEL_SHARES
    ]
    measured_ms = np.array(
        [[measure_whole_model(model, groups, example, conditions, kept_units)] for kept_units in points]
    )
    predicted_parts = np.array([parts(kept_units) for kept_units in points])
    scale = predicted_parts.max(0)
    factors = nnls(predicted_parts / scale / measured_ms, np.ones(len(points)))[0] / scale  # relative errors count

    @cache
    def priced(kept_units: tuple[tuple[str, int], ...]) -> float:
        return float(parts(dict(kept_units)) @ factors)

    return lambda kept_units: priced(
        tuple(sorted((group.name, kept_units.get(group.name, group.units)) for group in groups))
    )


def _plan_widths(operator: Operator, name: str, widths: Widths, kept_units: Mapping[str, int]) -> tuple[int, int]:
    """Input and output width of an operator when each group keeps only `kept_units`."""
    if operator.kind == "attention":
        heads, _ = widths.heads(name, kept_units)
        return heads, heads
    (inputs, dense_inputs), (outputs, dense_outputs) = (
        widths.share(name, "in", kept_units),
        widths.share(name, "out", kept_units),
    )
    outputs = outputs * operator.outputs // dense_outputs
    return outputs if operator.depthwise else inputs * operator.inputs // dense_inputs, outputs


@dataclass(frozen=True, eq=False)
class _Steps:
    """Milliseconds of one operator whose time rises in steps over its input and output width.

    With `single` the two widths are always equal, as of depthwise convolutions, and one is measured.
    """

    stairs: Stairs
    single: bool

    def at(self, inputs: float, outputs: float) -> float:
        """Milliseconds of the step on which these widths lie."""
        return self.stairs.at((int(outputs),) if self.single else (int(inputs), int(outputs)))


def _time_in_steps(operator: Operator, table: OperatorTimes, unit: int) -> _Steps:
    """The `_Steps` of an operator on a GPU: times are measured when a plan needs them, and saved at once."""

    def time(widths: tuple[int, ...]) -> float:
        milliseconds = table.milliseconds(operator.at(widths[0], widths[-1]))
        table.save()
        return milliseconds

    if operator.kind == "attention" or operator.depthwise:
        dense, unit = (operator.outputs,), 1 if operator.kind == "attention" else unit
        return _Steps(Stairs(time, dense, unit), single=True)
    dense_widths = operator.inputs, operator.outputs
    unit = math.lcm(unit, operator.groups) if operator.groups > 1 else unit
    return _Steps(Stairs(time, dense_widths, unit), single=False)


def _measure_surface(operator: Operator, name: str, widths: Widths, table: OperatorTimes) -> _TimeSurface:
    """Time an operator at a grid of widths, along the axes that groups can make narrower."""
    axes = {axis: widths.share(name, axis, {})[1] > 1 for axis in ("in", "out")}
    heads = operator.kind == "attention"
    inputs = _list_points(operator, operator.inputs, axes["out" if operator.depthwise else "in"] or heads)
    outputs = _list_points(operator, operator.outputs, axes["out"])
    if operator.depthwise or heads:
        times = np.array([[table.milliseconds(operator.at(width, width))] for width in inputs])
        outputs = inputs[-1:]
    else:
        times = np.array([[table.milliseconds(operator.at(i, o)) for o in outputs] for i in inputs])
    monotone_times = np.maximum.accumulate(np.maximum.accumulate(times, axis=0), axis=1)
    return _TimeSurface(np.array(inputs, float), np.array(outputs, float), monotone_times)


def _list_points(operator: Operator, width: int, is_prunable: bool) -> list[int]:
    """The widths at which to time an operator: multiples of the step, of a convolution's groups, or of one head."""
    if not is_prunable:
        return [width]
    if operator.groups > 1 and not operator.depthwise:
        return sorted({max(1, round(width * share / operator.groups)) * operator.groups for share in TIMED_SHARES})
    return sorted({_choose_near(width, share, operator.kind == "attention") for share in TIMED_SHARES})


def _choose_near(width: int, share: float, single: bool) -> int:
    """A width near the given share of `width` at which no provider is slow."""
    step = 1 if single else TIMED_STEP
    return min(width, max(1, round(width * share / step)) * step)


def measure_best_step(conditions: Conditions, precision: str = "fp32") -> int:
    """The number that layer widths should be multiples of on this machine, measured; 1 if any width is as good.

    It is the largest of `WIDTH_STEPS` where layers that are half a step narrower than `PROBE` outputs are hardly faster
    (see `STEP_SAVING`), so that they waste what the machine computes anyway. Timed are a 3 x 3 and a 1 x 1 convolution
    and a linear layer. On a GPU the result is at least the multiple that its tensor cores take in `precision`.
    """
    table = OperatorTimes(conditions)

    def seconds(width: int) -> float:
        return sum(table.milliseconds(probe.at(probe.inputs, width)) for probe in PROBES)

    full_seconds = seconds(PROBE)
    good_steps = (
        step
        for step in WIDTH_STEPS
        if seconds(PROBE - step // 2) >= (1 - STEP_SAVING * step / 2 / PROBE) * full_seconds
    )
    step = next(good_steps, 1)
    table.save()
    return max(step, GPU_UNITS[precision]) if conditions.on_gpu else step


def measure_whole_model(
    model: nn.Module, groups: Sequence[Group], example: Tensor, conditions: Conditions, kept_units: Mapping[str, int]
) -> float:
    """Export `model` with only the first units of every group, and time it: milliseconds of one call."""
    removed_units = {group.name: tuple(range(kept_units.get(group.name, group.units), group.units)) for group in groups}
    slim = restore_layer_norms(prune(model, groups, Plan(removed_units, "", "", 0.0, 0.0, 0.0))).model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(slim, example, path, {}, axes=OpenAxes(conditions.batch_size))  # any batch is not asked for here
        return measure_files([path], example, conditions)[0]


def measure_files(files: Sequence[Path], example: Tensor, conditions: Conditions) -> list[float]:
    """Median milliseconds of one call of each ONNX file.

    Calls of the files alternate, so that drift affects all alike.
    """
    sessions = {str(path): open_session(path, conditions.provider, threads=conditions.threads) for path in files}
    seconds = time_runs(
        sessions, example.cpu().numpy(), batch_size=conditions.batch_size, runs=100, max_seconds=4.0 * len(files)
    )
    return [float(np.median(seconds[str(path)]) * 1e3) for path in files]
