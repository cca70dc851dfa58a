"""Rows of the table for Torch-Pruning and onnxsim, run from their own packages on the same models and data."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rivals

from pxcompress.cost.count import count_macs
from pxcompress.data import load_splits
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.predictions import predictions, torch_quality
from pxcompress.deploy.runtime import open_session
from pxcompress.state import seeded
from pxcompress.tasks.classification import Classification
from pxcompress.workload import Workload

IMPORTANCES = ("L2", "Taylor", "Hessian, summed")
SCOPES = ("local", "global", "isomorphic")
IMAGES = {"score": 512, "repair": 1024}


def rival_rows(label: str, workload: Workload, sizes: Sequence[float], *, quick: bool) -> Iterator[dict[str, Any]]:
    """Every importance, scope and size: as it comes, and with BatchNorm re-estimated on the repair images."""
    model, splits = workload.loaded.model, workload.splits
    drawn = load_splits(workload.source, workload.loaded.preprocessing, seed=0, limits=IMAGES)
    dense = count_macs(model, splits.example)
    for importance in IMPORTANCES[:1] if quick else IMPORTANCES:
        for scope in SCOPES[:1] if importance.startswith("Hessian") else SCOPES:
            row = {"model": label, "selection": "Torch-Pruning", "importance": importance, "scope": scope, "seed": 0}
            with seeded(0):
                slim_models = rivals.TorchPruning(importance, scope)(model, splits.example, drawn.score, sizes)
            for size, slim in slim_models.items():
                here = {**row, "size": size}
                if isinstance(slim, rivals.Refused):
                    yield {**here, "refused": slim.reason}
                    continue
                here |= {"macs_ratio": count_macs(slim, splits.example) / dense}
                yield {**here, "repair": "bare", "top1": torch_quality(slim, splits.test, Classification())}
                repaired = rivals.reestimate(copy.deepcopy(slim), drawn.repair)
                yield {**here, "repair": "batchnorm", "top1": torch_quality(repaired, splits.test, Classification())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        export_onnx(model, splits.example, path, {})
        for importance in ("magnitude", "Wanda"):
            yield from _onnxsim_rows(label, workload, importance, path, sizes)


def _onnxsim_rows(
    label: str, workload: Workload, importance: str, path: Path, sizes: Sequence[float]
) -> Iterator[dict[str, Any]]:
    splits = workload.splits
    dense = count_macs(workload.loaded.model, splits.example)
    for size, slim in rivals.Onnxsim(importance)(path, splits.score, sizes).items():
        row = {"model": label, "selection": "onnxsim", "importance": importance, "seed": 0, "size": size}
        if isinstance(slim, rivals.Refused):
            yield {**row, "refused": slim.reason}
            continue
        macs = rivals.onnx_macs(rivals.onnx.load(slim)) / dense
        sessions = {"it": open_session(slim, "cpu")}
        top1 = predictions(sessions, "it", "it", splits.test, Classification())["it"].quality.value
        yield {**row, "repair": "bare", "top1": top1, "macs_ratio": macs}
