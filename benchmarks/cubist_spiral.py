"""How far the pruner is from the best possible: the cubist spiral, whose smallest networks are known.

    python benchmarks/cubist_spiral.py [--quick] [--seeds 0,1] [--part PART] [--selection NAME ...] [--repair NAME ...]

ReLU MLPs with three hidden layers of the same width are trained on the data `spiral`, then pruned step by step, units
of all layers in one ranking, until accuracy is lost. Rows: starting width x selection x repair x seed, with the
smallest hidden widths, and the number of non-zero parameters, that kept 95 % and 99.5 % of the points (every fifth of
the 50 000; the paper's train and test set are the same, and scores and repairs see some of them). Fine-tuning is
short: `TUNE`, and only after a step that the fold alone does not hold at 99.5 %. Two other rows hold the
smallest widths known from "Sparsest Models Elude Pruning" and those of a search of our own (`spiral_search.py`).
What the result file already holds is not measured again: remove it to start anew.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from spiral_search import KNOWN, LEVELS, search
from torch import Tensor, nn

from pxcompress import Recipe
from pxcompress.data import load_splits, open_source, training_batches
from pxcompress.demo.baseline import Problem, train_baseline
from pxcompress.demo.nets import MLP
from pxcompress.demo.spiral import spiral_arrays
from pxcompress.errors import BudgetError
from pxcompress.preparation import prepare
from pxcompress.repair import REPAIRS
from pxcompress.run import Run
from pxcompress.stages import cut, cut_further, plan_at, score
from pxcompress.state import seeded
from pxcompress.types import Preprocessing, PruneResult, ScoredModel, Splits

SELECTIONS: Mapping[str, Mapping[str, str]] = {
    "S4": {"scorer": "lrp-residual"},
    "magnitude": {"scorer": "magnitude"},
    "OBS": {"scorer": "lrp-residual:metric=weights"},
    "random": {"scorer": "random"},
    "Taylor": {"scorer": "taylor"},
    "LRP": {"scorer": "lrp"},
}
REPAIRED: Mapping[str, tuple[str, ...]] = {"fold + tuning": ("fold",), "fold": ("fold",), "none": ()}
CELL = ("seed", "repair", "selection", "width")
"""What tells one path from another."""

DEFAULT = {"selection": "S4", "repair": "fold + tuning"}

TUNE = "finetune:labels=true,steps=150,batch_size=256,learning_rate=0.005,temperature=1"
WIDTHS = (16, 32, 64, 128, 256)
STEP = 0.15
"""Share of the hidden units that are left which go in one step; at least one."""

PATIENCE = 3
"""Steps in a row without any level after which a path ends."""


def train_mlp(width: int, splits: Splits, seed: int) -> nn.Module:
    """The dense MLP, trained or read from the cache."""
    with seeded(seed):
        model = MLP((2, width, width, width, 2))
    batches = training_batches(open_source("spiral"), Preprocessing((2,)), batch_size=64, seed=seed)
    train_baseline(model, Problem(batches, splits.select), key=f"spiral-{width}-{seed}", seed=seed, note=print)
    return model.eval()


def accuracy(model: nn.Module, points: Tensor, labels: Tensor) -> float:
    """Share of the points on the right side."""
    with torch.no_grad():
        return float((model(points).argmax(1) == labels).double().mean())


def widths_of(model: nn.Module) -> tuple[int, ...]:
    """Of the hidden layers."""
    return tuple(layer.out_features for layer in model if isinstance(layer, nn.Linear))[:-1]


def nonzero(model: nn.Module) -> int:
    """Parameters that are not zero, biases too."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def disconnected(model: nn.Module) -> int:
    """Hidden units that nothing comes into, or that nothing reads."""
    layers = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    return sum(int((~into.any(1) | ~out.any(0)).sum()) for into, out in itertools.pairwise(layers))


def steps(scored: ScoredModel, run: Run) -> Iterator[PruneResult]:
    """Ever smaller models, each cut from the one before it."""
    total = left = sum(group.units for group in scored.structure.groups)
    slim: PruneResult | None = None
    while left > len(scored.structure.groups):
        ratio = 1 - (left - max(1, int(STEP * left))) / total
        try:
            if slim is None:
                slim = cut(scored, plan_at(scored, ratio, run.recipe), run)
            else:
                slim = cut_further(scored, slim, ratio, run)
        except BudgetError:  # only a unit for each layer is left
            return
        left = sum(widths_of(slim.pruned.model))
        yield slim


def path(model: nn.Module, splits: Splits, cell: Mapping[str, Any]) -> dict[str, Any]:
    """One row: the smallest models on one path that keep each level of accuracy."""
    points, labels = (torch.from_numpy(array[::5]) for array in spiral_arrays())
    recipe = Recipe(
        model="MLP", ratio=0.1, budget="channels", round_to=1, min_keep=0.0, repair=REPAIRED[cell["repair"]],
        seed=cell["seed"], **SELECTIONS[cell["selection"]],
    )  # fmt: skip
    start, dense = time.perf_counter(), accuracy(model, points, labels)
    row: dict[str, Any] = {**cell, "dense": dense, "disconnected": 0}
    row |= {str(level): _size(model, dense) for level in LEVELS if dense >= level}
    with seeded(cell["seed"]):
        run = Run(recipe, splits.parts).without_progress()
        prepared, run = prepare(model, splits.example, run)
        scored = score(prepared, run)
        lost = 0
        for slim in steps(scored, run):
            reached = accuracy(slim.pruned.model, points, labels)
            if cell["repair"] == "fold + tuning" and reached < max(LEVELS):
                REPAIRS.build(TUNE)(slim.pruned, splits.repair)
                reached = accuracy(slim.pruned.model, points, labels)
            row["disconnected"] += disconnected(slim.pruned.model)
            row |= {str(level): _size(slim.pruned.model, reached) for level in LEVELS if reached >= level}
            lost = lost + 1 if reached < min(LEVELS) else 0
            if lost == PATIENCE:
                break
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def _size(model: nn.Module, reached: float) -> dict[str, Any]:
    widths = widths_of(model)
    return {"widths": widths, "units": sum(widths), "nonzero": nonzero(model), "accuracy": reached}


