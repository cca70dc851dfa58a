"""Pruned LRP over p, and whether explanations change where decisions do. On models that learned glyphs, or DNA motifs.

    python benchmarks/explain.py [--quick] [--model NAME ...]

Part "plrp": both variants over the share p that is dropped, under two composites: Gini index, cosine to plain LRP,
what the choice of p maximises, pixel flipping (area under the curve; less is more faithful), and relevance mass and
rank accuracy against what the character covers, or the planted motifs. Part "changes": the same inputs before and
after pruning (MACs, the default repairs): how alike the maps of agreeing and of newly wrong samples are, for the
dense model's class in both and for each model's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
import torch
from models import subject_of
from scipy.stats import mannwhitneyu
from torch import Tensor, nn

from pxcompress.explain.heatmaps import METHODS, Method, choose_share, heatmaps, trade_off
from pxcompress.explain.metrics import cosine, gini, mass_accuracy, pixel_flipping, rank_accuracy
from pxcompress.recipe import Recipe
from pxcompress.run import Run
from pxcompress.stages import prune_and_repair
from pxcompress.workload import Workload

MODELS = ("ResNet", "VGG", "ViT", "DNA")
COMPOSITES = ("epsilon", "gamma")
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
RATIOS = {"ResNet": 0.75, "VGG": 0.85, "ViT": 0.6, "DNA": 0.9}
"""MACs that are removed: enough for some dozens of newly wrong samples."""

MARGIN = 0.01
"""Area under the pixel-flipping curve that pruned LRP may lose."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs (n, ...), labels and the dense model's classes (n,), and where the character is (n, positions)."""

    inputs: Tensor
    labels: Tensor
    targets: Tensor
    masks: Tensor


def samples_of(workload: Workload, count: int) -> Samples:
    """The first of the test split, whose sample ids say how they were drawn."""
    inputs, labels = (torch.cat(parts)[:count] for parts in zip(*workload.splits.test, strict=True))
    mask = workload.source.mask
    assert mask is not None
    masks = torch.from_numpy(np.stack([mask(name) for name in workload.splits.ids["test"][: len(inputs)]])).flatten(1)
    return Samples(inputs, labels, predicted(workload.loaded.model, inputs), masks)


def predicted(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in inputs.split(256)])


def quality(model: nn.Module, samples: Samples, maps: Tensor, plain: Tensor) -> dict[str, float]:
    return {
        "gini": float(gini(maps).mean()),
        "cosine_to_lrp": float(cosine(maps, plain).mean()),
        "trade_off": trade_off(maps, plain),
        "flipping": float(pixel_flipping(model, samples.inputs, maps, samples.targets).mean()),
        "mass_accuracy": float(mass_accuracy(maps, samples.masks).nanmean()),
        "rank_accuracy": float(rank_accuracy(maps, samples.masks).nanmean()),
    }


def plrp_rows(label: str, model: nn.Module, samples: Samples) -> list[dict[str, Any]]:
    """Plain LRP, both variants over p, and a random order; `chosen` marks what the choice of p takes."""
    rows = []
    for composite in COMPOSITES:
        words = {"part": "plrp", "model": label, "composite": composite, "samples": len(samples.inputs)}
        plain = heatmaps(model, samples.inputs, samples.targets, Method("lrp", composite)).flatten(1)
        rows.append({**words, "method": "lrp", "share": 0.0, **quality(model, samples, plain, plain)})
        for name in filter(METHODS.get, METHODS):
            chosen = choose_share(model, samples.inputs, samples.targets, name, composite)
            for share in sorted({*SHARES, chosen} - {0.0}):
                maps = heatmaps(model, samples.inputs, samples.targets, Method(name, composite, share)).flatten(1)
                scores = quality(model, samples, maps, plain)
                rows.append({**words, "method": name, "share": share, "chosen": share == chosen, **scores})
    chance = torch.rand(plain.shape, generator=torch.Generator().manual_seed(0))
    words = {"part": "plrp", "model": label, "composite": "", "samples": len(samples.inputs)}
    return [*rows, {**words, "method": "random", "share": 0.0, **quality(model, samples, chance, chance)}]


