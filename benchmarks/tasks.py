"""What is left of the quality without labels on tasks other than classification, beside Torch-Pruning.

    python benchmarks/tasks.py [--quick] [--model LABEL ...] [--part PART ...]

The data are embedded sets made of glyphs, and texts; the dense nets are trained here. "ours" has the defaults (budget
MACs, widths in steps of 4), "closed form" those of its repairs that do not train; neither has labels. Torch-Pruning's
Taylor reads labels, with the loss that the net was trained with, and its models get BatchNorm statistics anew. Quality
and its change, with paired 95 % intervals, are PyTorch's on the test split; speeds are those of the exported files, in
turns, on one thread. Cost is CPU time on one thread in units of one forward pass over the images for scoring and
repair. Rows not measured anew are kept from the result file.
"""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import rivals
import torch
from evidence import evidence_rows
from torch import Tensor, nn

from pxcompress.clock import Clock
from pxcompress.cost.count import count_macs
from pxcompress.demo.losses import IdentityLoss, loss_for
from pxcompress.deploy import runtime
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.intervals import estimate_speedup
from pxcompress.deploy.predictions import Predictions, predictions
from pxcompress.graph import find_groups
from pxcompress.models.adapter import Adapter, named_outputs, release_
from pxcompress.models.loading import classifier_names
from pxcompress.pipeline import open_run
from pxcompress.preparation import prepare
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.stages import plan_and_cut, score
from pxcompress.state import evaluating, seeded
from pxcompress.tasks.detection import Detection
from pxcompress.tasks.task import Outputs
from pxcompress.workload import Workload

NETS = {
    "U-Net": ("pxcompress.demo.nets:unet", "glyph-masks"),
    "ResNet, identities": ("resnet10t", "glyph-identities"),
    "CNN, labels": ("pxcompress.demo.nets:scene_cnn", "glyph-labels"),
    "CNN, counts": ("pxcompress.demo.nets:scene_cnn", "glyph-counts"),
    "ViT, labels": ("pxcompress.demo.nets:scene_vit", "glyph-labels"),
    "YOLO, boxes": ("pxcompress.demo.detectors:glyph_yolo", "glyph-boxes"),
    "SSD, boxes": ("pxcompress.demo.detectors:glyph_ssd", "glyph-boxes"),
    "BERT-like, notes": ("pxcompress.demo.nets:note_reader", "notes"),
}
"""Label -> model and data."""

SIZES = (0.75, 0.5, 0.35)
"""Shares of the dense MACs that are left."""

PARTS = ("ours", "rivals", "speed", "evidence")
METHODS = {"ours": "auto", "closed form": "closed-form"}
"""Label -> repairs."""

IMPORTANCES, SCOPES = ("L2", "Taylor"), ("local", "global")
IDENTITY = ("model", "part", "method", "size")
ALLOWED = {"mIoU": 1.5, "recall@1": 1.0, "mAP": 1.0, "MAE": 5.0, "top-1": 1.0, "mAP50-95": 2.0}
"""Points that may be lost at 0.5 of the MACs, or percent by which an error may grow."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A trained net with its data and task."""

    label: str
    workload: Workload
    run: Run

    @property
    def model(self) -> nn.Module:
        """The dense net."""
        return self.workload.loaded.model

    @property
    def example(self) -> Tensor:
        """One input."""
        return self.workload.splits.example


@dataclass(frozen=True, eq=False)
class _Session:
    """A PyTorch model that answers as a file does."""

    model: nn.Module
    name: str

    def outputs_of(self, inputs: Tensor) -> Outputs:
        with evaluating(self.model), torch.no_grad():
            return named_outputs(self.model, inputs, self.name)


def bench_of(label: str, quick: bool) -> Bench:
    """The net `label`, trained or read from the cache."""
    model, data = NETS[label]
    data += ":train=640,select=100,held_out=300" if quick else ""
    recipe = Recipe(model=model, ratio=0.5, data=data, budget="macs", round_to=4)
    return Bench(label, *open_run(recipe, Clock(print, measures=False)))


