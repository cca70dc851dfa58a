"""Why the defaults are what they are: scorers x normalisations on glyphs, repaired without labels.

    python benchmarks/defaults.py [--quick]

Top-1 by PyTorch on the test split after fold and BatchNorm re-estimation, one seed; MACs budget, widths in steps of 8.
"""

from __future__ import annotations

import sys
from typing import Any

import common

from pxcompress.clock import Clock
from pxcompress.errors import BudgetError
from pxcompress.measure import torch_accuracy
from pxcompress.pipeline import cut, plan_at, score
from pxcompress.recipe import Recipe
from pxcompress.state import seeded
from pxcompress.subject import load_subject, with_baseline

MODEL, DATA = "resnet10t", "glyphs"
SCORERS = ("random", "magnitude", "taylor", "lrp", "lrp-residual", "lrp-residual:metric=weights")
NORMALISATIONS = ("none", "mean", "uniform")
RATIOS = (0.65, 0.75)


def main() -> None:
    quick = common.parser(__doc__ or "").parse_args().quick
    recipe = Recipe(model=MODEL, ratio=RATIOS[-1], data=DATA, budget="macs")
    subject = with_baseline(load_subject(recipe), recipe.seed, print)
    model, splits = subject.loaded.model, subject.splits
    parts = {"score": splits.score, "repair": splits.repair}
    dense = torch_accuracy(model, splits.test)
    rows: list[dict[str, Any]] = []
    for text in SCORERS[-2:] if quick else SCORERS:
        with seeded(recipe.seed):
            scored = score(model, splits.example, parts, recipe.but(scorer=text), Clock(lambda message: None))
        for way in NORMALISATIONS:
            for ratio in RATIOS:
                chosen = recipe.but(scorer=text, normalise=way, ratio=ratio)
                row = {"model": MODEL, "data": DATA, "scorer": text, "normalise": way, "ratio": ratio, "dense": dense}
                try:
                    plan = plan_at(scored, ratio, chosen)
                    slim = cut(scored, plan, parts, chosen, Clock(lambda message: None))
                    row |= {"top1": torch_accuracy(slim.pruned.model, splits.test)}
                    row |= {"macs_ratio": plan.cost_planned / plan.cost_dense}
                except BudgetError as error:
                    row |= {"refused": str(error)}
                rows.append(row)
                print(text, way, ratio, row.get("top1", row.get("refused")), flush=True)
    found = {(row["scorer"], row["normalise"], row["ratio"]): row["top1"] for row in rows if "top1" in row}
    claims = []
    for ratio in RATIOS:
        default = found["lrp-residual", "mean", ratio]
        others = [value for key, value in found.items() if key[2] == ratio and not key[0].startswith("lrp-residual")]
        if others:
            said = f"{MODEL} on {DATA}, {ratio} of the MACs removed: default - best of random, magnitude, taylor, lrp"
            claims.append(common.claim(said, default - max(others), 0.0, "higher"))
        said = f"{MODEL} on {DATA}, {ratio} of the MACs removed: points lost by the default"
        claims.append(common.claim(said, 100 * (dense - default), 3.0, "lower"))
    common.write("defaults", " ".join(["python", *sys.argv]), rows, [recipe.seed], claims)


if __name__ == "__main__":
    main()
