"""Narrower residual streams: top-1 and milliseconds of a ViT with and without directions among what may go.

    python benchmarks/narrower.py [--quick] [--part energy] [--part widths]

The ViT is one whose MLPs matter: trained twice as long as the others, on glyphs. Top-1 by PyTorch on the test split,
default options, no labels, no training; milliseconds of the exported files, timed in turns on one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import common
import torch
from torch import Tensor, nn

from pxcompress.clock import Clock
from pxcompress.cost.count import count_macs
from pxcompress.cost.latency import Conditions, measure_files
from pxcompress.data import training_batches
from pxcompress.demo.baseline import Problem, baseline_key, train_baseline
from pxcompress.demo.losses import ClassLoss
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.predictions import torch_quality
from pxcompress.directions import find_directions, measure_streams
from pxcompress.graph import find_groups, make_rotatable, restore_layer_norms
from pxcompress.models.loading import classifier_names
from pxcompress.notes import silent
from pxcompress.recipe import ModelAndData, Recipe
from pxcompress.run import Run
from pxcompress.stages import cut, plan_at, score
from pxcompress.state import evaluating, seeded
from pxcompress.tasks.classification import Classification
from pxcompress.types import OpenAxes, PruneResult
from pxcompress.workload import Workload, load_workload

MODEL = "benchmarks.models:vit_deep"
STREAM = "patch_embed.proj"
SIZES = (0.35, 0.25)
"""Shares of the dense MACs that are left."""
SHARES = (0.75, 0.5, 0.375, 0.25)
"""Shares of the directions that are left."""
GAINS = {0.35: 1.0, 0.25: 2.0}
"""Points of top-1 that directions have to bring, by the share of the MACs that is left."""
WAYS: dict[str, dict[str, Any]] = {"heads and neurons": {"keep": (STREAM,)}, "directions too": {}}


class LongLoss(ClassLoss):
    """For twice as many epochs."""

    duration: ClassVar[float] = 2.0


@dataclass(frozen=True, eq=False)
class Subject:
    """The trained ViT with its data; `dense` and `without_mlps` are shares of the test images."""

    workload: Workload
    dense: float
    without_mlps: float


def subject() -> Subject:
    """The ViT, trained here or read from the cache."""
    workload = load_workload(ModelAndData(MODEL, data="glyphs"))
    loaded, splits = workload.loaded, workload.splits
    training = training_batches(workload.source, loaded.preprocessing, batch_size=64, seed=0)
    key = baseline_key(loaded.architecture, "glyphs, twice as long", loaded.preprocessing, 0)
    train_baseline(loaded.model, Problem(training, splits.select, workload.task, LongLoss()), key=key, note=print)
    dense = torch_quality(loaded.model, splits.test, Classification())
    with evaluating(loaded.model):
        for name, module in loaded.model.named_modules():
            if name.endswith(".mlp"):
                module.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        without_mlps = torch_quality(loaded.model, splits.test, Classification())
    return Subject(workload, dense, without_mlps)


def width_rows(subject: Subject, sizes: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Both ways at all sizes, with milliseconds."""
    model, splits = subject.workload.loaded.model, subject.workload.splits
    nets: dict[str, nn.Module] = {"dense": model}
    rows = [{"way": "dense", "size": 1.0, "top1": subject.dense, "macs_ratio": 1.0}]
    for way, options in WAYS.items():
        for size, slim in slims(subject, options, sizes):
            net = slim.pruned.model
            widths = {group.name: len(slim.pruned.plan.kept(group)) for group in slim.pruned.groups}
            macs = count_macs(net, splits.example) / count_macs(model, splits.example)
            top1 = torch_quality(net, splits.test, Classification())
            rows.append({"way": way, "size": size, "top1": top1, "macs_ratio": macs, "widths": widths})
            nets[f"{way} {size}"] = net
            print(f"{way} {size}: {top1:.1%}, {macs:.3f} of the MACs", flush=True)
    for row, milliseconds in zip(rows, latencies(nets, splits.example), strict=True):
        yield {"part": "widths", **row, "milliseconds": milliseconds}


