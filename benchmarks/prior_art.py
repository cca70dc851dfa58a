"""What is published, built as honest baselines on the same nets and data: selection x compensation at given MACs.

    python benchmarks/prior_art.py [--quick] [--model LABEL ...] [--method NAME ...]

- GRAIL's core: magnitude picks the units, the same share of every layer, and ridge regression on activations folds the
  others in. CORP's core on all units, heads and convolutions as well: activations pick, ridge folds. On a ViT also what
  CORP does by itself, MLPs and ranks of queries and keys (`corp.py`), and those ranks together with all units.
- Model folding: k-means on the weights merges channels that are alike, without data; BatchNorm re-estimated (REPAIR).
- Bias compensation: magnitude picks, means of what is gone go into biases.
- onnxsim 0.8.1 on the exported file: magnitude or Wanda picks channels and, in a ViT, heads
  (`apply_structured_pruning`, `apply_attention_head_pruning` and their Wanda kin),
  as it is, refitted (`apply_pruning_finetune`: ridge regression) and with BatchNorm recovered (`recover_batch_norm`).
- Ours: what `pxcompress run --repair closed-form` does; "ours, defaults" is distilled as well.

Each is tuned: of its variants, allocations, ranks and BatchNorm re-estimated or not, the one with the best top-1 on the
select split counts, and its top-1 is of the test split. None looks at labels otherwise. Rows of other nets, parts and
methods stay. What cannot reach a size is refused, with the reason.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import corp
import models
import onnx
import torch
from one_shot import SELECTIONS, Bench, bench_of, calibration
from rivals import Onnxsim, Refused, onnx_macs, onnxsim_repairs, reestimate
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from pxcompress.deploy.export import export_onnx
from pxcompress.deploy.predictions import predictions, torch_quality
from pxcompress.deploy.runtime import open_session
from pxcompress.errors import BudgetError
from pxcompress.graph import prune
from pxcompress.layout.rows import unit_weights
from pxcompress.preparation import prepare
from pxcompress.repair import REPAIRS
from pxcompress.run import Run
from pxcompress.scorers import SCORERS
from pxcompress.stages import plan_and_cut, plan_at, score
from pxcompress.state import seeded
from pxcompress.tasks.classification import Classification
from pxcompress.types import Batches, Group, Plan

SEED = 0
SIZES = (0.5, 0.35, 0.25)
PARTS = ("ours", "rivals", "onnxsim")
ONNXSIM = "onnxsim, refitted"
OURS = {"ours": ("closed-form",), "ours, defaults": ("auto",)}
ALLOCATIONS = ("uniform", "isomorphic", "mean")
Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A selection, what it is followed by, and whether units are merged by k-means before they go.

    `kinds` are the kinds of groups it prunes, all if empty; with `ranks` of queries and keys it is for ViTs alone.
    """

    name: str
    selection: str
    repairs: tuple[str, ...] = ()
    merges: bool = False
    kinds: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()


METHODS = (
    Method("magnitude, ridge fold (GRAIL's core)", "L2", ("fold",)),
    Method("activations, ridge fold (CORP's core)", "WIFV", ("fold",)),
    Method("MLPs and ranks of queries and keys, ridge (CORP)", "WIFV", ("fold",), kinds=("neuron",), ranks=corp.RANKS),
    Method(
        "all units and ranks of queries and keys, ridge (CORP's core, extended)", "WIFV", ("fold",), ranks=corp.RANKS
    ),
    Method("k-means merging (model folding)", "L2", merges=True),
    Method("magnitude, bias compensation", "L2", ("mean-absorption",)),
    Method("magnitude alone", "L2"),
)


def rival_rows(bench: Bench, size: float, batches: Mapping[str, Batches], names: Sequence[str]) -> Iterator[Row]:
    """The rivals called `names`, each tuned on the select split, or refused with the reason."""
    for method in (each for each in METHODS if each.name in names):
        if method.ranks and not corp.find_attentions(bench.scored.model):
            continue
        scorer = SCORERS.build(SELECTIONS[method.selection])
        scores = scorer(bench.scored.model, bench.scored.structure.groups, batches["score"])
        structure = bench.scored.structure
        groups = tuple(group for group in structure.groups if not method.kinds or group.kind in method.kinds)
        scored = replace(bench.scored, scores=scores, structure=replace(structure, groups=groups))
        attempts: list[tuple[Row, nn.Module]] = []
        reason = ""
        for way, rank in itertools.product(ALLOCATIONS, method.ranks or (0,)):
            judged = replace(bench, scored=corp.price_with_ranks(scored, rank) if rank else scored)
            try:
                attempts += _attempts(judged, method, (way, rank), 1 - size, batches)
            except BudgetError as error:
                reason = f"{error}; ranks of {rank}" if rank else str(error)
        if attempts:
            best, model = max(attempts, key=lambda attempt: attempt[0]["select"])
            top1 = torch_quality(model, bench.test, Classification())
            yield {"method": method.name, "variants": len(attempts), **best, "top1": top1}
        else:
            yield {"method": method.name, "variants": 0, "refused": reason}


