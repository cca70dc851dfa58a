"""What is left of accuracy without labels and without training: selections x repairs x sizes, on models for `glyphs`.

    python benchmarks/one_shot.py [--quick] [--model LABEL ...] [--part PART ...] [--selection NAME ...]

Top-1 by PyTorch on the test split; budget MACs, widths in steps of 4. A calibration seed draws the 512 images for
scoring and the 1024 for repair anew; the dense model stays. Rows that are not measured anew are kept from the result
file, so that models and parts can be measured one at a time. Torch-Pruning and onnxsim run from their own packages, on
the same models and data (`rivals.py`).
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import common
import models
import torch
from one_shot_claims import claims, figure
from one_shot_cost import LARGE, cost_row
from one_shot_rivals import rival_rows

from pxcompress.budgets import BUDGETS
from pxcompress.data import load_splits
from pxcompress.deploy.predictions import torch_quality
from pxcompress.errors import BudgetError
from pxcompress.graph import find_groups, prune
from pxcompress.models.loading import classifier_names
from pxcompress.recipe import Recipe
from pxcompress.repair import REPAIRS
from pxcompress.run import Run
from pxcompress.scorers import SCORERS
from pxcompress.stages import plan_at, prune_and_repair
from pxcompress.state import seeded
from pxcompress.tasks.classification import Classification
from pxcompress.types import Batches, Price, Pruned, ScoredModel
from pxcompress.workload import Workload, load_workload, with_baseline

SIZES = (0.7, 0.5, 0.35, 0.25)
"""Shares of the dense MACs that are left."""

PARTS = ("closed form", "planned", "refitted", "rivals", "tasks", "cost")
SELECTIONS = {
    "random": "random",
    "L2": "magnitude",
    "Taylor": "taylor",
    "WIFV": "activation",
    "S1 epsilon": "lrp",
    "S1 gamma": "lrp:composite=gamma",
    "S3": "lrp-residual:metric=inputs,follow=false",
    "OBS": "lrp-residual:metric=weights",
    "S4": "lrp-residual",
}
CHAINS = {
    "bare": (),
    "statistics": ("mean-absorption", "variance-matching", "batchnorm"),
    "fold": ("fold", "batchnorm"),
    "least squares": ("fold", "least-squares", "batchnorm"),
    "distilled": ("fold", "batchnorm", "finetune:batch_size=64"),
}
"""`statistics`: means, and variances by BatchNorm where there is BatchNorm, else matched."""

ALLOCATIONS = ("none", "cost", "uniform", "isomorphic")
SEEDS = (0, 1, 2)
REPEATED = ("random", "L2", "S1 epsilon", "OBS", "S4")
"""What the seeds after the first measure; the others lie further from each other than seeds do."""

QUICK_MODELS, QUICK_SELECTIONS = ("VGG",), ("random", "L2", "OBS", "S4")
IDENTITY = ("model", "seed", "size", "selection", "normalise", "importance", "scope", "repair", "names")
SHOWN = (*IDENTITY, "top1", "macs_ratio", "refused", "forward_passes", "memory_ratio")
TASKS = {"ResNet": (("2", "3", "4"), ("5", "6", "8"), ("A", "K", "X"), ("a", "e", "d"))}
IMAGES = {"score": 512, "repair": 1024}


@dataclass(frozen=True, eq=False)
class Bench:
    """One trained model with what its cuts need; `dense` is its top-1."""

    label: str
    workload: Workload
    scored: ScoredModel
    recipe: Recipe
    dense: float

    @property
    def test(self) -> Batches:
        """What top-1 is measured on."""
        return self.workload.splits.test


@dataclass(frozen=True)
class Work:
    """One plan and the repairs that are tried on it."""

    seed: int
    selection: str
    size: float
    repairs: tuple[str, ...]
    normalise: str = "mean"


def closed_form(sizes: Sequence[float], quick: bool) -> Iterator[Work]:
    """Every selection without least squares and training; other seeds and allocations where they are of interest."""
    for size in sizes:
        for name in QUICK_SELECTIONS if quick else SELECTIONS:
            yield Work(0, name, size, ("bare", "statistics", "fold"))
        for way in () if quick else ALLOCATIONS:
            yield Work(0, "S4", size, ("fold",), way)
        for seed, name in () if quick or size > 0.35 else itertools.product(SEEDS[1:], REPEATED):
            yield Work(seed, name, size, ("fold",))


def planned(sizes: Sequence[float], quick: bool) -> Iterator[Work]:
    """Widths by knapsack, as the default plans; other seeds of the default."""
    for size in sizes:
        for name in ("OBS", "S4") if quick or size > 0.5 else ("L2", "WIFV", "Taylor", "S3", "OBS", "S4"):
            yield Work(0, name, size, ("fold",), "knapsack")
        for seed, name in () if quick else itertools.product(SEEDS[1:], ("OBS", "S4") if size <= 0.35 else ("S4",)):
            yield Work(seed, name, size, ("fold",), "knapsack")


def refitted(sizes: Sequence[float], quick: bool) -> Iterator[Work]:
    """Least squares, as the default repairs, of every selection that may win; and distillation of what is smallest."""
    for size in sizes:
        trained = ("distilled",) if size < 0.35 and not quick else ()
        yield Work(0, "S4", size, ("least squares", *trained), "knapsack")
        if quick or size > 0.5:
            continue
        for seed in SEEDS[1:]:
            yield Work(seed, "S4", size, ("least squares",), "knapsack")
        for name in ("OBS", "S3") if size < 0.5 else ("OBS",):
            yield Work(0, name, size, ("least squares",), "knapsack")
        for name in ("random", "L2", "WIFV", "Taylor", "OBS") if size < 0.5 else ("random", "L2"):
            yield Work(0, name, size, ("least squares",))


def bench_of(label: str) -> Bench:
    """The trained model `label`, its groups and their prices."""
    workload = models.subject_of(label)
    model, example = workload.loaded.model, workload.splits.example
    recipe = Recipe(model=models.GLYPH_MODELS[label], ratio=0.5, data="glyphs", budget="macs", round_to=4)
    structure = find_groups(model, example, classifier_names(model, example))
    price = Price("macs", "MACs", BUDGETS.build("macs").meter(model, structure.groups, example))
    scored = ScoredModel(model, example, structure, {}, price, 0.5)
    return Bench(label, workload, scored, recipe, torch_quality(model, workload.splits.test, Classification()))


def calibration(bench: Bench, seed: int) -> dict[str, Batches]:
    """Unlabelled images of one draw; the labels that come with them are for Taylor and for the rivals."""
    drawn = load_splits(bench.workload.source, bench.workload.loaded.preprocessing, seed=seed, limits=IMAGES)
    return {"score": drawn.score, "repair": drawn.repair, "select": bench.workload.splits.select}


def our_rows(bench: Bench, work: Sequence[Work]) -> Iterator[dict[str, Any]]:
    """Rows of all `work`; a selection's scores are computed once a seed."""
    for seed, name in sorted({(each.seed, each.selection) for each in work}):
        parts = calibration(bench, seed)
        begin = time.perf_counter()
        with seeded(seed):
            scores = SCORERS.build(SELECTIONS[name])(bench.scored.model, bench.scored.structure.groups, parts["score"])
        scored, seconds = replace(bench.scored, scores=scores), time.perf_counter() - begin
        for each in work:
            if (each.seed, each.selection) == (seed, name):
                facts = {**asdict(each), "score_seconds": seconds}
                del facts["repairs"]
                yield from _chain_rows(bench, scored, parts, {chain: CHAINS[chain] for chain in each.repairs}, facts)


