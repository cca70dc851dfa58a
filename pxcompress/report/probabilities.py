"""Parts of reports about whether probabilities can be trusted: calibration error and conformal sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pxcompress.proof import Estimate
from pxcompress.report.pages import Row, TwoLineCell
from pxcompress.report.record import Report
from pxcompress.report.summary import format_percent, format_points

_MINUS = "\N{MINUS SIGN}"


def describe_calibration(report: Report) -> str:
    """One line on calibration error and conformal sets; "" if outputs are no probabilities."""
    record = report.calibration
    if record is None:
        return ""
    error, sets = record.error_change, record.set_size_change
    divided = f" (logits divided by {report.temperature:.3g})" if report.temperature != 1 else ""
    return (
        f"calibration error {format_percent(record.dense.error.value)} -> {format_percent(record.pruned.error.value)}"
        f"{divided}, change {format_points(error.low)} to {format_points(error.high)} points; conformal sets at "
        f"{record.coverage:.0%} hold {record.dense.set_size.value:.2f} -> {record.pruned.set_size.value:.2f} classes, "
        f"change {sets.low:+.2f} to {sets.high:+.2f}"
    )


def list_calibration(report: Report) -> Sequence[Row]:
    """Table rows with calibration errors and conformal sets, with 95 % intervals; empty without probabilities."""
    record = report.calibration
    if record is None:
        return []
    dense, pruned = record.dense, record.pruned
    return [
        (
            "expected calibration error",
            *(_stack_interval(each.error, format_percent) for each in (dense, pruned)),
            _stack_interval(record.error_change, format_points),
        ),
        (
            "classes in a conformal set",
            *(_stack_interval(each.set_size, "{:.2f}".format) for each in (dense, pruned)),
            _stack_interval(record.set_size_change, "{:+.2f}".format),
        ),
        (
            "sets with the true class",
            *(_stack_interval(each.covered, format_percent) for each in (dense, pruned)),
            "",
        ),
    ]


def _stack_interval(estimate: Estimate, text: Callable[[float], str]) -> TwoLineCell:
    value, low, high = (text(each).replace("-", _MINUS) for each in (estimate.value, estimate.low, estimate.high))
    return TwoLineCell(value, f"{low} to {high}")