def units(rows: Sequence[Mapping[str, Any]], level: float, **wanted: Any) -> float:
    """Median over seeds of the fewest hidden units at `level`; NaN where a model never had it."""
    here = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    widths_found = [row[str(level)]["units"] for row in here if str(level) in row]
    return statistics.median(widths_found) if widths_found and len(widths_found) == len(here) else float("nan")


def claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The targets of the issue, for the default selection and repair."""
    paths = [row for row in rows if "width" in row]
    widths = sorted({row["width"] for row in paths})
    if not widths:
        return []
    claims_made = []
    for level in LEVELS:
        fewest = sum(KNOWN[level])
        for width in widths:
            if width >= 64:
                statement = (
                    f"{level:.1%} from width {width}, default: hidden units next to the smallest known ({fewest})"
                )
                claims_made.append(
                    common.claim(statement, units(paths, level, width=width, **DEFAULT) / fewest, 2.0, "lower")
                )
        ends = [units(paths, level, width=width, **DEFAULT) for width in (widths[0], widths[-1])]
        statement = f"{level:.1%}, default: rise of the hidden units from width {widths[0]} to {widths[-1]}"
        claims_made.append(common.claim(statement, ends[1] / ends[0] - 1, 0.5, "lower"))
    statement = "disconnected hidden units in all models of all paths"
    return [*claims_made, common.claim(statement, sum(row["disconnected"] for row in paths), 0, "equal")]


def figure(rows: Sequence[Mapping[str, Any]], place: Path) -> None:
    """Hidden units over the smallest known against the starting width: a panel a level, a curve a method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    paths = [row for row in rows if "width" in row]
    widths = sorted({row["width"] for row in paths})
    methods = [(selection, "fold + tuning") for selection in SELECTIONS] + [("S4", "fold"), ("magnitude", "none")]
    _, panels = pyplot.subplots(1, len(LEVELS), figsize=(8, 3.4), sharey=True)
    for axes, level in zip(panels, LEVELS, strict=True):
        for selection, repair in methods:
            values = [units(paths, level, width=width, selection=selection, repair=repair) for width in widths]
            dashes = "-" if repair == "fold + tuning" else ":"
            ratios = [value / sum(KNOWN[level]) for value in values]
            if all(ratio != ratio for ratio in ratios):  # not measured
                continue
            axes.plot(widths, ratios, dashes, marker="o", markersize=3, label=f"{selection}, {repair}")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(title=f"{level:.1%} of the points", xlabel="starting width", xscale="log", yscale="log")
        axes.minorticks_off()
        axes.set_xticks(widths, [str(width) for width in widths])
    panels[0].set_ylabel("hidden units / smallest known")
    panels[-1].legend(fontsize=6)
    pyplot.tight_layout()
    pyplot.savefig(place, metadata={"Date": None})


def main() -> None:
    """Measure what is not in the result yet; write it, and the figure beside it, after each method."""
    parser = common.parser("Prune MLPs on the cubist spiral, next to the smallest that are known.")
    parser.add_argument("--seeds", default="0", help="of training and pruning, with commas")
    parser.add_argument("--part", choices=("all", "paths", "search"), default="all", help="what is measured")
    parser.add_argument("--selection", action="append", choices=tuple(SELECTIONS), help="only this one")
    parser.add_argument("--repair", action="append", choices=tuple(REPAIRED), help="only this one")
    options = parser.parse_args()
    place = common.RESULTS / ("quick/cubist_spiral.json" if options.quick else "cubist_spiral.json")
    rows: list[dict[str, Any]] = json.loads(place.read_text())["rows"] if place.exists() else []
    cells = {tuple(row[key] for key in CELL) for row in rows if "width" in row}
    if options.part != "paths":
        rows = [row for row in rows if row["selection"] != "search"]
        rows.append({"selection": "search", **search(quick=options.quick)})
        save(rows, options.quick)
    if options.part == "search":
        return
    splits = load_splits(open_source("spiral"), Preprocessing((2,)), batch_size=256, limits={"repair": 4096})
    widths = (16, 64) if options.quick else WIDTHS
    seeds = [int(text) for text in options.seeds.split(",")]
    methods = itertools.product(seeds, options.repair or REPAIRED, options.selection or SELECTIONS)
    for seed, repair, selection in methods:
        for width in widths:
            if (seed, repair, selection, width) not in cells:
                cell = {"seed": seed, "repair": repair, "selection": selection, "width": width}
                rows.append(path(train_mlp(width, splits, seed), splits, cell))
        save(rows, options.quick)


def save(rows: Sequence[Mapping[str, Any]], quick: bool) -> None:
    """Write the rows that there are, with the claims, and the figure."""
    smallest_known = {str(level): {"widths": KNOWN[level], "units": sum(KNOWN[level])} for level in LEVELS}
    seeds = sorted({row["seed"] for row in rows if "seed" in row})
    command = f"python benchmarks/cubist_spiral.py --seeds {','.join(map(str, seeds))}{' --quick' * quick}"
    listed = [{"selection": "known", **smallest_known}, *(row for row in rows if row["selection"] != "known")]
    place = common.write("cubist_spiral", command, listed, seeds, claims(rows))
    if seeds:
        figure(rows, place.with_suffix(".svg"))


if __name__ == "__main__":
    main()