def _chain_rows(
    bench: Bench,
    scored: ScoredModel,
    parts: Mapping[str, Batches],
    chains: Mapping[str, Sequence[str]],
    facts: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    recipe = bench.recipe.but(normalise=facts["normalise"])
    row = {"model": bench.label, "dense": bench.dense, **facts}
    try:
        plan = plan_at(scored, 1 - facts["size"], recipe)
    except BudgetError as error:
        yield {**row, "refused": str(error)}
        return
    bare = prune(scored.model, scored.structure.groups, plan)
    for chain, repairs in chains.items():
        begin = time.perf_counter()
        with seeded(facts["seed"]):
            repaired = _repaired(replace(bare, model=copy.deepcopy(bare.model)), repairs, parts)
        spent = time.perf_counter() - begin
        top1 = torch_quality(repaired.model, bench.test, Classification())
        cost = {"macs_ratio": plan.cost_planned / plan.cost_dense, "repair_seconds": spent}
        yield {**row, "repair": chain, "top1": top1, **cost}


def _repaired(pruned: Pruned, repairs: Sequence[str], parts: Mapping[str, Batches]) -> Pruned:
    for text in repairs:
        pruned = REPAIRS.build(text)(pruned, parts["repair"], parts["select"])
    return pruned


def task_row(bench: Bench, classes: Sequence[str], units: float) -> dict[str, Any]:
    """The model restricted to a few classes, with the share `units` of its units gone; nothing is trained."""
    recipe = Recipe(
        model=bench.recipe.model,
        ratio=units,
        budget="channels",
        data="glyphs",
        classes=tuple(classes),
        round_to=1,
        min_keep=0.02,
        repair=("closed-form",),
    )
    task = with_baseline(load_workload(recipe), recipe.seed, print)
    model, splits = task.loaded.model, task.splits
    with seeded(0):
        slim = prune_and_repair(model, splits.example, Run(recipe, splits.parts).without_progress())
    plan = slim.pruned.plan
    return {
        "model": bench.label,
        "classes": len(classes),
        "names": classes,
        "units_removed": 1 - plan.cost_planned / plan.cost_dense,
        "dense_on_task": torch_quality(model, splits.test, Classification()),
        "top1": torch_quality(slim.pruned.model, splits.test, Classification()),
    }


def rows_of(label: str, parts: Sequence[str], selections: Collection[str], quick: bool) -> list[dict[str, Any]]:
    """All rows of one model in `parts` of the table, ours for `selections`; of a large one only what it costs."""
    if label in LARGE:
        return list(_shown(iter([cost_row(label)]))) if "cost" in parts else []
    bench = bench_of(label)
    print(f"{label}: dense {bench.dense:.1%}", flush=True)
    sizes = (0.5, 0.25) if quick else SIZES
    every = (each for part in parts if part in WORK for each in WORK[part](sizes, quick))
    work = [each for each in every if each.selection in selections]
    rows = list(_shown(our_rows(bench, work)))
    if "rivals" in parts:
        rows += _shown(rival_rows(label, bench.workload, sizes, quick=quick))
    if "tasks" in parts and not quick:
        rows += _shown(task_row(bench, classes, 0.75) for classes in TASKS.get(label, ()))
    if "cost" in parts:
        rows += _shown(iter([cost_row(label)]))
    return rows


def _shown(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        print(" ".join(f"{row[key]}" for key in SHOWN if key in row), flush=True)
        yield row


WORK = {"closed form": closed_form, "planned": planned, "refitted": refitted}


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--model", action="append", choices=(*models.GLYPH_MODELS, *LARGE), help="only this one")
    parser.add_argument("--selection", action="append", choices=SELECTIONS, help="only this one, of our rows")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part of the table")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0: as it chooses")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    new_rows = []
    for label in options.model or (QUICK_MODELS if options.quick else (*models.GLYPH_MODELS, *LARGE)):
        new_rows += rows_of(label, options.part or PARTS, options.selection or SELECTIONS, options.quick)
    path = common.RESULTS / ("quick/one_shot.json" if options.quick else "one_shot.json")
    earlier_rows = json.loads(path.read_text())["rows"] if path.exists() and not options.quick else []
    measured = {_key(row) for row in new_rows}
    rows = [row for row in earlier_rows if _key(row) not in measured] + new_rows
    command = "python benchmarks/one_shot.py" + (" --quick" if options.quick else "")
    figure(rows, common.write("one_shot", command, rows, SEEDS, claims(rows)).with_suffix(".svg"))


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in IDENTITY)


if __name__ == "__main__":
    main()
