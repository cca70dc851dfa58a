from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from command import Outcome, Px, image_folder, one_line
from models import CLASSES

SIZE = 16


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), {"train": 12, "val": 8}, CLASSES, SIZE)


def _sweep(px: Px, images: Path, out: Path, *words: str) -> Outcome:
    return px(
        "sweep",
        "--model",
        "models:FlattenCNN",
        "--data",
        images,
        "--budget",
        "macs",
        "--input-size",
        SIZE,
        "--out",
        out,
        *words,
    )


def test_a_curve_is_measured_and_kept(px: Px, images: Path, tmp_path: Path) -> None:
    outcome = _sweep(px, images, tmp_path / "curve", "--ratios", "0.5,0.2,0.99", "--round-to", "1", "--json")
    assert outcome.code == 0, outcome.err
    curve = json.loads(outcome.out)
    assert json.loads((tmp_path / "curve" / "sweep.json").read_text()) == curve
    points = curve["points"]
    assert [point["ratio"] for point in points] == [0.0, 0.2, 0.5]
    assert curve["unreachable"] == [0.99]
    for point in points:
        assert point["cost"] == pytest.approx(point["macs"])
        assert point["cost"] <= 1 - point["ratio"]
    with (tmp_path / "curve" / "sweep.csv").open() as file:
        assert [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)] == points
    assert "<svg" in (tmp_path / "curve" / "sweep.svg").read_text()
    assert "exists; add --force" in one_line(_sweep(px, images, tmp_path / "curve"))


@pytest.mark.parametrize(("ratios", "words"), [("0.3,x", "shares with commas"), ("0.5,1.5", "ratios has 1.5")])
def test_wrong_ratios_are_refused(px: Px, images: Path, tmp_path: Path, ratios: str, words: str) -> None:
    assert words in one_line(_sweep(px, images, tmp_path / "curve", "--ratios", ratios))
    assert not (tmp_path / "curve").exists()


def test_options_of_milliseconds_are_for_plans_that_cost_some(px: Px, images: Path, tmp_path: Path) -> None:
    options = ("--ratios", "0.5", "--provider", "cpu")
    assert "give --budget latency, or leave them out" in one_line(_sweep(px, images, tmp_path / "curve", *options))
