"""Tables that ask for labels, filled in with the truth of images."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from linear_files import LEVELS, NAMES
from PIL import Image

COUNT = 250
Rows = list[dict[str, str]]


def limit(*more: object) -> list[object]:
    return ["--max-drop", 0.1, "--quiet", *more]


def models(place: Path) -> list[Path]:
    return [place / f"{name}.onnx" for name in ("dense", "half", "small")]


def truth_of(place: Path) -> Mapping[str, str]:
    return json.loads((place / "truth.json").read_text())


def read(path: Path) -> Rows:
    with path.open() as file:
        return list(csv.DictReader(file))


def filled(questions: Path, label: Callable[[dict[str, str]], str]) -> Path:
    """A copy of the table beside the folder, with what `label` says of each line."""
    rows = read(questions / "to_label.csv")
    path = questions.parent / "filled.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows({**row, "label": label(row)} for row in rows)
    return path


def predicted(place: Path) -> tuple[np.ndarray, np.ndarray]:
    """Classes (models, n) by the means of the images, and labels (n,), in the order of the names."""
    truth = truth_of(place)
    means = np.array([np.asarray(Image.open(place / "photos" / name)).mean() for name in sorted(truth)])
    centres = np.array([[level + shift for level in LEVELS] for shift in (0, 6, 30)])
    return np.abs(means[None, :, None] - centres[:, None]).argmin(axis=2), np.array(
        [NAMES.index(truth[name]) for name in sorted(truth)]
    )


def edit_json(name: str, change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit
