"""Which architectures go the whole way: groups, scores, plan, removal, oracle, fold, export, parity; one row a model.

Random weights, the default scorer. Every model of `zoo.txt` has a process of its own, with a time limit: a hang or a
crash ends that one alone. Rows of earlier runs are kept: `--only GLOB` measures some anew, `--missing` those that have
none, stop before the export, or have another scorer; so a run that was stopped goes on. `--quick` leaves out export and
parity, which take most of the time.
"""

from __future__ import annotations

import ctypes
import fnmatch
import gc
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

from pxcompress.budgets import BUDGETS
from pxcompress.cost.count import count_params, macs_meter, params_meter
from pxcompress.deploy import runtime  # noqa: F401  (loaded once, before the processes are forked)
from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.parity import verify_parity
from pxcompress.errors import ParityError, PxError, ResultError
from pxcompress.graph import REMOVAL_TOLERANCE, find_groups, prune, removal_error
from pxcompress.guard import describe
from pxcompress.models.loading import classifier_names, load_model
from pxcompress.planning.limits import Limits
from pxcompress.planning.plan import make_plan
from pxcompress.recipe import Recipe
from pxcompress.repair import REPAIRS
from pxcompress.scorers import SCORERS
from pxcompress.state import seeded
from pxcompress.types import Batch, Price, Pruned

ZOO = Path(__file__).with_name("zoo.txt")
SCORER = Recipe("any", 0.5).scorers[0]
"""The first of those that the default tries; the others read the same statistics."""

CLASSES = 10
SAMPLES = 8
RATIO = 0.3
WORTHWHILE = 0.1
"""Share of the multiply-accumulates that must be removable for a model to count as one that can be pruned."""
SECONDS = 600
PLANNING = ("find groups", "plan", "prune")

Row = dict[str, Any]


@contextmanager
def stage(row: Row, name: str) -> Iterator[None]:
    """Seconds and peak memory of the block alone; Linux resets the peak where it is told to.

    What earlier stages have freed is given back first: it would count as memory of this one.
    """
    row["stage"] = name
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    yield
    row["seconds"][name] = round(time.perf_counter() - begin, 2)
    row["peak_mib"][name] = memory_mib("VmHWM")


def memory_mib(key: str) -> int:
    """What this process holds in memory: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1024


def drawn(model: nn.Module) -> nn.Module:
    """`model` with every norm, gate, layer scale and bias drawn: none is zero, so that a wrong removal shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or not parameter.any():
                parameter.normal_(0, 0.1)
            elif parameter.dim() <= 1:
                parameter.uniform_(0.5, 1.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def examine(name: str, size: int | None, quick: bool) -> Row:
    """One row; "failure" is empty where everything went well, else it says in one sentence what did not."""
    row: Row = {"model": name, "size": size, "scorer": SCORER, "stage": "", "failure": "", "unforeseen": False}
    row |= {"seconds": {}, "peak_mib": {}}
    torch.set_num_threads(1)
    try:
        with seeded(0):
            pruned, inputs = prune_one(row, name, size)
            with stage(row, "fold"):
                REPAIRS.build("fold")(pruned, batches_of(inputs))
            if not quick:
                deliver(row, pruned, inputs)
    except PxError as error:
        row["failure"] = str(error)
    except Exception as error:  # noqa: BLE001  (a defect is one row of the table)
        row |= {"failure": describe(error), "unforeseen": True}
    return row


def prune_one(row: Row, name: str, size: int | None) -> tuple[Pruned, torch.Tensor]:
    """From the name to a slim model that equals the masked one, and inputs (n, ...)."""
    with stage(row, "load"):
        loaded = load_model(name, classes=CLASSES, input_size=size, device="cpu")
        model = drawn(loaded.model)
    inputs = torch.randn(SAMPLES, *loaded.preprocessing.input_size)
    example = inputs[:1]
    row |= {"params": count_params(model), "loaded_mib": memory_mib("VmRSS")}
    with stage(row, "find groups"):
        structure = find_groups(model, example, classifier_names(model, example))
    groups = structure.groups
    row["units"] = {kind: sum(g.units for g in groups if g.kind == kind) for kind in ("channel", "neuron", "head")}
    row["fixed"] = reasons(structure.fixed)
    least = {group.name: 1 for group in groups}
    macs, params = macs_meter(model, groups, example), params_meter(model, groups)
    row["macs"] = int(macs({}))
    row["removable_macs"] = round(1 - macs(least) / macs({}), 3)
    row["removable_params"] = round(1 - params(least) / params({}), 3)
    with stage(row, "score"):
        scores = SCORERS.build(SCORER)(model, groups, batches_of(inputs))
    with stage(row, "plan"):
        budget = BUDGETS.build("channels")
        price = Price("channels", budget.unit, budget.meter(model, groups, example))
        plan = make_plan(groups, scores, price, RATIO, Limits())
    with stage(row, "prune"):
        pruned = prune(model, groups, plan)
    with stage(row, "oracle"):
        row["removal_error"] = removal_error(pruned, inputs)
    if not row["removal_error"] <= REMOVAL_TOLERANCE:
        raise ResultError(f"removing units differs from zeroing them by {row['removal_error']:.1e} of the outputs")
    if row["removable_macs"] < WORTHWHILE:
        raise ResultError(f"only {row['removable_macs']:.1%} of its multiply-accumulates can be removed")
    return pruned, inputs


def batches_of(inputs: torch.Tensor) -> list[Batch]:
    """All of them with labels, in one batch."""
    return [(inputs, torch.arange(len(inputs)) % CLASSES)]


def deliver(row: Row, pruned: Pruned, inputs: torch.Tensor) -> None:
    """Export, and compare the file with PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        with stage(row, "export"):
            file = export_onnx(pruned.model, inputs[:1], Path(folder) / "model.onnx", {})
        with stage(row, "parity"):
            parity = verify_parity(pruned.model, file.path, [inputs])
    row["parity"] = parity.max_abs
    if not parity.passed:
        raise ParityError(f"the exported file differs from PyTorch by {parity.max_abs:.1e}")


def reasons(fixed: Sequence[Any]) -> Mapping[str, int]:
    """Units that stay, by the reason without the layer's name."""
    units_by_reason: dict[str, int] = {}
    for layer in fixed:
        reason = " ".join("..." if "." in word else word for word in layer.reason.split())
        units_by_reason[reason] = units_by_reason.get(reason, 0) + layer.units
    return units_by_reason


def alone(name: str, size: int | None, quick: bool) -> Row:
    """`examine` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(target=lambda: send.send(examine(name, size, quick)))
    worker.start()
    send.close()
    row: Row = {"model": name, "size": size, "scorer": SCORER, "failure": f"no end within {SECONDS} s"}
    if receive.poll(SECONDS):
        try:
            row = receive.recv()
        except EOFError:
            row["failure"] = "its process ended without an answer (out of memory, or a crash)"
    worker.kill()
    worker.join()
    return row


def listed() -> dict[str, int | None]:
    """Model name -> side of its input, None for the model's own."""
    lines = [line.split() for line in ZOO.read_text().splitlines() if line and not line.startswith("#")]
    return {name: None if size == "-" else int(size) for name, size in lines}


def is_complete(row: Row, quick: bool) -> bool:
    """Whether a row says how far the model goes; one of a run without export, or with other scores, does not."""
    return row.get("scorer") == SCORER and (bool(row["failure"]) or quick or "parity" in row)


def claims(rows: Sequence[Row], quick: bool) -> list[dict[str, Any]]:
    largest = max(rows, key=lambda row: row.get("params", 0))
    seconds = sum(largest.get("seconds", {}).get(name, float("nan")) for name in PLANNING)
    peak = max(largest["peak_mib"].get(name, float("nan")) for name in PLANNING)
    copies = (peak - largest["loaded_mib"]) * 2**20 / (4 * largest["params"])
    passed = [row for row in rows if not row["failure"] and is_complete(row, quick)]
    unforeseen = [row for row in rows if row.get("unforeseen")]
    name = f"{largest['model']}, the largest ({largest['params'] / 1e6:.0f} million parameters)"
    return [
        common.claim("architectures in the list", len(rows), 70, "higher"),
        common.claim("of them go the whole way", len(passed), 92, "higher"),
        common.claim("end in an exception that is not ours", len(unforeseen), 0, "equal"),
        common.claim(f"seconds to find groups, plan and prune, {name}", seconds, 60, "lower"),
        common.claim(f"memory beyond the loaded model while doing so, in copies of it, {name}", copies, 2, "lower"),
    ]


def show(row: Row) -> None:
    seconds = sum(row.get("seconds", {}).values())
    share = f"{row['removable_macs']:6.1%}" if "removable_macs" in row else "     -"
    print(f"{row['model']:40s} {seconds:6.1f} s  {share} of MACs removable  {row['failure'] or 'passes'}", flush=True)


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="globs on names; the other rows are those of earlier runs"
    )
    parser.add_argument("--missing", action="store_true", help="only those that have no whole row yet")
    args = parser.parse_args()
    command = "python benchmarks/zoo.py" + " --quick" * args.quick
    file = common.RESULTS / ("quick" if args.quick else "") / "zoo.json"
    sizes = listed()
    before = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = {row["model"]: row for row in before if row["model"] in sizes}
    for name, size in sizes.items():
        chosen = any(fnmatch.fnmatchcase(name, pattern) for pattern in args.only)
        if chosen and not (args.missing and name in rows and is_complete(rows[name], args.quick)):
            rows[name] = alone(name, size, args.quick)
            show(rows[name])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"rows": list(rows.values())}))  # what is there when it is stopped
    ordered = [rows[model] for model in sizes if model in rows]
    common.write("zoo", command, ordered, [0], claims(ordered, args.quick))


if __name__ == "__main__":
    main()