def change_rows(label: str, workload: Workload, samples: Samples) -> list[dict[str, Any]]:
    """How alike the maps of both models are, by what became of the decision."""
    recipe = Recipe(label, RATIOS[label], budget="macs", round_to=4, repair=("closed-form",))
    slim = prune_and_repair(workload.loaded.model, workload.splits.example, Run(recipe, workload.splits.parts))
    dense, pruned = workload.loaded.model, slim.pruned.model
    own = predicted(pruned, samples.inputs)
    right = (samples.targets == samples.labels, own == samples.labels)
    kinds = {"agreeing": right[0] & right[1], "newly wrong": right[0] & ~right[1]}
    rows = []
    for composite in COMPOSITES:
        method = Method("lrp", composite)
        before = heatmaps(dense, samples.inputs, samples.targets, method).flatten(1)
        for of, targets in (("dense model's", samples.targets), ("each model's own", own)):
            alike = cosine(before, heatmaps(pruned, samples.inputs, targets, method).flatten(1))
            agreeing, wrong = (alike[which] for which in kinds.values())
            test = mannwhitneyu(wrong, agreeing, alternative="less")
            rows.append(
                {
                    "part": "changes",
                    "model": label,
                    "macs_removed": RATIOS[label],
                    "top1": [float(each.double().mean()) for each in right],
                    "composite": composite,
                    "class": of,
                    "cosine_agreeing": float(agreeing.mean()),
                    "cosine_newly_wrong": float(wrong.mean()),
                    "agreeing": len(agreeing),
                    "newly_wrong": len(wrong),
                    "p_value": float(test.pvalue),
                }
            )
    return rows


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    claims_made = []
    for row in rows:
        if row["part"] == "changes":
            text = (
                f"{row['model']}, {row['composite']}, {row['class']} class: cosine of {row['agreeing']} agreeing less "
                f"that of {row['newly_wrong']} newly wrong samples (one-sided p = {row['p_value']:.2g})"
            )
            claims_made.append(common.claim(text, row["cosine_agreeing"] - row["cosine_newly_wrong"], 0.0, "higher"))
    plain = {(row["model"], row["composite"]): row for row in rows if row.get("method") == "lrp"}
    for (model, composite), before in plain.items():
        for name in filter(METHODS.get, METHODS):
            chosen_rows = [row for row in rows if _key(row) == (model, composite, name) and row.get("chosen")]
            claims_made += _at_the_chosen_share(
                f"{model}, {composite}, {name}", before, chosen_rows[0] if chosen_rows else {}
            )
    return claims_made


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["composite"], row.get("method")


def _at_the_chosen_share(where: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """NaN, which never holds, where no share was worth it."""
    where = f"{where} at p = {after.get('share', 0.0):g}"
    gained = {name: after.get(name, math.nan) - before[name] for name in ("gini", "mass_accuracy", "flipping")}
    return [
        common.claim(f"{where}: Gini gained over LRP", gained["gini"], 0.0, "higher"),
        common.claim(f"{where}: relevance mass accuracy gained", gained["mass_accuracy"], 0.0, "higher"),
        common.claim(f"{where}: pixel-flipping area lost", gained["flipping"], MARGIN, "lower"),
    ]


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one; rows of the others stay")
    options = parser.parse_args()
    quick, path = options.quick, common.RESULTS / "explain.json"
    rows = []
    if options.model and not quick:
        rows = [row for row in json.loads(path.read_text())["rows"] if row["model"] not in options.model]
    for label in options.model or (MODELS[:1] if quick else MODELS):
        workload = subject_of(label)
        rows += plrp_rows(label, workload.loaded.model, samples_of(workload, 32 if quick else 64))
        rows += change_rows(label, workload, samples_of(workload, 500 if quick else 1500))
    command = "python benchmarks/explain.py" + " --quick" * quick
    common.write("explain", command, rows, [0], claims(rows))


if __name__ == "__main__":
    main()
