"""Words and numbers that all views of a report share: figures, intervals, conditions, and the command."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pxcompress.deploy.intervals import Interval as Interval
from pxcompress.deploy.intervals import disagrees_with_mean, is_chance_level
from pxcompress.deploy.intervals import wilson_interval as wilson_interval
from pxcompress.proof import Estimate, Measurement, Metric, Placement, Speedup
from pxcompress.recipe import GOALS, Bench, Guarantee, Pruning, Recipe
from pxcompress.recipe.goal import DEFAULT_BUDGET, auto_normalise, auto_round_to
from pxcompress.recipe.model_and_data import IN_PYTHON
from pxcompress.recipe.repairing import DEFAULT_REPAIR
from pxcompress.registry import name_of
from pxcompress.report.record import Report
from pxcompress.types import Kind

_OPTIONS = {"scorer": "score"}
"""Fields of a recipe whose command-line option has another name -> that name."""

_WITH_COMMAS = ("classes", "floors", "only", "keep", "targets")
"""Options that take several values in one text, separated by commas."""


@dataclass(frozen=True)
class Figure:
    """One figure of both models, as numbers and as text. `change` is pruned against dense, in words."""

    label: str
    dense: float
    pruned: float
    dense_text: str
    pruned_text: str
    change: str

    @property
    def ratio(self) -> float:
        """The pruned value divided by the dense one."""
        return self.pruned / self.dense if self.dense else float("nan")


def is_dense_at_chance(report: Report) -> bool:
    """Whether the dense model is a classifier that only guesses, and so has no accuracy to lose."""
    if not is_classifier(report):
        return False
    return is_chance_level(report.dense.quality.value, report.dense.samples, len(report.data.classes))


def is_classifier(report: Report) -> bool:
    """Whether the outputs are scores of classes, of which each sample has one."""
    return report.task.partition(":")[0] == "classification"


def takes_images(report: Report) -> bool:
    """Whether the model's input is an image, which predict.py can read."""
    return report.data.images and len(report.input_shape) == 3


def loss_is_shown(report: Report) -> bool:
    """Whether the whole interval of the change of quality is for the worse."""
    return report.change.is_shown and report.metric.gain(report.change.value) < 0


def loss_share(report: Report, change: float) -> float:
    """The loss of quality by a `change`: a share of the samples, or of the dense model's value."""
    scale = 1.0 if report.metric.unit == "share" else abs(report.dense.quality.value) or 1.0
    return -report.metric.gain(change) / scale


def format_span(low: float, high: float, metric: Metric) -> str:
    """An interval of the metric as text: "96.1% to 97.9%"."""
    return f"{metric.format(low)} to {metric.format(high)}"


def format_change_span(change: Estimate, metric: Metric) -> str:
    """The interval of a change as text, signed: "-4.1 to -1.3"."""
    return f"{metric.format_change(change.low)} to {metric.format_change(change.high)}"


def compare_figures(report: Report) -> tuple[Figure, ...]:
    """Costs and speed of both models, a `Figure` each; quality is separate, as it has an interval."""
    return tuple(_make_figure(report, *figure) for figure in _FIGURES)


def _make_figure(
    report: Report,
    label: str,
    value: Callable[[Measurement], float],
    text: Callable[[float], str],
    words: tuple[str, str],
) -> Figure:
    dense, pruned = value(report.dense), value(report.pruned)
    return Figure(label, dense, pruned, text(dense), text(pruned), describe_change(dense, pruned, *words))


def describe_change(dense: float, pruned: float, less_word: str, more_word: str) -> str:
    """A change in words: "2.9x fewer", "1.1x more", or "same" if three digits show no difference."""
    if not dense or not pruned:
        return "same" if dense == pruned else (less_word if pruned < dense else more_word)
    factor = f"{max(dense, pruned) / min(dense, pruned):.3g}"
    return "same" if factor == "1" else f"{factor}x {less_word if pruned < dense else more_word}"


def format_count(value: float) -> str:
    """A count with three digits: "23.5 M"."""
    return _scale(value, ("", "k", "M", "G", "T", "P"))


