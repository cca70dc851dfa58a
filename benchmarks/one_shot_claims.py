"""What the rows of `one_shot.py` say: claims with their targets, and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import common

Row = Mapping[str, Any]

LOSSES = {0.5: 1.0, 0.35: 3.0, 0.25: 8.0}
"""Share of the MACs left -> points that may be lost without labels and training."""

DEFAULT = {"selection": "S4", "repair": "least squares", "normalise": "knapsack"}
ATTRIBUTION = ("S1 epsilon", "S1 gamma", "S3", "S4")
RIVALS = ("Torch-Pruning", "onnxsim")


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every target with its measured value; of models and sizes that were not measured nothing is said."""
    return [*_lost(rows), *_ahead(rows), *_attribution(rows), *_task(rows), *_cost(rows)]


def top1(rows: Sequence[Row], **wanted: Any) -> float:
    """Mean top-1, in percent, of the rows that have these values; NaN where there is none."""
    values = [100 * row["top1"] for row in rows if "top1" in row and all(row.get(k) == v for k, v in wanted.items())]
    return mean(values) if values else float("nan")


def _labels(rows: Sequence[Row]) -> dict[str, float]:
    return {row["model"]: 100 * row["dense"] for row in rows if "dense" in row}


def _repaired(rows: Sequence[Row], label: str, size: float, selection: str) -> float:
    """Of the ways to make its scores comparable between layers that one which does best."""
    ways = {row["normalise"] for row in rows if row.get("selection") == selection and "normalise" in row}
    values = (
        top1(rows, model=label, size=size, selection=selection, repair=DEFAULT["repair"], normalise=way) for way in ways
    )
    return max((value for value in values if value == value), default=float("nan"))


def _lost(rows: Sequence[Row]) -> list[dict[str, Any]]:
    claims_made = []
    for label, dense in _labels(rows).items():
        for size, allowed in LOSSES.items():
            value = dense - top1(rows, model=label, size=size, **DEFAULT)
            statement = f"{label} at {size} of the MACs, default: points lost"
            claims_made.append(common.claim(statement, value, allowed, "lower"))
    return claims_made


def _ahead(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Points ahead of the best rival, or 10 where nothing more than 0.5 points can be gained."""
    claims_made = []
    for label, dense in _labels(rows).items():
        for size in sorted({row["size"] for row in rows if row.get("model") == label and "size" in row}, reverse=True):
            rivals = [
                100 * row["top1"]
                for row in rows
                if row["model"] == label and row.get("size") == size and row["selection"] in RIVALS and "top1" in row
            ]
            ours = top1(rows, model=label, size=size, **DEFAULT)
            if not rivals:
                continue
            statement = f"{label} at {size} of the MACs: default - best rival without training"
            if dense - ours <= 0.5:
                statement = f"{label} at {size} of the MACs: points below dense (best rival {max(rivals):.1f} %)"
                claims_made.append(common.claim(statement, dense - ours, 0.5, "lower"))
            else:
                claims_made.append(common.claim(statement, ours - max(rivals), 10.0, "higher"))
    return claims_made


def _attribution(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The default against every selection that uses no attribution, after the same repair."""
    claims_made = []
    others = {row["selection"] for row in rows if "normalise" in row} - {*ATTRIBUTION}
    for size in (0.35, 0.25):
        for other in sorted(others):
            gains = {
                label: top1(rows, model=label, size=size, **DEFAULT) - _repaired(rows, label, size, other)
                for label in _labels(rows)
            }
            measured = {label: gain for label, gain in gains.items() if gain == gain}
            statement = f"{size} of the MACs, mean over {', '.join(measured)}: default - {other}, same repair"
            claims_made.append(common.claim(statement, mean(measured.values()), 0.0, "higher"))
    return claims_made


def _task(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        common.claim(
            f"{row['model']} restricted to {row['classes']} classes, {row['units_removed']:.0%} of the units gone: "
            "share of the accuracy that is kept",
            row["top1"] / row["dense_on_task"],
            0.95,
            "higher",
        )
        for row in rows
        if "classes" in row
    ]


def _cost(rows: Sequence[Row]) -> list[dict[str, Any]]:
    claims_made = []
    for row in rows:
        if "forward_passes" in row:
            statement = f"{row['model']}: scoring, plan, fold and least squares, in forward passes over the data used"
            claims_made.append(common.claim(statement, row["forward_passes"], 40.0, "lower"))
            statement = f"{row['model']}: peak memory, in inference + weights"
            claims_made.append(common.claim(statement, row["memory_ratio"], 3.0, "lower"))
    return claims_made


CURVES: Mapping[str, Mapping[str, str]] = {
    "S4 + fold + least squares (default)": DEFAULT,
    "S4 + fold": {**DEFAULT, "repair": "fold"},
    "S4 + fold + distillation": {**DEFAULT, "repair": "distilled"},
    "OBS + fold": {"selection": "OBS", "repair": "fold", "normalise": "knapsack"},
    "L2 + fold": {"selection": "L2", "repair": "fold", "normalise": "mean"},
    "L2 + statistics": {"selection": "L2", "repair": "statistics"},
    "random + fold": {"selection": "random", "repair": "fold"},
}


def figure(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against MACs, a panel a model and a curve a method; the best rival at every size is one curve."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    labels = _labels(rows)
    _, panels = pyplot.subplots(1, len(labels), figsize=(3.4 * len(labels), 3.2), sharey=True, squeeze=False)
    for axes, (label, dense) in zip(panels[0], labels.items(), strict=True):
        here = [row for row in rows if row["model"] == label and "top1" in row and "size" in row]
        for name, wanted in CURVES.items():
            sizes = sorted({row["size"] for row in here})
            values = [top1(here, size=size, **wanted) for size in sizes]
            axes.plot(sizes, values, marker="o", markersize=3, label=name)
        rivals = [row for row in here if row["selection"] == "Torch-Pruning"]
        sizes = sorted({row["size"] for row in rivals})
        best = [max(100 * row["top1"] for row in rivals if row["size"] == size) for size in sizes]
        axes.plot(sizes, best, "k--", marker="x", markersize=4, label="Torch-Pruning, best of all, BN")
        axes.axhline(dense, color="grey", linewidth=0.8)
        axes.set(title=label, xlabel="MACs left", ylim=(0, 100))
    panels[0][0].set_ylabel("top-1, %")
    panels[0][-1].legend(fontsize=6)
    pyplot.tight_layout()
    pyplot.savefig(path, metadata={"Date": None})
