"""What attribution costs, and how good an order of pruning it gives.

    python benchmarks/attribution.py [--quick] [--order MODEL ...]

Cost (attribution_cost.py): throughput and peak memory next to a plain gradient and to a sample-by-sample loop with
zennit; bf16 autocast. Order: units are masked globally, lowest score first, at 0, 5, ... 95 % of all units (PXP's A_PR:
the mean of top-1 over these rates), without repair and without a floor per layer, on models trained here.
The seed draws the score split (and the random scorer's scores); the test images are the same for all. Scores that have
one unit everywhere are ranked as they are, others after division by their group's mean; some both ways. With --order
other rows of the result file stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks.models

import attribution_cost as cost

from pxcompress.attribution import COMPOSITES
from pxcompress.data import load_splits, open_source
from pxcompress.graph import find_groups, mask_units
from pxcompress.models.loading import classifier_names
from pxcompress.planning.order import find_lowest
from pxcompress.recipe import Recipe
from pxcompress.scorers import SCORERS
from pxcompress.state import seeded
from pxcompress.types import Batches, Group, Scores
from pxcompress.workload import load_workload, with_baseline

MODELS = {
    "vgg": ("benchmarks.models:vgg_small", "glyphs"),
    "resnet": ("resnet10t", "glyphs"),
    "vit": ("benchmarks.models:vit_hybrid", "glyphs"),
}
"""Model and data."""

SMALL = {"glyphs": "glyphs:train=640,select=80,held_out=160"}
"""Data of `--quick`, where it is not the same."""

RATES = [percent / 100 for percent in range(0, 100, 5)]
SEEDS = (0, 1, 2)

PRESETS = tuple(f"lrp:composite={name}" for name in COMPOSITES)
SOFTMAX = tuple(
    f"lrp:composite={name}|softmax={rule}" for name in ("epsilon", "gamma", "pxp-vit") for rule in ("attn", "zplus")
)
RELATIVE = ("magnitude", "activation")
"""Scorers whose scores have no unit in common between groups."""

BOTH = ("lrp:composite=epsilon", "lrp-residual", "taylor", "integrated-gradients")
"""Ranked in both ways."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A model trained on its data, its groups, and the data: batches to score with by seed, and one test batch."""

    model: nn.Module
    groups: tuple[Group, ...]
    score: dict[int, Batches]
    inputs: Tensor
    labels: Tensor


def texts(name: str) -> list[str]:
    """Every registered scorer at its defaults and in its main variants, and lrp with every preset."""
    others = [text for text in SCORERS if text != "lrp"]
    variants = ["magnitude:p=1", "activation:statistic=mean"]
    return [*others, *variants, *PRESETS, *(SOFTMAX if name == "vit" else ())]


def train_model(name: str, seeds: Sequence[int], samples: int, tests: int, data: str) -> Trained:
    """The baseline of `name`, from the cache where it is kept."""
    recipe = Recipe(model=MODELS[name][0], ratio=0.5, data=data)
    with seeded(0):
        subject = with_baseline(load_workload(recipe), 0, lambda message: print(f"{name}: {message}", flush=True))
    source = open_source(data)
    limits = {"score": samples, "repair": 2, "select": 2, "certify": 2, "test": tests}
    preprocessing = subject.loaded.preprocessing
    splits = {seed: load_splits(source, preprocessing, seed=seed, limits=limits) for seed in seeds}
    test = list(splits[seeds[0]].test)
    model = subject.loaded.model
    groups = find_groups(model, subject.splits.example, classifier_names(model, subject.splits.example)).groups
    return Trained(
        model,
        groups,
        {seed: parts.score for seed, parts in splits.items()},
        torch.cat([inputs for inputs, _ in test]).to(memory_format=torch.channels_last),
        torch.cat([labels for _, labels in test]),
    )


def curve(subject: Trained, scores: Scores, normalise: str, rates: Sequence[float]) -> list[float]:
    """Top-1 on the test images at every rate."""
    points = []
    for rate in rates:
        twin = mask_units(subject.model, subject.groups, find_lowest(subject.groups, scores, rate, normalise))
        twin.to(memory_format=torch.channels_last)
        with torch.no_grad():
            points.append(float((twin(subject.inputs).argmax(1) == subject.labels).double().mean()))
    return points


