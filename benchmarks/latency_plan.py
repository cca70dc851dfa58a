"""Does a latency budget keep its word, and is a plan in milliseconds better than one in MACs?

    python benchmarks/latency_plan.py [--quick] [--part PART ...] [--threads N]

`planned`: 224 pixel models with random weights (latency does not depend on them), three speed-ups; what the table of
operators foresees against what the exported file takes, in every turn of the closed loop. `half`: measured speed-up at
half the MACs, batch 16. `equal`: models trained on `glyphs`, a latency plan and a MACs plan fitted to the same measured
milliseconds, top-1 after the default repair. `growth`: seconds of planning against the number of units.
Parts that are not measured anew are kept from the result file.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import matplotlib.pyplot as plt
import models
import numpy as np
import timm
import torch
from torch import nn

from pxcompress.budgets import BUDGETS
from pxcompress.budgets.latency import Latency
from pxcompress.clock import Clock
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.predictions import torch_quality
from pxcompress.graph import find_groups, prune
from pxcompress.models.loading import classifier_names
from pxcompress.pipeline import with_measured_alignment
from pxcompress.planning.fit import choose_attempt, fit_to_file
from pxcompress.planning.limits import Limits
from pxcompress.planning.plan import make_plan
from pxcompress.recipe import Bench, Recipe
from pxcompress.run import Run
from pxcompress.scorers import SCORERS
from pxcompress.stages import cut, plan_at
from pxcompress.state import seeded
from pxcompress.tasks.classification import Classification
from pxcompress.types import Group, Price, ScoredModel

BIG = ("resnet50", "mobilenetv2_100", "vit_small_patch16_224")
SPEEDUPS = (1.5, 2.0, 3.0)
SMALL = ("ResNet", "MobileNet", "ViT")
UNITS = (1_000, 3_000, 10_000, 30_000, 100_000)

Row = dict[str, Any]


def scored_of(model: nn.Module, example: torch.Tensor, budget: Any, scorer: str, batches: Any) -> ScoredModel:
    """A model with scores and prices."""
    structure = find_groups(model, example, classifier_names(model, example))
    price = Price(BUDGETS.text(budget), budget.unit, budget.meter(model, structure.groups, example))
    with seeded(0):
        scores = SCORERS.build(scorer)(model, structure.groups, batches)
    return ScoredModel(model, example, structure, scores, price, 0.5)


def big(name: str, budget: Any) -> ScoredModel:
    """A 224 pixel model with random weights."""
    with seeded(0):
        model = timm.create_model(name, num_classes=1000).eval()
        example = torch.randn(1, 3, 224, 224)
    return scored_of(model, example, budget, "magnitude", [])


def planned(threads: int, quick: bool) -> Iterator[Row]:
    for name in BIG[1:2] if quick else BIG:
        budget = Latency(threads=threads)
        begin = time.perf_counter()
        scored = big(name, budget)
        seconds = time.perf_counter() - begin
        for speedup in SPEEDUPS[1:2] if quick else SPEEDUPS:
            recipe = with_measured_alignment(Recipe(name, speedup=speedup, bench=Bench(threads=threads)), Clock(print))
            here = replace(scored, ratio=1 - 1 / speedup)
            _, attempts = fit_to_file(
                here, lambda ratio, here=here, recipe=recipe: plan_at(here, ratio, recipe), budget
            )
            last = attempts[choose_attempt(attempts, budget.tolerance) or 0]
            yield {
                "model": name,
                "speedup": speedup,
                "table_seconds": seconds,
                "attempts": [{"planned": a.planned, "measured": a.measured, "allowed": a.allowed} for a in attempts],
                "error_first": attempts[0].planned / attempts[0].measured - 1,
                "error_last": last.planned / last.measured - 1,
                "measured_over_allowed": last.measured / last.allowed,
            }


def half(threads: int, quick: bool) -> Iterator[Row]:
    for name in () if quick else ("resnet50",):
        macs, clock = BUDGETS.build("macs"), Latency(batch_size=16, threads=threads)
        scored = big(name, macs)
        plan = plan_at(scored, 0.5, Recipe(name, ratio=0.5, budget="macs"))
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / "dense.onnx", Path(folder) / "slim.onnx"]
            slim = prune(scored.model, scored.structure.groups, plan).model
            for model, path in zip((scored.model, slim), files, strict=True):
                export_onnx(model, scored.example, path, {})
            dense, pruned = clock.measure_files(files, scored.example)
        macs_ratio = plan.cost_dense / plan.cost_planned
        yield {"model": name, "batch_size": 16, "macs_ratio": macs_ratio, "speedup": dense / pruned}


def equal(threads: int, quick: bool, batch_size: int = 16) -> Iterator[Row]:
    for label in SMALL[:1] if quick else SMALL:
        subject = models.subject_of(label)
        model, splits = subject.loaded.model, subject.splits
        clock = Latency(batch_size=batch_size, threads=threads)
        parts = {"score": splits.score, "repair": splits.repair}
        by_latency = scored_of(model, splits.example, clock, "lrp-residual", splits.score)
        macs = Price("macs", "MACs", BUDGETS.build("macs").meter(model, by_latency.structure.groups, splits.example))
        for speedup in (2.0,) if quick else (2.0, 3.0):
            for way, scored in (("latency", by_latency), ("macs", replace(by_latency, price=macs))):
                recipe = Recipe(
                    models.GLYPH_MODELS[label],
                    ratio=0.5,
                    data="glyphs",
                    budget=way,
                    round_to=4,
                    repair=("closed-form",),
                )
                here = replace(scored, ratio=1 - 1 / speedup)

                def at(ratio: float, here: ScoredModel = here, recipe: Recipe = recipe) -> Any:
                    return plan_at(here, ratio, recipe)

                plan, attempts = fit_to_file(here, at, clock)
                with seeded(0):
                    slim = cut(here, plan, Run(recipe, parts).without_progress())
                chosen = attempts[choose_attempt(attempts, clock.tolerance) or 0]
                yield {
                    "model": label,
                    "speedup": speedup,
                    "plan": way,
                    "measured_over_allowed": chosen.measured / chosen.allowed,
                    "macs_left": macs({g.name: len(plan.kept(g)) for g in scored.structure.groups}) / macs({}),
                    "top1": torch_quality(slim.pruned.model, splits.test, Classification()),
                    "dense": torch_quality(model, splits.test, Classification()),
                }


def growth(threads: int, quick: bool) -> Iterator[Row]:
    """Fifty layers in a row, each with its share of the units."""
    for units in UNITS[:3] if quick else UNITS:
        groups = [Group(str(number), "channel", units // 50, ()) for number in range(50)]
        scores = {group.name: torch.rand(group.units) for group in groups}

        def chain(kept_units: Mapping[str, int], groups: Sequence[Group] = groups) -> float:
            widths = [3, *(kept_units.get(group.name, group.units) for group in groups), 10]
            return float(sum(a * b for a, b in itertools.pairwise(widths)))

        for way in ("mean", "knapsack"):
            begin = time.perf_counter()
            make_plan(groups, scores, Price("macs", "MACs", chain), 0.5, Limits(way, 8, 0.1))
            yield {"units": units, "plan": way, "seconds": time.perf_counter() - begin}


PARTS: Mapping[str, Callable[[int, bool], Iterator[Row]]] = {
    "planned": planned,
    "half": half,
    "equal": equal,
    "growth": growth,
}


def claims(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for row in (row for row in rows if row["part"] == "planned"):
        statement = f"{row['model']}, {row['speedup']}x asked for: |planned / measured - 1| of the plan that was taken"
        yield common.claim(statement, abs(row["error_last"]), 0.1, "lower")
    for row in (row for row in rows if row["part"] == "half"):
        statement = f"{row['model']}, batch {row['batch_size']}, half the MACs: measured speed-up / MACs ratio"
        yield common.claim(statement, row["speedup"] / row["macs_ratio"], 0.85, "higher")
    top1 = {(r["model"], r["speedup"], r["plan"]): 100 * r["top1"] for r in rows if r["part"] == "equal"}
    for (label, speedup, plan), value in top1.items():
        if plan == "latency":
            statement = f"{label} at {speedup}x measured: points by which the latency plan beats the MACs plan"
            yield common.claim(statement, value - top1[label, speedup, "macs"], 0.0, "higher")
    for way in ("mean", "knapsack"):
        times = [(row["units"], row["seconds"]) for row in rows if row["part"] == "growth" and row["plan"] == way]
        if len(times) > 1:
            units, seconds = np.array(times, float).T
            slope = float(np.polyfit(np.log(units * np.log(units)), np.log(seconds), 1)[0])
            yield common.claim(f"planning by {way}: exponent of the seconds over n log n units", slope, 1.05, "lower")


def growth_figure(rows: Sequence[Row], path: Path) -> None:
    """Seconds of planning against the number of units, and what n log n would be from the largest number down."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for way in ("mean", "knapsack"):
        here = [(row["units"], row["seconds"]) for row in rows if row["part"] == "growth" and row["plan"] == way]
        if not here:
            continue
        units, seconds = np.array(sorted(here), float).T
        (line,) = axes.loglog(units, seconds, marker="o", label=f"planning by {way}")
        bound = units * np.log(units)
        axes.loglog(units, seconds[-1] * bound / bound[-1], "--", color=line.get_color(), label="n log n")
    axes.set(xlabel="units", ylabel="seconds")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0: all physical cores")
    options = parser.parse_args()
    rows = []
    for part in options.part or PARTS:
        for row in PARTS[part](options.threads, options.quick):
            print(part, row, flush=True)
            rows.append({"part": part, "threads": options.threads, **row})
    path = common.RESULTS / "latency_plan.json"
    if options.part and not options.quick and path.exists():
        rows += [row for row in json.loads(path.read_text())["rows"] if row["part"] not in options.part]
    written = common.write("latency_plan", " ".join(["python", *sys.argv]), rows, [0], list(claims(rows)))
    growth_figure(rows, written.with_suffix(".svg"))


if __name__ == "__main__":
    main()
