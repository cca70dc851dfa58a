"""What a GPU makes of dense and pruned models: one prepared script that fits into eight minutes of device time.

    python benchmarks/gpu.py [--part PART ...] [--seconds 480] [--again] [--quick]

`placement`: on which execution provider every node runs. `latency`: ResNet-50, ViT-S, MobileNetV2 and a detector in the
shape of a YOLO, dense and with half the MACs, batch 1, 8 and 64, in TF32, fp16 and int8, as plain CUDA and as recorded
graphs; `fp32`: the same without TF32; `tensorrt`: where it is installed. `plans`: a latency plan for 2x against a MACs
plan at equal measured milliseconds. `work`: seconds and device memory of scoring and of repair. `processes`: a run in
two processes comes to the plan of one.

Every part is a process of its own with a time limit, and every row is written when it is there, to
results/gpu-DEVICE.json: a script that was stopped goes on where it was. Weights are random, since speed does not depend
on them, but in `plans`. `--quick` takes tiny models, and where there is no GPU the CPU, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common
import latency_plan
import timm
import torch
from torch import nn

from pxcompress import compress_module
from pxcompress.clock import Clock
from pxcompress.deploy.bench import BenchConditions, bench
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.precision import convert
from pxcompress.deploy.runtime import explain_failure, open_session
from pxcompress.errors import PxError
from pxcompress.preparation import prepare
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.stages import plan_and_cut, score
from pxcompress.state import seeded
from pxcompress.types import Batch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks.models
from benchmarks.models import Detector

SECONDS = 480
RATIO = 0.5
BATCHES = (1, 8, 64)
WIDTHS = ("dense", "pruned")
PRECISIONS = ("fp32", "fp16", "int8")
EXPORTERS = 4
"""Processes that export models side by side; each takes a few gigabytes."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model with random weights, and the side of its images."""

    size: int
    make: Callable[[], nn.Module]


SUBJECTS: Mapping[str, Subject] = {
    "ResNet-50": Subject(224, lambda: timm.create_model("resnet50")),
    "ViT-S": Subject(224, lambda: timm.create_model("vit_small_patch16_224")),
    "MobileNetV2": Subject(224, lambda: timm.create_model("mobilenetv2_100")),
    "detector": Subject(640, Detector),
}
TINY: Mapping[str, Subject] = {
    "ResNet-50": Subject(32, lambda: timm.create_model("resnet10t", num_classes=10)),
    "ViT-S": Subject(32, lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10)),
    "MobileNetV2": Subject(32, lambda: timm.create_model("mobilenetv2_035", num_classes=10)),
    "detector": Subject(64, lambda: Detector(8, width=8)),
}


@dataclass(frozen=True)
class Job:
    """What a part gets: where ONNX files are, whether all is tiny, and the keys of rows that are there already."""

    folder: Path
    quick: bool
    done: frozenset[str] = frozenset()

    @property
    def subjects(self) -> Mapping[str, Subject]:
        """Models by their labels."""
        return TINY if self.quick else SUBJECTS

    @property
    def batches(self) -> tuple[int, ...]:
        """Samples a call."""
        return BATCHES[:2] if self.quick else BATCHES

    def file(self, label: str, width: str, precision: str) -> Path:
        """The ONNX file of one model."""
        return self.folder / f"{label}.{width}.{precision}.onnx"

    def providers(self, *names: str) -> tuple[str, ...]:
        """Those of `names` that work here; the CPU for a try of the script where none does."""
        working = tuple(name for name in names if not explain_failure(name))
        return working or (("cpu",) if self.quick else ())


