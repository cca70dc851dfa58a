"""Compares several runs, on one page and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pxcompress.columns import align
from pxcompress.proof import Estimate, Measurement, Metric, Speedup
from pxcompress.report.certificates import make_badge
from pxcompress.report.figures import Named, draw_tradeoffs, render_figure
from pxcompress.report.pages import Cell, Picture, TwoLineCell, render
from pxcompress.report.record import Report
from pxcompress.report.summary import (
    describe_conditions,
    describe_goal,
    describe_hardware,
    format_bytes,
    format_change_span,
    format_command,
    format_count,
    format_milliseconds,
    format_span,
)

HEAD = ("run", "quality", "change", "MACs", "parameters", "file size", "latency p50", "faster")


@dataclass(frozen=True)
class Row:
    """One file of a run.

    `speedup` and `change` are relative to the run's own dense model; None for the dense model itself.
    """

    run: str
    precision: str
    of: Measurement
    dense: Measurement
    metric: Metric
    speedup: Speedup | None = None
    change: Estimate | None = None

    @property
    def is_dense(self) -> bool:
        """Whether this is the dense model, with which the others are compared."""
        return self.of is self.dense

    @property
    def quality(self) -> str:
        """The quality as text, with the metric's name."""
        return f"{self.metric.format(self.of.quality.value)} {self.metric.name}"

    @property
    def difference(self) -> str:
        """The signed change from the dense model as text; "" for the dense model."""
        return "" if self.change is None else self.metric.format_change(self.change.value)

    @property
    def interval(self) -> str:
        """The 95 % interval of the change as text; "" for the dense model."""
        return "" if self.change is None else format_change_span(self.change, self.metric)

    @property
    def faster(self) -> str:
        """The speed-up as text: "2.00x", ", slower" or ", not shown" behind it by its interval; "reference" without."""
        if self.speedup is None:
            return "reference"
        words = "" if self.speedup.low > 1 else ", slower" if self.speedup.high < 1 else ", not shown"
        return f"{self.speedup.ratio:.2f}x{words}"


def list_rows(reports: Named) -> list[Row]:
    """Every run's files, float32 first; a dense model shared by several runs is listed once, before the first."""
    rows: list[Row] = []
    identities: set[tuple[object, ...]] = set()
    for name, report in reports.items():
        dense = report.dense
        if _identify(report) not in identities:
            rows.append(Row(name, "dense", dense, dense, report.metric))
            identities.add(_identify(report))
        rows.append(
            Row(name, report.pruned.precision, report.pruned, dense, report.metric, report.speedup, report.change)
        )
        for of in report.targets[2:]:
            measurement = replace(
                report.pruned,
                quality=of.quality,
                samples=of.samples,
                onnx_bytes=of.onnx_bytes,
                latency_ms=of.latency_ms,
                throughput=of.throughput,
                precision=of.precision,
            )
            rows.append(Row(name, of.precision, measurement, dense, report.metric, of.speedup, of.change))
    return rows


def _identify(report: Report) -> tuple[object, ...]:
    """A key that is equal for runs with the same dense model; the files themselves differ, as they describe the run."""
    recipe = report.recipe
    origin = (recipe.model, recipe.checkpoint, recipe.seed, report.weights)
    return (*origin, report.data, report.input_shape, report.dense.params, report.dense.quality)


def describe_runs(reports: Named) -> tuple[str, dict[str, str]]:
    """Settings that all runs share, in one line, and the settings that differ, by the name of the run."""
    parts = {name: list(_list_settings(report)) for name, report in reports.items()}
    first_parts, *other_parts = parts.values()
    common = [part for part in first_parts if all(part in parts_of_run for parts_of_run in other_parts)]
    differing = {
        name: ", ".join(part for part in of if part not in common or not other_parts) for name, of in parts.items()
    }
    return ", ".join(common) if other_parts else "", differing


def _list_settings(report: Report) -> Iterator[str]:
    """Texts on a run's settings: model, goal, scorer, repairs, and what is certified."""
    recipe = report.recipe
    yield recipe.model
    yield describe_goal(recipe, report.plan.unit)
    yield f"score {recipe.scorer}"
    yield f"repair {' + '.join(recipe.repair) or 'none'}"
    if report.certificate is not None:
        yield make_badge(report.certificate).title.lower()


def list_differences(reports: Named) -> tuple[str, ...]:
    """Sentences on why figures of these runs cannot be compared; empty if they can."""
    settings = {_describe_setting(report) for report in reports.values()}
    data = {(report.data.name, report.data.test, len(report.data.classes)) for report in reports.values()}
    datasets = [f"{name}, {test} samples of {classes} classes" for name, test, classes in sorted(data)]
    values = {"LATENCIES": sorted(settings), "ACCURACIES": datasets}
    return tuple(f"{quantity} CANNOT BE COMPARED: {'; '.join(of)}" for quantity, of in values.items() if len(of) > 1)


