"""What ships: dense, pruned, quantised and both, side by side, and whether the stop-watch can be believed.

    python benchmarks/deploy.py [--quick] [--model LABEL,...] [--distilled | --runtimes | --int8]

Rows of models that are not run stay as they are in the result file. With --distilled the small models are distilled
after pruning, beside their rows without.

Latency is of ResNet-50 and ViT-S at 224 pixels with random weights, half of the MACs removed, on this CPU: speed does
not depend on what the weights are. Random weights have no accuracy; that comes from small models that learned `glyphs`
or `digits`, pruned and quantised in the same way; "int8 plain" has ranges from the extremes and nothing else. "runtime"
rows, with --runtimes alone, time the same file on ONNX Runtime and on OpenVINO, in turns, on the CPU. "loop" rows time
a file with a bare loop of ONNX Runtime, in turns with the tool. Where there is a GPU, CUDA is timed as well, with
recorded graphs and without; float32 is TF32 there, and another run with NVIDIA_TF32_OVERRIDE=0 adds rows without it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnxruntime as ort
import timm
import torch

from pxcompress import Recipe, compress, compress_module
from pxcompress.deploy.bench import BenchConditions, bench, choose_providers
from pxcompress.deploy.export import export_onnx, read_metadata
from pxcompress.deploy.int8 import Judge
from pxcompress.deploy.measure import time_and_predict
from pxcompress.deploy.precision import convert
from pxcompress.deploy.runtime import open_session
from pxcompress.deploy.stopwatch import time_interleaved
from pxcompress.errors import InputError
from pxcompress.recipe import Bench
from pxcompress.recipe.model_and_data import ModelAndData
from pxcompress.run_folder.names import DENSE, SLIM
from pxcompress.run_folder.targets import rate_targets
from pxcompress.state import seeded
from pxcompress.tasks.classification import Classification
from pxcompress.types import Batch
from pxcompress.workload import load_workload, with_baseline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks.models
from benchmarks.models import GLYPH_MODELS

MODELS = {"ResNet-50": "resnet50", "ViT-S": "vit_small_patch16_224"}
LEARNED: Mapping[str, tuple[str, str]] = {
    **{label: (GLYPH_MODELS[label], "glyphs") for label in ("ResNet", "ViT", "MobileNet")},
    "MobileNetV2": ("mobilenetv2_100", "digits"),
}
"""Label -> a model that learns the data in minutes."""
DISTILLED = ("fold", "least-squares", "batchnorm")
"""Before the distillation."""
PROVIDERS = ("cpu", "cuda", "cuda-graph")
RATIO, SIZE, THREADS = 0.5, 224, 1
BATCHES = (1, 8, 32)
TOLERANCE = 0.05


def noise(size: int) -> list[Batch]:
    """Images to calibrate on where weights are random."""
    with seeded(0):
        return [(torch.randn(4, 3, size, size), torch.zeros(4, dtype=torch.int64)) for _ in range(2)]


def files(name: str, size: int, folder: Path) -> dict[str, Path]:
    """The combinations of one model with random weights, by label."""
    with seeded(0):
        dense = timm.create_model(name).eval()
    batches = noise(size)
    slim = compress_module(dense, batches[0][0][:1], batches, RATIO, budget="macs", scorer="magnitude", repair=())
    exported = {}
    for label, model in (("dense", dense), ("pruned", slim.pruned.model)):
        exported[label] = export_onnx(model, batches[0][0][:1], folder / f"{label}.onnx", {}).path
    for label, source, precision in (
        ("dense int8", "dense", "int8"),
        ("pruned int8", "pruned", "int8"),
        ("pruned fp16", "pruned", "fp16"),
    ):
        path = folder / f"{label.replace(' ', '.')}.onnx"
        exported[label] = convert(exported[source], path, precision, batches).path
    return exported


def latencies(exported: dict[str, Path], model: str, batch_sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """One row for every file, batch size and provider that works here; the dense file there is the reference."""
    for provider in choose_providers(PROVIDERS)[0]:
        labels = {str(path): label for label, path in exported.items() if runs(path, provider)}
        for row in bench(
            list(labels), batch_sizes, conditions=BenchConditions((provider,), THREADS, strict=provider == "cpu")
        ):
            yield {"part": "latency", "model": model, "file": labels[row.path], **asdict(row), "path": None}


def runtimes(model: str, folder: Path, batch_sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The same file on ONNX Runtime and on OpenVINO, in turns; int8 as either makes it."""
    exported = files(MODELS[model], SIZE, folder)
    path = folder / "pruned.nncf.onnx"
    exported["pruned int8 by NNCF"] = convert(
        exported["pruned"], path, "int8", noise(SIZE), Judge(provider="openvino")
    ).path
    for label, file in exported.items():
        for row in bench([file], batch_sizes, conditions=BenchConditions(("cpu", "openvino"), THREADS, strict=True)):
            yield {"part": "runtime", "model": model, "file": label, **asdict(row), "path": None}


