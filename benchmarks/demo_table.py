"""The whole pipeline over families and ratios: what `pxcompress run` gives, with and without the fold.

    python benchmarks/demo_table.py [--quick]

Rows: model x ratio (MACs) x repair; top-1 through ONNX Runtime, MACs, bytes, p50 latency, seconds of every stage, peak
memory. Each model runs in a process of its own, so that peak memory is its own. Cost is counted in forward passes of
the dense model over the scoring and repair data.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

MODELS = {"resnet18": None, "resnet50": None, "vgg11_bn": None, "mobilenetv2_100": None, "vit_tiny_patch16_224": 64}
"""timm name -> input size; None: the data's own."""

RATIOS = (0.3, 0.5, 0.7)
REPAIRS = {"fold": ("fold", "batchnorm"), "no fold": ("batchnorm",)}
WORK = ("find groups", "score", "plan", "prune", "fold", "batchnorm")
"""Stages that a forward pass over the data is the measure of: no baseline training, no export, no timing."""


def forward_seconds(recipe: Any) -> float:
    """Seconds of one forward pass of the dense model over the scoring and repair data."""
    import torch

    from pxcompress.workload import load_workload, with_baseline

    workload = with_baseline(load_workload(recipe), recipe.seed, lambda message: None)
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            for part in (workload.splits.score, workload.splits.repair):
                for inputs, _labels in part:
                    workload.loaded.model(inputs)
    return time.perf_counter() - start


def run_one(model: str, size: int | None, ratio: float, data: str) -> list[dict[str, Any]]:
    """Rows of one model and ratio: with and without the fold."""
    from pxcompress import Recipe, compress

    rows = []
    for label, repair in REPAIRS.items():
        recipe = Recipe(
            model=model, ratio=ratio, budget="macs", data=data, input_size=size, normalise="mean", repair=repair
        )
        one_pass = forward_seconds(recipe)
        with tempfile.TemporaryDirectory() as place:
            report = compress(recipe, Path(place) / "run")
        stages = {stage.name: stage.seconds for stage in report.stages}
        work = sum(seconds for name, seconds in stages.items() if name.startswith(WORK))
        rows.append(
            {
                "model": model,
                "data": data,
                "input": report.input_shape[-1],
                "ratio": ratio,
                "repair": label,
                "recipe": dataclasses.asdict(report.recipe),
                "top1_dense": report.dense.quality.value,
                "top1": report.pruned.quality.value,
                "samples": report.pruned.samples,
                "macs_ratio": report.ratios.macs,
                "params_ratio": report.ratios.params,
                "bytes_ratio": report.ratios.onnx_bytes,
                "p50_ms_dense": report.dense.latency_ms.p50,
                "p50_ms": report.pruned.latency_ms.p50,
                "speedup_p50": report.ratios.speedup_p50,
                "provider": report.provider.got,
                "parity_max_abs": report.parity.max_abs,
                "stage_seconds": stages,
                "forward_passes": work / one_pass,
                "peak_rss_bytes": max(stage.peak_rss_bytes for stage in report.stages),
                "widths": [dataclasses.asdict(group) for group in report.groups],
            }
        )
    return rows


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--data", default="digits")
    parser.add_argument(
        "--one", nargs=2, metavar=("MODEL", "RATIO"), help="one model and ratio, rows as JSON on stdout"
    )
    options = parser.parse_args()
    if options.one:
        model, ratio = options.one[0], float(options.one[1])
        print(json.dumps(run_one(model, MODELS[model], ratio, options.data)))
        return
    rows = []
    for model in ("resnet18",) if options.quick else MODELS:
        for ratio in (0.5,) if options.quick else RATIOS:
            command = [sys.executable, __file__, "--one", model, str(ratio), "--data", options.data]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows += json.loads(process.stdout.splitlines()[-1])
            for row in rows[-2:]:
                figures = f"top-1 {row['top1_dense']:.3f} -> {row['top1']:.3f}, {row['speedup_p50']:.2f}x"
                print(f"{row['model']} {row['ratio']} {row['repair']}: {figures}, {row['forward_passes']:.0f} passes")
    claims = []
    for row in rows:
        if row["repair"] == "fold" and row["ratio"] == 0.5:
            name = f"{row['model']}, half the MACs, {options.data}"
            points = 100 * (row["top1_dense"] - row["top1"])
            claims.append(common.claim(f"{name}: points of top-1 lost", points, 2.0, "lower"))
            claims.append(common.claim(f"{name}: cost in forward passes", row["forward_passes"], 60, "lower"))
            if row["model"] == "resnet50":
                claims.append(common.claim(f"{name}: top-1", row["top1"], 0.98, "higher"))
    name = "demo_table" if options.data == "digits" else f"demo_table_{options.data}"
    common.write(name, " ".join(["python", *sys.argv]), rows, [0], claims)


if __name__ == "__main__":
    main()