def noise(size: int, samples: int, batch: int) -> list[Batch]:
    """Random images."""
    with seeded(0):
        return [(torch.randn(batch, 3, size, size), torch.zeros(batch).long()) for _ in range(samples // batch)]


def make_files(job: Job, label: str) -> str:
    """Write one model dense and pruned in every precision; returns why not all could be made."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // EXPORTERS))
    subject, failures = job.subjects[label], []
    batches = noise(subject.size, 8, 4)
    with seeded(0):
        dense = subject.make().eval()
    slim = compress_module(dense, batches[0][0][:1], batches, RATIO, scorer="magnitude", repair=()).pruned.model
    for width, model in zip(WIDTHS, (dense, slim), strict=True):
        source = job.file(label, width, "fp32")
        export_onnx(model, batches[0][0][:1], source, {})
        for precision in PRECISIONS[1:]:
            try:
                convert(source, job.file(label, width, precision), precision, batches)
            except PxError as error:
                failures.append(str(error))
    return "; ".join(failures)


def files(job: Job) -> Iterator[tuple[str, Row]]:
    """Exports of all models, side by side."""
    labels = [label for label in job.subjects if not job.file(label, "pruned", "int8").exists()]
    begin = time.perf_counter()
    with ProcessPoolExecutor(min(EXPORTERS, os.cpu_count() or 1)) as pool:
        failures = dict(zip(labels, pool.map(make_files, [job] * len(labels), labels), strict=True))
    if labels:
        yield " ".join(labels), {"seconds": time.perf_counter() - begin, "failures": failures}


def placement(job: Job) -> Iterator[tuple[str, Row]]:
    """Nodes on the asked provider, of how many."""
    for provider in job.providers("cuda", "cuda-graph"):
        for label in job.subjects:
            for width in WIDTHS:
                for precision in PRECISIONS:
                    key = f"{label} {width} {precision} {provider}"
                    if key in job.done or not job.file(label, width, precision).exists():
                        continue
                    try:
                        session = open_session(job.file(label, width, precision), provider)
                        yield key, {"model": label, "width": width, **asdict(session.placement)}
                    except PxError as error:
                        yield key, {"model": label, "width": width, "failure": str(error)}


def latency(job: Job, precisions: Sequence[str] = PRECISIONS, *names: str) -> Iterator[tuple[str, Row]]:
    """Dense and pruned in turns; a row each, with the speed-up beside the pruned one."""
    for precision in precisions:
        for label in job.subjects:
            for provider in job.providers(*(names or ("cuda", "cuda-graph"))):
                key = f"{label} {precision} {provider}"
                paths = [job.file(label, width, precision) for width in WIDTHS]
                if key in job.done or not all(path.exists() for path in paths):
                    continue
                try:
                    rows = bench(
                        paths, job.batches, conditions=BenchConditions((provider,)), runs=20 if job.quick else 100
                    )
                except PxError as error:
                    yield key, {"model": label, "failure": str(error)}
                    continue
                width_of = dict(zip(map(str, paths), WIDTHS, strict=True))
                measured = [{**asdict(row), "path": None, "width": width_of[row.path]} for row in rows]
                yield key, {"model": label, "provider": provider, "precision": rows[0].precision, "rows": measured}


def fp32(job: Job) -> Iterator[tuple[str, Row]]:
    """Plain CUDA without TF32, which NVIDIA_TF32_OVERRIDE=0 turns off for a whole process."""
    yield from latency(job, ("fp32",), "cuda")


def tensorrt(job: Job) -> Iterator[tuple[str, Row]]:
    """Engines are built for minutes, so fp16 comes first."""
    if reason := explain_failure("tensorrt"):
        yield "tensorrt", {"failure": reason}
        return
    yield from latency(job, ("fp16", "int8", "fp32"), "tensorrt")


def plans(job: Job) -> Iterator[tuple[str, Row]]:
    """Top-1 of both plans for 2x on a model that learned glyphs, at batch 64."""
    for row in latency_plan.equal(0, quick=True, batch_size=64):
        yield f"{row['model']} {row['plan']}", row


def work(job: Job) -> Iterator[tuple[str, Row]]:
    """Seconds of every stage, and the most device memory that scoring and the rest took."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for label in ("ResNet-50", "ViT-S"):
        if label in job.done:
            continue
        subject = job.subjects[label]
        with seeded(0):
            model = subject.make().eval().to(device)
            batches = noise(subject.size, 32 if job.quick else 256, 16 if job.quick else 32)
            run = Run(
                Recipe(label, RATIO), {"score": batches, "repair": batches[:-1], "held-out": batches[-1:]}, Clock(print)
            )
            prepared, run = prepare(model, batches[0][0][:1], run)
            scored = score(prepared, run)
            peaks = {"score": _peak_bytes()}
            slim = plan_and_cut(scored, run)
            peaks["repair"] = _peak_bytes()
        with torch.no_grad():
            finite = bool(slim.pruned.model(batches[0][0].to(device)).isfinite().all())
        seconds = {stage.name: stage.seconds for stage in run.clock.stages}
        yield label, {"device": str(device), "seconds": seconds, "peak_device_bytes": peaks, "finite": finite}


def _peak_bytes() -> int:
    """Most bytes that PyTorch held on the GPU since the last call; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def processes(job: Job) -> Iterator[tuple[str, Row]]:
    """Groups of the plan that differ between one process and two; none is right."""
    command = ["run", "--model", "resnet18", "--ratio", "0.5", "--repair", "fold", "--quiet", "--json", "--force"]
    widths, seconds = {}, {}
    for count in (1, 2):
        launcher = [] if count == 1 else ["torch.distributed.run", "--nproc-per-node", str(count), "-m"]
        out = job.folder / f"run-{count}"
        begin = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", *launcher, "pxcompress", *command, "--out", str(out)], capture_output=True, text=True
        )
        seconds[count] = time.perf_counter() - begin
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            yield (
                "processes",
                {"processes": count, "failure": next((line for line in lines if "pxcompress:" in line), lines[-1])},
            )
            return
        report = json.loads((out / "report.json").read_text())
        widths[count] = {group["name"]: group["kept"] for group in report["groups"]}
    differing = [name for name in widths[1] if widths[1][name] != widths[2][name]]
    yield "processes", {"seconds": seconds, "groups": len(widths[1]), "differing": differing}


@dataclass(frozen=True)
class Part:
    """A function that yields rows, its share of the time, and what its process has in its environment."""

    rows: Callable[[Job], Iterator[tuple[str, Row]]]
    share: float
    environment: Mapping[str, str] = field(default_factory=dict)


PARTS: Mapping[str, Part] = {
    "files": Part(files, 0.35),
    "placement": Part(placement, 0.15),
    "latency": Part(latency, 0.4),
    "fp32": Part(fp32, 0.15, {"NVIDIA_TF32_OVERRIDE": "0"}),
    "work": Part(work, 0.2),
    "plans": Part(plans, 0.25),
    "processes": Part(processes, 0.2),
    "tensorrt": Part(tensorrt, 1.0),
}
"""In the order of what is most worth knowing; the last one takes what time is left."""


def claims(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Every node on the GPU; half the MACs faster at every batch; plans; two processes."""
    for row in rows:
        if row["part"] == "placement" and row.get("width") == "pruned" and not row.get("failure"):
            elsewhere = row["nodes_total"] - row["nodes_on_provider"]
            yield common.claim(f"{row['key']}: nodes that run elsewhere", elsewhere, 0, "lower")
        for each in row.get("rows", ()):
            if each["width"] == "pruned" and each["speedup"]:
                text = f"{row['key']}, batch {each['batch_size']}: pruned faster than dense, low end of the interval"
                yield common.claim(text, each["speedup"]["low"], 1.0, "higher")
    top1 = {row["plan"]: 100 * row["top1"] for row in rows if row["part"] == "plans" and "plan" in row}
    if len(top1) == 2:
        text = "points by which a latency plan for 2x beats a MACs plan of the same milliseconds"
        yield common.claim(text, top1["latency"] - top1["macs"], 0.0, "higher")
    for row in rows:
        if row["part"] == "processes" and "differing" in row:
            yield common.claim("groups whose width differs in two processes", len(row["differing"]), 0, "lower")


def result_path(quick: bool) -> Path:
    """The file for this device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    folder = common.RESULTS / "quick" if quick else common.RESULTS
    return folder / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier try."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def measure_part(name: str, job: Job, lines: Path) -> None:
    """In the process of a part: append every row to the file `lines`."""
    with lines.open("a") as stream:
        for key, row in PARTS[name].rows(job):
            stream.write(json.dumps({"part": name, "key": key, **row}, default=str) + "\n")
            stream.flush()
            print(name, key, row.get("failure", ""), flush=True)


def run_part(name: str, options: argparse.Namespace, folder: Path, keys: Sequence[str], seconds: float) -> list[Row]:
    """Rows of a part, as far as it came within `seconds`; a row with a failure where it came to its end too early."""
    lines = folder / f"{name}.jsonl"
    lines.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--done", json.dumps(list(keys))]
    environment = {**os.environ, **PARTS[name].environment}
    failure = ""
    try:
        subprocess.run(
            [*command, *(["--quick"] if options.quick else [])], env=environment, timeout=seconds, check=True
        )
    except subprocess.TimeoutExpired:
        failure = f"not finished within {seconds:.0f} s; run again to go on"
    except subprocess.CalledProcessError as error:
        failure = f"ended with exit code {error.returncode}"
    rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    return [*rows, {"part": name, "key": f"{name} unfinished", "failure": failure}] if failure else rows


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--part", action="append", choices=PARTS, help="only these; repeat the option")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="device time in all")
    parser.add_argument("--again", action="store_true", help="measure parts anew that are in the result file")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "pxcompress-gpu", help="for ONNX files"
    )
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--done", default="[]", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder if options.child else options.folder / ("quick" if options.quick else "full")
    folder.mkdir(parents=True, exist_ok=True)
    if options.child:
        job = Job(folder, options.quick, frozenset(json.loads(options.done)))
        return measure_part(options.child, job, folder / f"{options.child}.jsonl")
    if not (torch.cuda.is_available() or options.quick):
        raise SystemExit(
            "no GPU that PyTorch can use; pxcompress doctor says why, and --quick tries the script on the CPU"
        )
    end, path = time.monotonic() + options.seconds, result_path(options.quick)
    rows = read_rows(path)
    for name in options.part or PARTS:
        here = [
            row for row in rows if row["part"] == name and not row["key"].endswith("unfinished") and not options.again
        ]
        keys, left = [row["key"] for row in here], end - time.monotonic()
        if name in keys or left < 10:  # a part of one row that is there, or no time
            continue
        new_rows = run_part(name, options, folder, keys, min(left, PARTS[name].share * options.seconds))
        fresh = {row["key"] for row in new_rows}
        rows = (
            [row for row in rows if row["part"] != name] + [row for row in here if row["key"] not in fresh] + new_rows
        )
        common.write(path.stem, "python " + " ".join(sys.argv), rows, [0], list(claims(rows)))
    left_out = [name for name in options.part or PARTS if not any(row["part"] == name for row in rows)]
    print(f"not measured: {', '.join(left_out)}" if left_out else "all parts are there", flush=True)


if __name__ == "__main__":
    main()