def format_bytes(value: float) -> str:
    """Bytes with three digits, in powers of 1000: "94.1 MB"."""
    return _scale(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def format_milliseconds(value: float) -> str:
    """Milliseconds with three digits."""
    return f"{_format_digits(value)} ms"


def format_seconds(value: float) -> str:
    """Seconds with one decimal; below one second, milliseconds."""
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def format_rate(value: float) -> str:
    """Samples per second with three digits."""
    return f"{format_count(value)}/s"


def describe_speedup(change: Speedup) -> str:
    """ "2.00x (1.90 to 2.10)", and "no difference shown" in front where the interval includes 1."""
    text = f"{change.ratio:.2f}x ({change.interval})"
    return f"no difference shown, {text}" if change.low <= 1 <= change.high else text


def describe_nodes(placement: Placement) -> str:
    """Which provider runs how many nodes: "118 nodes on CUDA", or "115 of 118 on CUDA, 3 on CPU"."""
    short = {name: name.removesuffix("ExecutionProvider") for name in (placement.got, *placement.elsewhere)}
    others = [f"{number} on {short[name]}" for name, number in placement.elsewhere.items()]
    share = f"{placement.nodes_on_provider} of {placement.nodes_total}" if others else f"{placement.nodes_total} nodes"
    suffix = " graph" if placement.asked == "cuda-graph" else ""
    return ", ".join([f"{share} on {short[placement.got]}{suffix}", *others])


def format_percent(share: float) -> str:
    """A share as "97.2%"."""
    return f"{share:.1%}"


def format_points(share: float) -> str:
    """A difference of shares in percentage points, signed: "-0.6"."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def capitalise(text: str) -> str:
    """`text` with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def typeset_factors(text: str) -> str:
    """`text` with the x of factors such as "2x" replaced by a multiplication sign."""
    return re.sub(r"(?<=\d)x\b", "\N{MULTIPLICATION SIGN}", text)


def _scale(value: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{_format_digits(value)} {units[step]}".rstrip()


def _format_digits(value: float) -> str:
    """Three significant digits without an exponent; whole numbers as they are."""
    if value == int(value):
        return str(int(value))
    places = next(
        (places for limit, places in ((99.95, 0), (9.995, 1), (0.9995, 2), (0.09995, 3)) if abs(value) >= limit), None
    )
    return f"{value:.3g}" if places is None else f"{value:.{places}f}"


_FIGURES: tuple[tuple[str, Callable[[Measurement], float], Callable[[float], str], tuple[str, str]], ...] = (
    ("MACs", lambda of: of.macs, format_count, ("fewer", "more")),
    ("parameters", lambda of: of.params, format_count, ("fewer", "more")),
    ("file size", lambda of: of.onnx_bytes, format_bytes, ("smaller", "larger")),
    ("latency p50", lambda of: of.latency_ms.p50, format_milliseconds, ("lower", "higher")),
    ("latency p90", lambda of: of.latency_ms.p90, format_milliseconds, ("lower", "higher")),
    ("throughput", lambda of: of.throughput, format_rate, ("less", "more")),
)


def write_headline(report: Report) -> str:
    """One line on speed, size and accuracy, with the intervals that a reader must know."""
    return f"{describe_speed(report)}, {describe_size_change(report)}, {describe_accuracy(report)}"


def describe_size_change(report: Report) -> str:
    """The change of the file's size in words: "4.6x smaller"."""
    text = describe_change(report.dense.onnx_bytes, report.pruned.onnx_bytes, "smaller", "larger")
    return "same size" if text == "same" else text


def describe_speed(report: Report) -> str:
    """The speed-up in words: "2.8x faster", or "not shown to be faster (1.84x, 95 % interval 0.91 to 2.60)"."""
    if is_faster(report):
        return describe_speed_briefly(report)
    return f"{describe_speed_briefly(report)} ({report.speedup.ratio:.2f}x, 95 % interval {report.speedup.interval})"


def describe_speed_briefly(report: Report) -> str:
    """The speed-up in words: "2.8x faster", "slower" if the whole interval says so, or "not shown ..."."""
    if is_faster(report):
        return f"{report.ratios.speedup_p50:.3g}x faster"
    return "slower" if report.speedup.high < 1 else "not shown to be faster"


def is_faster(report: Report) -> bool:
    """Whether the pruned model is shown to be faster, by the whole interval of p50 and by the mean."""
    return report.speedup.low > 1 and not disagrees_with_mean(
        report.speedup, report.dense.latency_ms, report.pruned.latency_ms
    )


def describe_accuracy(report: Report) -> str:
    """The loss in words, "2.6 points top-1 lost (95 % interval of the change -4.1 to -1.3)", with its interval."""
    metric, change = report.metric, report.change
    words = describe_accuracy_briefly(report)
    if is_dense_at_chance(report):
        return f"{words} (the dense model guesses: {metric.name} {metric.format(report.dense.quality.value)})"
    difference = "" if change.is_shown else f"{metric.format_change(change.value)} {metric.change_unit}".rstrip() + ", "
    return f"{words} ({difference}95 % interval of the change {format_change_span(change, metric)})"


def describe_accuracy_briefly(report: Report, with_metric: bool = True) -> str:
    """The loss in words, "2.6 points top-1 lost", or that none is shown, or that there was none to lose."""
    metric, change = report.metric, report.change
    if is_dense_at_chance(report):
        return "no accuracy to lose"
    metric_text = f" {metric.name}" if with_metric else ""
    if not change.is_shown:
        return f"no{metric_text} difference shown"
    amount = metric.format_change(abs(change.value)).lstrip("+")
    if not metric.higher_is_better:
        return f"{amount}{metric_text} {'more' if change.value > 0 else 'less'}"
    unit = f" {metric.change_unit}" if metric.change_unit else ""
    return f"{amount}{unit}{metric_text} {'gained' if change.value > 0 else 'lost'}"


def describe_hardware(report: Report) -> str:
    """Name of the processor or GPU on which latency was measured."""
    return report.environment.cpu_name if report.provider.device == "cpu" else report.environment.device_name


_WEIGHTS = {
    "checkpoint": "weights from a checkpoint",
    "pretrained": "pretrained weights",
    "factory": "weights as the factory made them",
    "trained-here": "weights trained here",
    "file": "weights of the ONNX file",
    "module": "weights of the module given in Python",
}


def describe_agreement(report: Report) -> str:
    """How similar outputs are to the dense model's, on held-out and on calibration samples; "" if unknown."""
    if report.agreements is None:
        return ""
    held_out, calibration = report.agreements.held_out, report.agreements.calibration
    interval = wilson_interval(held_out.share, held_out.samples)
    span = f" (95 % interval {format_percent(interval.low)} to {format_percent(interval.high)})"
    if not is_classifier(report):  # what two models agree by is no share of the samples
        span = ""
    return (
        f"agreement with the dense model, before export: {format_percent(held_out.share)} on {held_out.samples} "
        f"held-out samples{span}, "
        f"{format_percent(calibration.share)} on {calibration.samples} of those that weights were fitted to"
    )


def describe_inputs(report: Report) -> str:
    """The shape of an input, or names and shapes of several: "inputs image 3x32x32, place 1"."""
    if not report.inputs:
        return f"input {'x'.join(map(str, report.input_shape))}"
    return f"inputs {', '.join(map(str, report.inputs))}"


def describe_conditions(report: Report) -> str:
    """The conditions of the figures in one line, such as hardware, provider and threads."""
    threads = report.environment.threads
    parts = (
        describe_hardware(report),
        _describe_provider(report.provider),
        f"{threads} CPU thread{'' if threads == 1 else 's'}",
        f"batch {report.pruned.batch_size}",
        report.pruned.precision,
        f"{report.pruned.samples} test samples",
        describe_inputs(report),
        _WEIGHTS.get(report.weights, f"weights: {report.weights}"),
    )
    return ", ".join(parts)


def _describe_provider(placement: Placement) -> str:
    """Name of the provider that ran the graph, with its options."""
    options = ", ".join(f"{name} {value}" for name, value in placement.options.items())
    return f"{placement.got} ({options})" if options else placement.got


def describe_goal(pruning: Pruning, unit: str) -> str:
    """The user's goal in words: how small, or how fast. `unit` is the budget's."""
    words: Mapping[str, Callable[[Any], str]] = {
        "ratio": lambda value: f"{format_percent(value)} of the {unit} to remove",
        "speedup": lambda value: f"{value:g}x faster",
        "latency_ms": lambda value: f"at most {format_milliseconds(value)} a call",
        "max_bytes": lambda value: f"at most {format_bytes(value)}",
        "relevance_share": lambda value: (
            f"what holds at most {format_percent(value)} of every layer's scores to remove"
        ),
    }
    return words[pruning.way](getattr(pruning, pruning.way))


def describe_share(report: Report) -> str:
    """One line on the ratio that --relevance-share led to; "" for other goals."""
    if report.recipe.relevance_share is None:
        return ""
    plan = report.plan
    ratio = 1 - plan.cost_planned / plan.cost_dense
    return f"{describe_goal(report.recipe, plan.unit)}: that came to ratio {ratio:.3f} of the {plan.unit}"


def describe_removal(report: Report) -> str:
    """How much was removed: in the budget's unit, in units, and in milliseconds, as these shares differ."""
    plan = report.plan
    kinds = {kind: f"{kind}s" for kind in get_args(Kind) if kind in {of.kind for of in report.groups}}
    units = " and ".join(", ".join(kinds.values()).rsplit(", ", 1))
    share_by_unit = {
        plan.unit: 1 - plan.cost_planned / plan.cost_dense,
        "MACs": 1 - report.ratios.macs,
        "units": 1 - sum(of.kept for of in report.groups) / max(1, sum(of.units for of in report.groups)),
        "ms": 1 - report.pruned.latency_ms.p50 / report.dense.latency_ms.p50,
    }
    names = {"units": units, "ms": "milliseconds"}
    first_text, *other_texts = (
        f"{share:.2f} of the {names.get(unit, unit)}"
        if share > -0.005
        else f"{-share:.2f} more {names.get(unit, unit)}"
        for unit, share in share_by_unit.items()
    )
    return f"{first_text} removed: {', '.join(other_texts)}"


def format_command(recipe: Recipe) -> str:
    """The `pxcompress run` line, or the call in Python, for a recipe, without options at their default."""
    defaults = _list_defaults(recipe)
    if recipe.data == IN_PYTHON:
        values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Pruning)}
        defaults |= {"bench": Bench()}
        parts = (f"{name}={value!r}" for name, value in values.items() if value != defaults[name])
        return f"pxcompress.compress_module(model, example, batches, {', '.join(parts)})"
    words = ["pxcompress", "run"]
    for part in (recipe, recipe.bench, recipe.guarantee):
        for name in (field.name for field in dataclasses.fields(part)) if part else ():
            value = getattr(part, name)
            if name not in ("bench", "guarantee") and (name not in defaults or value != defaults[name]):
                words += _format_option(_OPTIONS.get(name, name.replace("_", "-")), value)
    return shlex.join(words)


def _list_defaults(recipe: Recipe) -> dict[str, Any]:
    """The default of every option; some depend on the budget."""
    fields = [field for cls in (Recipe, Bench, Guarantee) for field in dataclasses.fields(cls)]
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    if name_of(recipe.budget) == (GOALS[recipe.way].budget or DEFAULT_BUDGET):
        defaults["budget"] = recipe.budget
    defaults |= {"normalise": auto_normalise(recipe.budget), "round_to": auto_round_to(recipe.budget)}
    return {**defaults, "repair": DEFAULT_REPAIR}


def _format_option(name: str, value: Any) -> list[str]:
    if name in _WITH_COMMAS:
        return [f"--{name}", ",".join(value)]
    if isinstance(value, tuple):
        return [word for item in value or ["none"] for word in (f"--{name}", str(item))]
    if value is True:
        return [f"--{name}"]
    return [] if value is None or value is False else [f"--{name}", str(value)]