def _describe_setting(report: Report) -> str:
    """Everything besides the model that latency depends on, as one text."""
    threads, batch = report.environment.threads, report.pruned.batch_size
    return f"{describe_hardware(report)}, {report.provider.got}, {threads} CPU threads, batch {batch}"


def list_notes(reports: Named) -> tuple[str, ...]:
    """Notes for the page: what cannot be compared, then the runs' own, with the run's name unless all share the
    note.
    """
    notes_of_first = next(iter(reports.values())).notes
    common = [note.text for note in notes_of_first if all(note in of.notes for of in reports.values())]
    notes_of_one = [
        f"{name}: {note.text}" for name, of in reports.items() for note in of.notes if note.text not in common
    ]
    return (*list_differences(reports), *notes_of_one, *common)


def to_comparison_table(reports: Named) -> str:
    """Several runs as text for the terminal: under each run its files, 80 columns wide.

    It has no newline at the end.
    """
    rows = list_rows(reports)
    quality, change = _choose_titles(rows)
    cells = [_narrow(row, with_metric=quality == _MIXED) for row in rows]
    head, *lines = align([("", quality, f"{change} (95 %)", "size", "p50", "faster"), *cells])
    common, asked_for = describe_runs(reports)
    lines_of_runs = [f"all: {common}"] if common else []
    lines_of_runs.append(head)
    for name, report in reports.items():
        costs = f"{format_count(report.pruned.macs)} MACs, {format_count(report.pruned.params)} parameters"
        lines_of_run = [line for row, line in zip(rows, lines, strict=True) if row.run == name]
        lines_of_runs += [f"{name}: {'; '.join(filter(None, (asked_for[name], costs)))}", *lines_of_run]
    reading = f"{change}, faster: against the dense model, timed in turns with it in the same run"
    return "\n".join([*lines_of_runs, "", reading, *(f"note: {note}" for note in list_notes(reports))])


_MIXED = "quality"
"""Title of the column of values if runs have different metrics; each value then names its own."""


def _choose_titles(rows: Sequence[Row]) -> tuple[str, str]:
    """Titles for the columns of quality and its change: the metric and its unit, if all rows have the same."""
    metric, *other_metrics = {row.metric for row in rows}
    return (_MIXED, "change") if other_metrics else (metric.name, metric.change_unit or "change")


def _narrow(row: Row, *, with_metric: bool) -> tuple[str, ...]:
    of = row.of
    change = row.difference and f"{row.difference} ({row.interval})"
    name = f"  {row.precision}"
    return (
        name,
        row.quality if with_metric else row.metric.format(of.quality.value),
        change,
        format_bytes(of.onnx_bytes),
        format_milliseconds(of.latency_ms.p50),
        row.faster,
    )


def _make_wide(row: Row, report: Report, asked_for: str) -> Sequence[Cell]:
    """The cells of one row of the page: intervals below their values, settings below the run's name."""
    of, metric = row.of, row.metric
    name = _stack(row.run, asked_for) if of is report.pruned else f"{row.run}, {row.precision}"
    return (
        f"{report.recipe.model}, dense" if row.is_dense else name,
        TwoLineCell(row.quality, format_span(of.quality.low, of.quality.high, metric)),
        _stack(row.difference, row.interval),
        format_count(of.macs),
        format_count(of.params),
        format_bytes(of.onnx_bytes),
        format_milliseconds(of.latency_ms.p50),
        row.faster,
    )


def _stack(text: str, under: str) -> Cell:
    return TwoLineCell(text, under) if under else text


def to_comparison(reports: Named) -> str:
    """The page as one self-contained HTML file: table, figures, conditions, and commands to repeat every run."""
    common, asked_for = describe_runs(reports)
    return render(
        "comparison.html",
        title=f"{len(reports)} runs side by side" if len(reports) > 1 else next(iter(reports)),
        images=True,
        notes=list_notes(reports),
        head=HEAD,
        rows=[_make_wide(row, reports[row.run], asked_for[row.run]) for row in list_rows(reports)],
        common=common,
        pictures=[
            Picture.of(render_figure(figure, "svg"), "svg+xml", f"Accuracy against {cost_name}")
            for cost_name, figure in draw_tradeoffs(reports).items()
        ],
        conditions=[f"{name}: {describe_conditions(of)}" for name, of in reports.items()],
        commands=[format_command(report.recipe) for report in reports.values()],
    )
