"""What the rows of `search.py` say: claims with their targets, and a figure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import common
from scipy.stats import spearmanr

Row = Mapping[str, Any]

MODES = ("masked", "repaired")
PRESETS = ("epsilon", "zplus", "gamma")
QUALITIES = {"mass_accuracy": 1.0, "flipping": -1.0}
"""Measure of a heatmap -> 1 where more is better."""

PRUNING = {"masked": "masked", "repaired_lrp-residual": "pruned and repaired"}
DIFFERENT = 0.5
"""Rank correlation below which heatmaps and pruning ask for different attributions."""


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every target with its measured value; of models and parts that were not measured nothing is said."""
    return [*_searches(rows), *_heatmaps(rows), *_cost(rows), *_transfer(rows)]


def _searches(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for mode in MODES:
        best_rows = [row for row in rows if row["part"] == mode and row["row"] == "best found"]
        places = dict.fromkeys((row["model"], row["task"]) for row in best_rows)
        pays = 0
        for label, task in places:
            best = [row for row in best_rows if (row["model"], row["task"]) == (label, task)]
            where = f"{label}, {task}, {mode}"
            ahead = min(row["select"] - _best_preset(rows, row) for row in best)
            gain, half = pooled(best)
            pays += gain - half > 0
            yield common.claim(f"{where}: best found - best preset, on select, worst seed", ahead, 0.0, "higher")
            yield common.claim(
                f"{where}: best found - epsilon everywhere, on test, mean of {len(best)} seeds (95 % interval "
                f"{gain - half:+.4f} to {gain + half:+.4f})", gain, 0.0, "higher",
            )  # fmt: skip
        if places:
            statement = f"{mode}: of {len(places)} models and tasks those with a gain on test whose interval is above 0"
            yield common.claim(statement, pays, len(places), "higher")


def _best_preset(rows: Sequence[Row], best: Row) -> float:
    same = ("part", "model", "task", "seed")
    here = [row for row in rows if row["part"] in MODES and all(row[key] == best[key] for key in same)]
    return max(row["select"] for row in here if row["row"] in PRESETS)


def pooled(rows: Sequence[Row]) -> tuple[float, float]:
    """Mean gain over epsilon of several seeds, whose images differ, and half its 95 % interval."""
    half = math.sqrt(sum(row["half_width"] ** 2 for row in rows)) / len(rows)
    return mean(row["gain_over_epsilon"] for row in rows), half


def _heatmaps(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    heatmap_rows = [row for row in rows if row["part"] == "heatmaps"]
    for label in dict.fromkeys(row["model"] for row in heatmap_rows):
        here = [row for row in heatmap_rows if row["model"] == label]
        for quality, sign in QUALITIES.items():
            for key, way in PRUNING.items():
                rank = sign * spearmanr([row[quality] for row in here], [row[key] for row in here]).statistic
                text = (
                    f"{label}: rank correlation of heatmaps ({quality}) and of pruning ({way}), {len(here)} composites"
                )
                yield common.claim(text, rank, DIFFERENT, "lower")


def _cost(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row["part"] == "cost":
            statement = "CPU time of 512 PXP configurations, over that of 512 attributions"
            yield common.claim(f"ResNet: {statement} (from {row['configs']} of each)", row["ratio_512"], 3.0, "lower")


def _transfer(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for mode in MODES:
        transfer_rows = [row for row in rows if row["part"] == "transfer" and row["mode"] == mode]
        others = [row["gain_over_epsilon"] for row in transfer_rows if row["from"] != row["model"]]
        own = [row["gain_over_epsilon"] for row in transfer_rows if row["from"] == row["model"]]
        if others:
            statement = f"{mode}: gain over epsilon, on test, of what {len(others)} searches on other models found"
            yield common.claim(f"{statement} (on the model itself: {mean(own):+.4f})", mean(others), 0.0, "higher")


def figure(rows: Sequence[Row], path: Path) -> None:
    """Top-1 on test against the share of units that is masked: a panel a model and task, a curve a row, mean of seeds.

    A band is one standard deviation of the seeds; it is drawn for what was found and for epsilon.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    masked_rows = [row for row in rows if row["part"] == "masked"]
    labels, tasks = (list(dict.fromkeys(row[key] for row in masked_rows)) for key in ("model", "task"))
    if not masked_rows:
        return
    size = (3.2 * len(labels), 2.8 * len(tasks))
    _, panels = pyplot.subplots(len(tasks), len(labels), figsize=size, sharex=True, sharey=True, squeeze=False)
    for line, task in zip(panels, tasks, strict=True):
        for axes, label in zip(line, labels, strict=True):
            here = [row for row in masked_rows if (row["model"], row["task"]) == (label, task)]
            for place, name in enumerate(dict.fromkeys(row["row"] for row in here)):
                curves = [row["curve"] for row in here if row["row"] == name]
                middle = [mean(values) for values in zip(*curves, strict=True)]
                rates = [5 * step for step in range(len(middle))]
                axes.plot(rates, middle, label=name, color=f"C{place}", linewidth=1 if place else 2)
                if name in ("best found", "epsilon"):
                    spread = [pstdev(values) for values in zip(*curves, strict=True)]
                    low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
                    axes.fill_between(rates, low, high, color=f"C{place}", alpha=0.2, linewidth=0)
            axes.set(title=f"{label}, {task}", ylim=(0, 1.02))
    for axes in panels[-1]:
        axes.set_xlabel("units masked, %")
    for axes in panels[:, 0]:
        axes.set_ylabel("top-1 on test")
    panels[0][-1].legend(fontsize=6)
    pyplot.tight_layout()
    pyplot.savefig(path, metadata={"Date": None})
    pyplot.close()