def onnxsim_rows(bench: Bench, size: float, batches: Mapping[str, Batches]) -> Iterator[Row]:
    """The best on the select split of what onnxsim makes of the exported file."""
    attempts, macs = [], bench.scored.price({})
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        export_onnx(bench.scored.model, bench.scored.example, dense, {})
        heads = any(group.kind == "head" for group in bench.scored.structure.groups)
        for importance in ("magnitude", "Wanda"):
            slim = Onnxsim(importance, heads)(dense, batches["score"], [size])[size]
            if isinstance(slim, Refused):
                print(f"onnxsim, {importance}, {size}: {slim.reason}")
                continue
            left = onnx_macs(onnx.load(slim)) / macs
            for file in (slim, *onnxsim_repairs(dense, slim, batches["repair"])):
                figures = {
                    name: _file_quality(file, part)
                    for name, part in (("select", batches["select"]), ("top1", bench.test))
                }
                attempts.append({"allocation": importance, "repair": file.suffixes[-2], "macs_ratio": left, **figures})
    if attempts:
        best = max(attempts, key=lambda attempt: attempt["select"])
        yield {"method": ONNXSIM, "variants": len(attempts), **best}


def _file_quality(file: Path, samples: Batches) -> float:
    sessions = {"it": open_session(file, "cpu")}
    return float(predictions(sessions, "it", "it", samples, Classification())["it"].quality.value)


def our_rows(bench: Bench, size: float, batches: Mapping[str, Batches]) -> Iterator[Row]:
    """Ours as it comes."""
    recipe = bench.recipe.but(ratio=1 - size, normalise="knapsack")
    run = Run(recipe, batches, task=Classification()).without_progress()
    with seeded(SEED):
        prepared, run = prepare(bench.scored.model, bench.scored.example, run)
        scored = score(prepared, run)
    for method, repair in OURS.items():
        with seeded(SEED):
            slim = plan_and_cut(scored, replace(run, recipe=recipe.but(repair=repair)))
        plan = slim.pruned.plan
        top1 = torch_quality(slim.pruned.model, bench.test, Classification())
        yield {"method": method, "variants": 1, "top1": top1, "macs_ratio": plan.cost_planned / plan.cost_dense}


def rows_of(label: str, sizes: Sequence[float], parts: Sequence[str], names: Sequence[str]) -> Iterator[Row]:
    """Every method at every size, of the rivals those called `names`."""
    bench = bench_of(label)
    drawn = calibration(bench, SEED)
    batches = {role: drawn[role] for role in ("score", "repair", "select")}
    for size in sizes:
        work = {"ours": our_rows, "rivals": partial(rival_rows, names=names), "onnxsim": onnxsim_rows}
        for row in itertools.chain.from_iterable(work[part](bench, size, batches) for part in parts):
            yield {"model": label, "size": size, "dense": bench.dense, **row}


def _attempts(
    bench: Bench, method: Method, way: tuple[str, int], ratio: float, parts: Mapping[str, Batches]
) -> Iterator[tuple[Row, nn.Module]]:
    """A method by one allocation and one rank (0: none): as it comes, and with BatchNorm re-estimated.

    Raises `BudgetError`.
    """
    allocation, rank = way
    plan = plan_at(bench.scored, ratio, bench.recipe.but(normalise=allocation))
    source = bench.scored.model
    groups = bench.scored.structure.groups
    if method.merges:
        source, plan = merged(source, groups, plan)
    pruned = prune(source, groups, plan)
    with seeded(SEED):
        for text in method.repairs:
            pruned = REPAIRS.build(text)(pruned, parts["repair"], parts["select"])
    slim = corp.with_ranks(pruned.model, parts["repair"], rank) if rank else pruned.model
    for again in (False, True):
        model = reestimate(copy.deepcopy(slim), parts["repair"]) if again else slim
        quality = torch_quality(model, parts["select"], Classification())
        facts = {"allocation": allocation, **({"rank": rank} if rank else {}), "reestimated": again}
        yield {**facts, "macs_ratio": plan.cost_planned / plan.cost_dense, "select": quality}, model