def judged(bench: Bench, models: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """What becomes of the quality in `models`, beside the dense net."""
    task = bench.workload.task
    sessions: Any = {
        name: _Session(model, task.output_name) for name, model in {"dense": bench.model, **models}.items()
    }
    results = predictions(sessions, "dense", "dense", bench.workload.splits.test, task)
    return {name: _facts(results["dense"], results[name]) for name in models}


def _facts(dense: Predictions, pruned: Predictions) -> dict[str, Any]:
    change, task = pruned.change(dense), pruned.task
    more = {}
    if isinstance(task, Detection):
        more = {f"{name} mAP50": _map50(of) for name, of in (("dense", dense), ("pruned", pruned))}
    return {
        "metric": task.metric.name,
        "samples": pruned.samples,
        "dense": task.quality(dense.statistics),
        "quality": task.quality(pruned.statistics),
        "change": change.value,
        "low": change.low,
        "high": change.high,
        "agreement": float(pruned.agreement.mean()),
        **more,
    }


def _map50(of: Predictions) -> float:
    """Mean over classes of the average precision at an IoU of 0.5."""
    return float(of.task.precisions(of.statistics)[:, 0].mean())  # type: ignore[attr-defined]


def our_models(bench: Bench, sizes: Sequence[float]) -> Iterator[tuple[str, float, nn.Module, dict[str, float]]]:
    """For every method and size our model, and what it took; scores are computed once."""
    with evaluating(bench.model), torch.no_grad():
        begin = time.process_time()
        for role in ("score", "repair"):
            for inputs, _ in bench.run.parts[role]:
                bench.model(inputs)
        forward = time.process_time() - begin
    with seeded(0):
        begin = time.process_time()
        prepared, cached_run = prepare(bench.model, bench.example, bench.run)
        scored = score(prepared, cached_run)
        scoring = time.process_time() - begin
        for (method, repair), size in itertools.product(METHODS.items(), sizes):
            run = replace(cached_run, recipe=bench.run.recipe.but(repair=(repair,))).without_progress()
            begin = time.process_time()
            slim = plan_and_cut(replace(scored, ratio=1 - size), run)
            seconds = scoring + time.process_time() - begin
            model, scorer = slim.pruned.model, scored.scorer
            ratio = count_macs(model, bench.example) / count_macs(bench.model, bench.example)
            yield method, size, model, {"macs_ratio": ratio, "forward_passes": seconds / forward, "scorer": scorer}


def our_rows(bench: Bench, sizes: Sequence[float], parts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Quality of our models, and as `parts` say the speed of their files and where they look."""
    made = {(method, size): (model, facts) for method, size, model, facts in our_models(bench, sizes)}
    quality = judged(bench, {f"{method} {size}": model for (method, size), (model, _) in made.items()})
    for (method, size), (_, facts) in made.items():
        row = {"model": bench.label, "part": "ours", "method": method, "size": size}
        yield {**row, **facts, **quality[f"{method} {size}"]}
    models = {size: model for (method, size), (model, _) in made.items() if method == "ours"}
    if "evidence" in parts:
        for row in evidence_rows({1.0: bench.model, **models}, bench.workload.source, bench.workload.splits):
            yield {"model": bench.label, "part": "evidence", **row}
    for size, faster in _speeds(bench, models) if "speed" in parts else ():
        row = {"model": bench.label, "part": "speed", "method": "ours", "size": size, **faster}
        yield {**row, "macs_ratio": made["ours", size][1]["macs_ratio"]}


def _speeds(bench: Bench, models: Mapping[float, nn.Module]) -> Iterator[tuple[float, dict[str, float]]]:
    """How many times as fast as the dense file those of `models` are, at batch 1 and 16, with intervals."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, model in {1.0: bench.model, **models}.items():
            path = Path(folder) / f"{name}.onnx"
            export_onnx(exportable(model), bench.example, path, {})
            sessions[str(name)] = runtime.open_session(path, "cpu", threads=1)
        facts: dict[float, dict[str, float]] = {size: {} for size in models}
        for batch in (1, 16):
            inputs = bench.example.expand(batch, *bench.example.shape[1:]).numpy()
            seconds = runtime.time_runs(sessions, inputs, batch_size=batch, max_seconds=20)
            for size in models:
                faster = estimate_speedup(seconds["1.0"], seconds[str(size)])
                facts[size] |= {
                    f"speedup_{batch}": faster.ratio,
                    f"low_{batch}": faster.low,
                    f"high_{batch}": faster.high,
                }
    yield from facts.items()


def exportable(model: nn.Module) -> nn.Module:
    """A model of several inputs as it is, any other of its own class."""
    several = isinstance(model, Adapter) and model.signature_.inputs
    return model if several else released(model)


def released(model: nn.Module) -> nn.Module:
    """A copy of its own class, whose forward returns what the net returns."""
    twin = copy.deepcopy(model)
    release_(twin)
    return twin


def rival_rows(bench: Bench, sizes: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Torch-Pruning by L2 and Taylor, in layers alone and across them, with BatchNorm re-estimated."""
    parts, dense = bench.run.parts, count_macs(bench.model, bench.example)
    fixed = find_groups(bench.model, bench.example, classifier_names(bench.model, bench.example)).fixed
    whole = tuple(layer.name for layer in fixed)
    for importance in IMPORTANCES:
        for scope in SCOPES:
            pruner = rivals.TorchPruning(importance, scope, loss=training_loss(bench), whole=whole)
            with seeded(0):
                slim = pruner(bench.model, bench.example, parts["score"], sizes)
            models = {str(size): each for size, each in slim.items() if not isinstance(each, rivals.Refused)}
            bare = isinstance(bench.workload.task, Detection) and models
            without = judged(bench, models) if bare else {}
            for model in models.values():
                rivals.reestimate(model, parts["repair"])
            quality = judged(bench, models) if models else {}
            for size, each in slim.items():
                row = {"model": bench.label, "part": "rivals", "method": f"{importance}, {scope}", "size": size}
                if isinstance(each, rivals.Refused):
                    yield {**row, "refused": each.reason}
                    continue
                row["macs_ratio"] = count_macs(each, bench.example) / dense
                yield {**row, **quality[str(size)]}
                if str(size) in without:
                    yield {**row, "method": f"{row['method']}, BatchNorm as it was", **without[str(size)]}


def training_loss(bench: Bench) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The loss that the net was trained with; for embeddings, by directions that are the batch's own means."""
    task = bench.workload.task
    with torch.no_grad():
        loss = loss_for(task, bench.workload.source, named_outputs(bench.model, bench.example, task.output_name))

    def compute(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = named_outputs(model, inputs, task.output_name)
        if isinstance(loss, IdentityLoss):
            vectors = loss.task.vectors(outputs).detach()
            means = torch.zeros_like(loss.directions).index_add_(0, targets, vectors)
            loss.directions.data = torch.where(means.any(1, keepdim=True), means, loss.directions)
        result: Tensor = loss(outputs, targets)
        return result

    return compute


def claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every target with its measured value; of what was not measured nothing is said."""
    results = []
    for row in rows:
        label, size = row["model"], row["size"]
        if row["part"] == "speed":
            statement = f"{label} at {size} of the MACs, batch 16: speed-up x MACs left"
            results.append(common.claim(statement, row["speedup_16"] * row["macs_ratio"], 0.85, "higher"))
        elif row["method"] == "ours" and size == 0.5:
            unit = "error up by percent" if row["metric"] == "MAE" else f"points of {row['metric']} lost"
            results.append(
                common.claim(f"{label} at 0.5 of the MACs: {unit}", lost(row), ALLOWED[row["metric"]], "lower")
            )
        elif row["method"] == "ours" and size == 0.35:
            others = [
                lost(each)
                for each in rows
                if each["part"] == "rivals" and "quality" in each and (each["model"], each["size"]) == (label, size)
            ]
            if others:
                statement = (
                    f"{label} at 0.35 of the MACs: lost, at most half of Torch-Pruning's best ({min(others):.2f})"
                )
                results.append(common.claim(statement, lost(row), min(others) / 2, "lower"))
    return results


def lost(row: Mapping[str, Any]) -> float:
    """Points lost, or percent by which the error grew."""
    return 100 * row["change"] / row["dense"] if row["metric"] == "MAE" else -100 * row["change"]


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--model", action="append", choices=NETS, help="only this one")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, parts = (0.5, 0.35) if options.quick else SIZES, options.part or PARTS
    for label in options.model or (("CNN, counts",) if options.quick else NETS):
        bench = bench_of(label, options.quick)
        net_rows: list[dict[str, Any]] = []
        if set(parts) - {"rivals"}:
            net_rows += our_rows(bench, sizes, parts)
            write(net_rows, options.quick)
        if "rivals" in parts:
            write([*net_rows, *rival_rows(bench, sizes)], options.quick)


def write(net_rows: Sequence[Mapping[str, Any]], quick: bool) -> None:
    """Write the rows, those measured before as well."""
    path = common.RESULTS / ("quick/tasks.json" if quick else "tasks.json")
    earlier_rows = json.loads(path.read_text())["rows"] if path.exists() and not quick else []
    measured = {_key(row) for row in net_rows}
    rows = [*(row for row in earlier_rows if _key(row) not in measured), *net_rows]
    common.write("tasks", "python benchmarks/tasks.py" + (" --quick" if quick else ""), rows, (0,), claims(rows))


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in IDENTITY)


if __name__ == "__main__":
    main()