def runs(path: Path, provider: str) -> bool:
    """Whether a provider takes a file: not every one can be recorded as a graph."""
    try:
        open_session(path, provider, threads=THREADS)
    except InputError as error:
        print(f"left out: {error}", flush=True)
        return False
    return True


def bare_loop(path: Path) -> Callable[[], None]:
    """A call as a script without pxcompress makes it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    model = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)
    name = model.get_inputs()[0].name
    return lambda: model.run(None, {name: image})


def loops(path: Path, model: str) -> dict[str, Any]:
    """p50 of the tool's own runner beside that of a bare loop on the same file."""
    image = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)
    runners = {"tool": open_session(path, "cpu", threads=THREADS).bind(image), "loop": bare_loop(path)}
    seconds = time_interleaved(runners, runs=200, max_seconds=15)
    p50 = {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}
    return {"part": "loop", "model": model, "file": path.stem, "p50_ms": p50, "ratio": p50["tool"] / p50["loop"]}


def accuracies(label: str, folder: Path, repair: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
    """Top-1 of the combinations of a model that learned; `repair` None: in closed form."""
    chosen = {"repair": ("closed-form",) if repair is None else repair}
    recipe = Recipe(
        LEARNED[label][0],
        RATIO,
        budget="macs",
        data=LEARNED[label][1],
        bench=Bench(provider="cpu", threads=THREADS),
        **chosen,
    )
    compress(recipe, folder)
    splits = load_workload(recipe).splits
    judges = {"int8": Judge(splits.select, Classification()), "int8 plain": None, "fp16": None}
    converted_paths = {
        f"{name} {kind}": convert(
            folder / file, folder / f"{name}.{kind.replace(' ', '.')}.onnx", kind.split()[0], splits.repair, judge
        ).path
        for name, file in (("dense", DENSE), ("pruned", SLIM))
        for kind, judge in judges.items()
    }
    timings = time_and_predict(
        (folder / DENSE, folder / SLIM, *converted_paths.values()),
        splits.test,
        Classification(),
        **asdict(recipe.bench),
    )
    names = {DENSE: "dense", SLIM: "pruned", **{path.name: name for name, path in converted_paths.items()}}
    for row in rate_targets(timings).rows:
        yield {
            "part": "accuracy",
            "model": label,
            "distilled": repair is not None,
            "file": names[row.file],
            "top1": row.quality.value,
            "quantisation": read_metadata(folder / row.file).get("quantisation", ""),
            **{key: value for key, value in asdict(row).items() if key not in ("file", "quality")},
        }


def int8(label: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The dense model that learned, in int8 with ranges from the extremes, and by what keeps its accuracy."""
    model, data = LEARNED[label]
    workload = with_baseline(load_workload(ModelAndData(model, data=data)), 0, print)
    splits, task = workload.splits, Classification()
    source = export_onnx(workload.loaded.model, splits.example, folder / "dense.onnx", {}).path
    paths = {"dense": source}
    for kind, judge in (("int8 plain", None), ("int8", Judge(splits.select, task))):
        path = folder / f"{kind.replace(' ', '.')}.onnx"
        paths[kind] = convert(source, path, "int8", splits.repair, judge).path
    for kind, timing in zip(
        paths, time_and_predict(list(paths.values()), splits.test, task, provider="cpu"), strict=True
    ):
        yield {
            "part": "int8",
            "model": label,
            "file": kind,
            "top1": timing.predictions.quality.value,
            "samples": timing.predictions.samples,
            "agreement": float(timing.predictions.agreement.mean()),
            "quantisation": read_metadata(paths[kind]).get("quantisation", ""),
            "p50_ms": 1e3 * float(np.median(timing.seconds)),
        }


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stop-watch against a bare loop; what quantisation adds to pruning, and what it costs."""
    made = [
        common.claim(
            f"{row['model']}: tool's p50 against a bare loop, deviation", abs(row["ratio"] - 1), TOLERANCE, "lower"
        )
        for row in rows
        if row["part"] == "loop"
    ]
    for row in rows:
        if row["part"] == "latency" and row["file"] == "pruned int8" and row["placement"]["asked"] == "cpu":
            text = (
                f"{row['model']}, batch {row['batch_size']}: pruned and int8 faster than dense, low end of the interval"
            )
            made.append(common.claim(text, row["speedup"]["low"], 1.0, "higher"))
    top1 = {(row["model"], row["distilled"], row["file"]): row["top1"] for row in rows if row["part"] == "accuracy"}
    for (model, distilled, file), share in top1.items():
        if file == "pruned int8":
            lost = 100 * (top1[model, distilled, "pruned"] - share)
            text = (
                f"{model} on {LEARNED[model][1]}{', distilled' if distilled else ''}: points lost by int8 after pruning"
            )
            made.append(common.claim(text, lost, 1.0, "lower"))
    of_int8 = {(row["model"], row["file"]): row["top1"] for row in rows if row["part"] == "int8"}
    for (model, file), share in of_int8.items():
        if file == "int8":
            lost = 100 * (of_int8[model, "dense"] - share)
            made.append(common.claim(f"{model}, dense: points lost by int8 on test", lost, 0.5, "lower"))
    for row in rows:
        if row["part"] == "runtime" and row["placement"]["asked"] == "openvino":
            text = f"{row['model']}, {row['file']}, batch {row['batch_size']}: OpenVINO over ONNX Runtime, same file"
            made.append(common.claim(text, row["speedup"]["ratio"], 1.0, "higher"))
    return made


def labels(text: str) -> tuple[str, ...]:
    """The models that are asked for; all where nothing is."""
    all_labels = (*LEARNED, *MODELS)
    chosen = tuple(text.split(",")) if text else all_labels
    if unknown := [label for label in chosen if label not in all_labels]:
        raise SystemExit(f"unknown model {unknown[0]!r}; known: {', '.join(all_labels)}")
    return chosen


def merged(rows: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """`rows`, and those of the result file for what was not run now."""

    def key(row: dict[str, Any]) -> tuple[object, ...]:
        where = "" if row["part"] in ("runtime", "int8") else row.get("placement", {}).get("asked", "cpu")
        kind = row.get("precision", "") if where not in ("cpu", "") else ""  # with TF32 and without it are two runs
        return row["part"], row["model"], row.get("distilled", False), where, kind

    before = json.loads(path.read_text())["rows"] if path.exists() else []
    run = {key(row) for row in rows}
    return [*(row for row in before if key(row) not in run), *rows]


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--model", default="", help=f"labels with commas, of {', '.join((*LEARNED, *MODELS))}")
    parser.add_argument("--distilled", action="store_true", help="the small models, distilled: minutes each")
    parser.add_argument("--int8", action="store_true", help="int8 of the dense models that learned, alone: minutes")
    parser.add_argument("--runtimes", action="store_true", help="ONNX Runtime and OpenVINO on the same files, alone")
    options = parser.parse_args()
    model_labels = labels(options.model)
    repair = (*DISTILLED, "finetune:steps=5" if options.quick else "finetune:batch_size=64")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for label in (name for name in LEARNED if name in model_labels and options.int8):
            folder = Path(place) / label
            folder.mkdir()
            rows += int8(label, folder)
            print(f"{label}: {[(row['file'], row['top1'], row['quantisation']) for row in rows[-3:]]}", flush=True)
        for label in (name for name in LEARNED if name in model_labels and not (options.runtimes or options.int8)):
            rows += accuracies(label, Path(place) / label, repair if options.distilled else None)
            print(f"{label}: {[(row['file'], row['top1']) for row in rows[-6:]]}", flush=True)
        for label in (name for name in MODELS if name in model_labels and options.runtimes):
            folder = Path(place) / label
            folder.mkdir()
            rows += runtimes(label, folder, (1,) if options.quick else (1, 8))
        for label in (
            name
            for name in MODELS
            if name in model_labels and not (options.distilled or options.runtimes or options.int8)
        ):
            folder = Path(place) / label
            folder.mkdir()
            exported = files(MODELS[label], SIZE, folder)
            rows_of_model = [*latencies(exported, label, BATCHES[: 1 if options.quick else None])]
            rows_of_model += [loops(exported[name], label) for name in ("dense", "pruned int8")]
            print(
                f"{label}: {[(row['file'], row.get('latency_ms', row.get('ratio'))) for row in rows_of_model]}",
                flush=True,
            )
            rows += rows_of_model
    rows = merged(rows, common.RESULTS / ("quick" if options.quick else "") / "deploy.json")
    common.write("deploy", " ".join(["python", *sys.argv]), rows, [0], claims(rows))


if __name__ == "__main__":
    main()