def slims(subject: Subject, options: dict[str, Any], sizes: Sequence[float]) -> Iterator[tuple[float, PruneResult]]:
    """Scored once, cut and repaired at all sizes."""
    workload = subject.workload
    model, splits = workload.loaded.model, workload.splits
    recipe = Recipe(MODEL, 1 - sizes[0], data="glyphs", budget="macs", repair=("closed-form",), **options)
    run = Run(recipe, splits.parts, Clock(silent), Classification()).with_moment_cache("repair", model)
    with seeded(0):
        scored = score(model, splits.example, run)
    for size in sizes:
        with seeded(0):
            slim = cut(scored, plan_at(scored, 1 - size, recipe), run)
        yield size, replace(slim, pruned=restore_layer_norms(slim.pruned))


def latencies(nets: dict[str, nn.Module], example: Tensor) -> list[float]:
    """Median milliseconds of a call with 16 samples of every net."""
    conditions = Conditions(batch_size=16, provider="cpu", threads=1)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{place}.onnx" for place in range(len(nets))]
        for net, path in zip(nets.values(), files, strict=True):
            export_onnx(net, example, path, {}, axes=OpenAxes(conditions.batch_size))
        return measure_files(files, example, conditions)


def energy_rows(subject: Subject) -> Iterator[dict[str, Any]]:
    """What is lost of the stream by how many of its directions stay, in the plain and in the weighted order."""
    example = subject.workload.splits.example
    model = make_rotatable(subject.workload.loaded.model, example)
    groups = find_groups(model, example, classifier_names(model, example), prove=False).groups
    streams = [group for group in groups if group.kind == "direction"]
    for group, (covariance, price) in measure_streams(model, streams, subject.workload.splits.score):
        orders = {"plain": torch.linalg.eigh(covariance)[1].flip(1), "weighted": find_directions(covariance, price)}
        for name, basis in orders.items():
            for share in SHARES:
                first_columns = basis[:, : round(share * group.units)]
                reads = covariance @ first_columns
                left = covariance - reads @ torch.linalg.solve(first_columns.T @ reads, reads.T)
                lost = {
                    "energy_lost": float(left.trace() / covariance.trace()),
                    "weighted_energy_lost": float((price * left).sum() / (price * covariance).sum()),
                }
                yield {"part": "energy", "order": name, "share_kept": share, **lost}


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets, with what was measured."""
    stated = []
    top1 = {(row["way"], row["size"]): row["top1"] for row in rows if row["part"] == "widths"}
    times = {(row["way"], row["size"]): row["milliseconds"] for row in rows if row["part"] == "widths"}
    for size, target in GAINS.items():
        with_them, without = (("directions too", size), ("heads and neurons", size))
        if with_them in top1:
            points = 100 * (top1[with_them] - top1[without])
            stated.append(common.claim(f"{size} of the MACs: points that directions bring", points, target, "higher"))
            ratio = times[with_them] / times[without]
            stated.append(
                common.claim(f"{size} of the MACs: their milliseconds over those without", ratio, 1.0, "lower")
            )
    lost = {(row["order"], row["share_kept"]): row["weighted_energy_lost"] for row in rows if row["part"] == "energy"}
    for share in (0.5, 0.25):
        if ("plain", share) in lost:
            ratio = lost["weighted", share] / lost["plain", share]
            text = f"{share} of the directions: weighted energy lost in the weighted order, over that in the plain one"
            stated.append(common.claim(text, ratio, 1.0, "lower"))
    stated += [
        common.claim("top-1 without MLPs", row["without_mlps"], 0.6, "lower") for row in rows if "without_mlps" in row
    ]
    return stated


def main() -> None:
    """Run the parts that are asked for."""
    command_line = common.parser(__doc__ or "")
    command_line.add_argument("--part", action="append", choices=("energy", "widths"), help="only this one")
    options = command_line.parse_args()
    net = subject()
    print(f"dense {net.dense:.1%}, without MLPs {net.without_mlps:.1%}", flush=True)
    rows: list[dict[str, Any]] = [{"part": "model", "dense": net.dense, "without_mlps": net.without_mlps}]
    if "energy" in (options.part or ("energy",)):
        rows += energy_rows(net)
    if "widths" in (options.part or ("widths",)):
        rows += width_rows(net, (0.35,) if options.quick else SIZES)
    common.write(
        "narrower", "python benchmarks/narrower.py" + (" --quick" if options.quick else ""), rows, [0], claims(rows)
    )


if __name__ == "__main__":
    main()
