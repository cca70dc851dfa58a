"""Prunes at many ratios after one scoring, to show what each costs and keeps."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pxcompress.clock import Clock
from pxcompress.columns import align
from pxcompress.cost.count import count_macs, count_params
from pxcompress.deploy.environment import environment
from pxcompress.deploy.runtime import check_provider
from pxcompress.errors import BudgetError, InputError
from pxcompress.graph import restore_layer_norms
from pxcompress.notes import Note
from pxcompress.pipeline import open_run, with_measured_alignment
from pxcompress.proof import Metric
from pxcompress.recipe import Bench, Recipe
from pxcompress.recipe.goal import MEASURED_STEP
from pxcompress.run import Run
from pxcompress.run_folder.names import RECIPE
from pxcompress.run_folder.place import check_place, whole_folder
from pxcompress.stages import cut, plan_at, quality_on_select, score
from pxcompress.state import seeded
from pxcompress.tasks.agreement import Agreement
from pxcompress.types import ScoredModel


@dataclass(frozen=True)
class Point:
    """The result at one ratio: what is left of the dense cost (in the budget's unit), parameters and MACs, and the
    quality.

    Quality is PyTorch's on the select split, by the task's metric: the test split stays unseen until a ratio is chosen.
    `ratio` 0 is the dense model.
    """

    ratio: float
    cost: float
    params: float
    macs: float
    quality: float


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, the dense model first, the number of samples for quality, and ratios that cannot be
    reached.
    """

    recipe: Recipe
    unit: str
    metric: Metric
    points: tuple[Point, ...]
    samples: int
    unreachable: tuple[float, ...]
    folder: Path


def sweep(
    recipe: Recipe, ratios: Sequence[float], out: Path | None = None, *, force: bool = False, note: Note
) -> Sweep:
    """Score once, prune the dense model at every ratio, and repair; writes sweep.json, .csv and .svg to `out`.

    The recipe's own ratio does not count. Raises `InputError` for ratios outside (0, 1), `BudgetError` where none can
    be reached.
    """
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise InputError(f"ratios has {ratio}; expected shares between 0 and 1 with commas, such as 0.3,0.5,0.7")
    _check_bench(recipe)
    clock = Clock(note)
    recipe = with_measured_alignment(recipe.but(ratio=min(ratios)), clock)
    place = out or Path("exported") / f"{recipe.stem}-sweep"
    check_place(place, force)
    with seeded(recipe.seed), whole_folder(place, force) as folder:
        workload, run = open_run(recipe, clock)
        scored = score(workload.loaded.model, workload.splits.example, run)
        points = tuple(_measure_points(scored, sorted(set(ratios)), run))
        unreachable = tuple(sorted(set(ratios) - {point.ratio for point in points}))
        result = Sweep(
            recipe,
            scored.price.unit,
            workload.task.metric,
            points,
            len(workload.splits.ids["select"]),
            unreachable,
            place,
        )
        (folder / RECIPE).write_text(recipe.to_json(), encoding="utf-8")
        (folder / "sweep.json").write_text(to_json(result), encoding="utf-8")
        (folder / "sweep.csv").write_text(to_csv(result), encoding="utf-8")
        draw(result, folder / "sweep.svg")
    return result


def _check_bench(recipe: Recipe) -> None:
    """Raise `InputError` for options on latency that have no effect, or cannot be met on this machine."""
    if recipe.bench != Bench() and not recipe.budget.startswith("latency") and recipe.round_to != MEASURED_STEP:
        raise InputError(
            f"--provider, --batch-size and --threads say how milliseconds are measured, and budget {recipe.budget!r} "
            "has none; give --budget latency, or leave them out"
        )
    check_provider(recipe.bench.provider)


def _measure_points(scored: ScoredModel, ratios: Sequence[float], run: Run) -> Iterator[Point]:
    params, macs = count_params(scored.model), count_macs(scored.model, scored.example)
    task = run.task or Agreement()
    yield Point(0.0, 1.0, 1.0, 1.0, quality_on_select(scored.model, scored.model, run, task))
    for ratio in ratios:
        try:
            plan = plan_at(scored, ratio, run.recipe)
        except BudgetError:
            return  # nor is any larger one reached
        with run.clock.stage(f"ratio {ratio:g}"):
            pruned = restore_layer_norms(cut(scored, plan, run.without_progress()).pruned)
        model = pruned.model
        value = quality_on_select(model, scored.model, run, task)
        run.clock.quality(task.metric, value)
        cost = pruned.plan.cost_planned / plan.cost_dense  # dead paths may have gone as well
        yield Point(ratio, cost, count_params(model) / params, count_macs(model, scored.example) / macs, value)


def to_json(result: Sweep) -> str:
    """The text of sweep.json: recipe, environment and points."""
    content = {
        "schema_version": 1,
        "recipe": json.loads(result.recipe.to_json()),
        "environment": dataclasses.asdict(environment()),
        "unit": result.unit,
        "metric": dataclasses.asdict(result.metric),
        "samples": result.samples,
        "unreachable": result.unreachable,
        "points": [dataclasses.asdict(point) for point in result.points],
    }
    return json.dumps(content, indent=1)


def to_csv(result: Sweep) -> str:
    """The text of sweep.csv: a line for every point."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(point) for point in result.points)
    return text.getvalue()


def to_table(result: Sweep) -> str:
    """The points as text for a terminal."""
    rows = [("ratio", f"{result.unit} left", "parameters", "MACs", result.metric.name)]
    for point in result.points:
        shares = f"{point.cost:.1%}", f"{point.params:.1%}", f"{point.macs:.1%}"
        rows.append((f"{point.ratio:.2f}", *shares, result.metric.format(point.quality)))
    lines = align(rows, ">>>>>")
    lines += ["", f"{result.metric.name} on {result.samples} samples of the select split; no model was exported"]
    lines.append(f"as picture, JSON and CSV: {result.folder}")
    if result.unreachable:
        lines.append(f"no plan reaches ratio {', '.join(f'{ratio:g}' for ratio in result.unreachable)}")
    return "\n".join(lines)


def draw(result: Sweep, path: Path) -> None:
    """Draw quality against the remaining cost as an SVG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    share = result.metric.unit == "share"
    values = [point.quality * (100 if share else 1) for point in result.points]
    axes.plot([point.cost for point in result.points], values, marker="o")
    axes.axhline(values[0], color="grey", linewidth=0.8, label="dense")
    axes.set(
        xlabel=f"{result.unit} left, share of the dense model's",
        ylabel=f"{result.metric.name}{', %' if share else ''}",
        title=result.recipe.model,
    )
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