def order(name: str, subject: Trained, rates: Sequence[float], scorers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row per scorer and way of ranking."""
    for text in scorers:
        relative = text.partition(":")[0] in RELATIVE
        ways = ("none", "mean") if text in BOTH else ("mean",) if relative else ("none",)
        curves: dict[str, list[list[float]]] = {way: [] for way in ways}
        for seed, batches in subject.score.items():
            with seeded(seed):
                scores = SCORERS.build(text)(subject.model, subject.groups, batches)
            for way in ways:
                curves[way].append(curve(subject, scores, way, rates))
        for way, curves_of_way in curves.items():
            areas = [statistics.fmean(points) for points in curves_of_way]
            row = {"part": "order", "model": name, "scorer": text, "normalise": way}
            row |= {"a_pr": areas, "mean": statistics.fmean(areas), "top1_by_rate": mean_curve(curves_of_way)}
            row |= {"sd": statistics.stdev(areas) if len(areas) > 1 else 0.0, "top1_dense": curves_of_way[0][0]}
            row |= {"rates": list(rates), "test_images": len(subject.labels), "units": units_of(subject)}
            print(f"{name} {text} ({way}): A_PR {row['mean']:.4f} +- {row['sd']:.4f}", flush=True)
            yield row


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(points) for points in zip(*curves, strict=True)]


def units_of(subject: Trained) -> int:
    return sum(group.units for group in subject.groups)


def order_claims(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """LRP against chance and integrated gradients: its best preset (chosen on the same images), and its default."""
    for name in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == name and row["normalise"] == "none"]
        mean = {row["scorer"]: row["mean"] for row in here}
        best = max((text for text in mean if text.startswith("lrp:")), key=lambda text: mean[text])
        for other in ("random", "integrated-gradients"):
            for text, word in ((best, "best of all presets"), ("lrp:composite=epsilon", "default")):
                statement = f"{MODELS[name][1]}, {name}: A_PR of {text} ({word}) - A_PR of {other}"
                yield common.claim(statement, mean[text] - mean[other], 0.0, "higher")


def measure_all(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of what is asked for: everything, or with --order the pruning order and autocast of those models."""
    quick = options.quick
    if not options.order:
        for model in cost.MIXED:
            yield from cost.speed(model, *((1, 1) if quick else (4, 4)))
        yield from cost.memory(("resnet50",) if quick else tuple(cost.MIXED), (32, 64) if quick else (32, 512))
    for name in options.order or MODELS:
        data = SMALL[MODELS[name][1]] if quick else MODELS[name][1]
        subject = train_model(name, SEEDS[:1] if quick else SEEDS, *((36, 60) if quick else (180, 300)), data)
        yield from cost.autocast(name, subject.model, subject.inputs[:32], [*cost.LEAST, "pxp-vit", "pxp-cnn"])
        yield from order(name, subject, RATES[::6] if quick else RATES, texts(name))


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--order", nargs="*", choices=list(MODELS), help="only the pruning order of these models")
    options = parser.parse_args()
    path = common.RESULTS / "attribution.json"
    rows = list(measure_all(options))
    anew = {(row["part"], row["model"]) for row in rows}
    if options.order and not options.quick:
        rows += [row for row in json.loads(path.read_text())["rows"] if (row["part"], row["model"]) not in anew]
    parts = {part: [row for row in rows if row["part"] == part] for part in CLAIMS}
    claims = [claim for part, make_claims in CLAIMS.items() for claim in make_claims(parts[part])]
    common.write("attribution", " ".join(["python", *sys.argv]), rows, SEEDS[:1] if options.quick else SEEDS, claims)


CLAIMS: Mapping[str, Callable[[Sequence[dict[str, Any]]], Iterator[dict[str, Any]]]] = {
    "speed": cost.speed_claims,
    "memory": cost.memory_claims,
    "autocast": cost.autocast_claims,
    "order": order_claims,
}
"""What is said of the rows of each part."""


if __name__ == "__main__":
    main()
