"""Which architectures go the whole way: groups, plan, removal, oracle, fold, export, parity.

One process for each model of `zoo.txt`, with a time limit; rows of earlier runs are kept.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

from pxcompress.budgets import BUDGETS
from pxcompress.cost import count_params, macs_meter, params_meter
from pxcompress.errors import PxError
from pxcompress.export import export_onnx, verify_parity
from pxcompress.graph import REMOVAL_TOLERANCE, find_groups, prune, removal_error
from pxcompress.models import classifier_names, load_model
from pxcompress.plan import Limits, make_plan
from pxcompress.repair import REPAIRS
from pxcompress.rewrite import plain
from pxcompress.scorers import SCORERS
from pxcompress.state import seeded

ZOO = Path(__file__).with_name("zoo.txt")
CLASSES = 10
RATIO = 0.3
SECONDS = 300


@contextmanager
def stage(row: dict[str, Any], name: str) -> Iterator[None]:
    """Time and peak memory of the block; the peak is that of the block alone, where Linux lets us reset it."""
    row["stage"] = name
    Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    yield
    row["seconds"][name] = round(time.perf_counter() - begin, 2)
    row["peak_mib"][name] = memory("VmHWM")


def memory(key: str) -> int:
    """MiB of this process: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1024


def drawn(model: nn.Module) -> nn.Module:
    """`model` with every norm, gate and layer scale drawn: none is zero, so that a wrong removal shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() <= 1 and not name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.std() == 0 or name.endswith("bias"):
                parameter.normal_(0, 0.1)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def examine(name: str, size: int | None, quick: bool) -> dict[str, Any]:
    """One row; `failure` is empty where everything went well."""
    row: dict[str, Any] = {"model": name, "size": size, "stage": "", "failure": "", "seconds": {}, "peak_mib": {}}
    try:
        with seeded(0):
            steps(row, name, size, quick)
    except PxError as error:
        row["failure"] = str(error)
    except Exception as error:  # noqa: BLE001
        import traceback
        traceback.print_exc()
        row["failure"] = f"{type(error).__name__}: {error}"
    return row


def steps(row: dict[str, Any], name: str, size: int | None, quick: bool) -> None:
    with stage(row, "load"):
        loaded = load_model(name, classes=CLASSES, input_size=size, device="cpu")
        model = plain(drawn(loaded.model))
        example = torch.randn(1, *loaded.preprocessing.input_size)
        inputs = torch.randn(8, *loaded.preprocessing.input_size)
        batches = [(inputs, torch.arange(8) % CLASSES)]
    row["params"] = count_params(model)
    row["model_mib"] = row["params"] * 4 / 2**20
    row["loaded_mib"] = memory("VmRSS")
    with stage(row, "find groups"):
        structure = find_groups(model, example, classifier_names(model, example))
    groups = structure.groups
    row["units"] = sum(group.units for group in groups)
    row["kinds"] = {k: sum(g.units for g in groups if g.kind == k) for k in ("channel", "neuron", "head")}
    row["fixed"] = sum(layer.units for layer in structure.fixed)
    if quick: row["reasons"] = [(layer.name, layer.units, layer.reason) for layer in structure.fixed]
    least = {group.name: 1 for group in groups}
    macs, params = macs_meter(model, groups, example), params_meter(model, groups)
    row["macs"] = int(macs({}))
    row["removable_macs"] = round(1 - macs(least) / macs({}), 3)
    row["removable_params"] = round(1 - params(least) / params({}), 3)
    with stage(row, "plan"):
        budget = BUDGETS.build("channels")
        scores = SCORERS.build("random")(model, groups, batches)
        plan = make_plan(groups, scores, budget.meter(model, groups, example), RATIO, Limits(), ("channels", budget.unit))
    with stage(row, "prune"):
        pruned = prune(model, groups, plan, example)
    with stage(row, "oracle"):
        row["removal_error"] = removal_error(pruned, inputs)
        assert row["removal_error"] <= REMOVAL_TOLERANCE
        with torch.no_grad():
            dense = model(inputs)
            row["effect"] = float((pruned.model(inputs) - dense).abs().max() / dense.abs().max())
    if quick:
        return
    with stage(row, "fold"):
        REPAIRS.build("fold")(pruned, batches)
    with tempfile.TemporaryDirectory() as folder:
        with stage(row, "export"):
            file = export_onnx(pruned.model, example, Path(folder) / "model.onnx", {})
        with stage(row, "parity"):
            row["parity"] = verify_parity(pruned.model, file.path, [inputs]).max_abs


def alone(name: str, size: int | None, quick: bool) -> dict[str, Any]:
    """`examine` in a process of its own, which a hang or a crash ends alone."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(target=lambda: send.send(examine(name, size, quick)))
    worker.start()
    send.close()
    row = {"model": name, "size": size, "stage": "", "failure": f"no end within {SECONDS} s"}
    if receive.poll(SECONDS):
        try:
            row = receive.recv()
        except EOFError:
            row["failure"] = "its process ended without an answer"
    worker.kill()
    worker.join()
    return row


if __name__ == "__main__":
    import onnxruntime  # noqa
    patterns = sys.argv[1:]
    out = Path("/tmp/zoo_scan.jsonl")
    for line in ZOO.read_text().splitlines():
        if line.startswith("#"): continue
        name, size = line.split()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns): continue
        begin = time.time()
        row = alone(name, None if size == "-" else int(size), True)
        with out.open("a") as f: f.write(json.dumps(row) + "\n")
        print(f"{name:36s} {time.time()-begin:5.0f}s units {row.get('units')} kinds {row.get('kinds')} fixed {row.get('fixed')} rmacs {row.get('removable_macs')} rpar {row.get('removable_params')} err {row.get('removal_error', float('nan')):.1e} eff {row.get('effect', 0):.2g} {row.get('stage')} {row['failure'][:150]}", flush=True)