def merged(model: nn.Module, groups: Sequence[Group], plan: Plan) -> tuple[nn.Module, Plan]:
    """A copy of `model` in which every group's units are merged into as many clusters as `plan` leaves, and the plan.

    One unit of a cluster has the mean of what its units produce, and consumers read it with the sum of their weights;
    the others are to be removed (Wang et al., "Forget the data and fine-tuning! Just fold the network", ICLR 2025).
    """
    copied, removed = copy.deepcopy(model), {}
    for group in groups:
        count = len(plan.kept(group))
        if count == group.units or group.kind == "head":  # heads go as magnitude says
            continue
        clusters = _clusters(copied, group, count)
        _merge_(copied, group, clusters)
        removed[group.name] = tuple(sorted(unit for cluster in clusters for unit in cluster[1:]))
    return copied, replace(plan, removed={**plan.removed, **removed})


def _clusters(model: nn.Module, group: Group, count: int) -> list[list[int]]:
    """Exactly `count` clusters of units by the weights that produce them; the first of each is nearest to its mean."""
    weights = [unit_weights(model, member) for member in group.members if member.axis == "out"]
    table = torch.cat([each for each in weights if each is not None], 1).double().numpy()
    centres, labels = kmeans2(table, count, minit="++", seed=SEED)
    clusters = []
    for place in range(count):
        units = [int(unit) for unit in (labels == place).nonzero()[0]]
        units.sort(key=lambda unit: float(((table[unit] - centres[place]) ** 2).sum()))
        clusters.append(units)
    while empty := [cluster for cluster in clusters if not cluster]:  # split the largest until all have a unit
        largest = max(clusters, key=len)
        empty[0].append(largest.pop())
    return clusters


def _merge_(model: nn.Module, group: Group, clusters: Sequence[Sequence[int]]) -> None:
    """Put the mean of a cluster's rows into its first unit's, of consumers' weights the sum; in place."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for member in group.members:
            names = [member.module] if member.dim is not None else _tensors(model, member.module, member.axis)
            for name in names:
                dim = member.dim if member.dim is not None else int(member.axis == "in")
                rows = state[name].movedim(dim, 0) if name in state else None
                if rows is None or not rows.is_floating_point() or int(member.index.max()) >= len(rows):
                    continue  # of grouped convolutions, whose inputs lie elsewhere
                for cluster in (cluster for cluster in clusters if len(cluster) > 1):
                    index = member.index[list(cluster)]
                    total = rows[index.flatten()].unflatten(0, index.shape).sum(0)
                    rows[index[0]] = total if member.axis == "in" else total / len(cluster)


def _tensors(model: nn.Module, module: str, axis: str) -> list[str]:
    """Names of the tensors of a layer that have rows of its `axis`."""
    layer = model.get_submodule(module)
    names = ["weight"] if axis == "in" else ["weight", "bias", "running_mean", "running_var"]
    return [f"{module}.{name}" for name in names if isinstance(getattr(layer, name, None), Tensor)]


def claims(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """No method above ours at any size, on the mean over the nets; and net by net."""
    mine_by_place = {(row["model"], row["size"]): row["top1"] for row in rows if row["method"] == "ours"}
    for size, method in itertools.product(
        sorted({row["size"] for row in rows}), (*(each.name for each in METHODS), ONNXSIM)
    ):
        pairs = {
            row["model"]: (row["top1"], mine_by_place[row["model"], size])
            for row in rows
            if row["method"] == method
            and row["size"] == size
            and (row["model"], size) in mine_by_place
            and "top1" in row
        }
        if not pairs:
            continue
        theirs, mine = (100 * statistics.mean(pair[place] for pair in pairs.values()) for place in (0, 1))
        of = f"mean top-1 over {len(pairs)} nets" if len(pairs) > 1 else f"top-1 of the {next(iter(pairs))}"
        text = f"{size} of the MACs, {of}: ours (target: {method})"
        yield common.claim(text, mine, theirs, "higher")


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--model", action="append", choices=tuple(models.GLYPH_MODELS), help="only this one")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one")
    parser.add_argument("--size", action="append", type=float, choices=SIZES, help="only this share of the MACs")
    parser.add_argument("--method", action="append", choices=[each.name for each in METHODS], help="only this rival")
    options = parser.parse_args()
    parts, names = options.part or PARTS, options.method or [each.name for each in METHODS]
    labels = options.model or (("VGG",) if options.quick else tuple(models.GLYPH_MODELS))
    path = common.RESULTS / ("quick/rivals.json" if options.quick else "rivals.json")
    row_by_key = {_key(row): row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for label in labels:
        for row in rows_of(label, SIZES[:1] if options.quick else options.size or SIZES, parts, names):
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            row_by_key[_key(row)] = row
        rows = list(row_by_key.values())
        command = "python benchmarks/prior_art.py" + " --quick" * options.quick
        common.write("rivals", command, rows, [SEED], list(claims(rows)))


def _key(row: Row) -> tuple[Any, ...]:
    return row["model"], row["size"], row["method"]


if __name__ == "__main__":
    main()
