"""`certify --data table.csv --group`: the risk of models that are no classifiers, in every group of a real table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from command import Px, one_line
from linear_files import LEVELS, NAMES, SIDE, classifier_file, grey_images
from PIL import Image

from pxcompress.certify.path import RiskLimit
from pxcompress.data import load_splits, open_source
from pxcompress.types import Preprocessing

COUNT, TRAIN = 620, 60
CAMERAS = ("front", "back")


pytestmark = pytest.mark.usefixtures("own_cache")


def scores(image: Path, shift: float) -> np.ndarray:
    """What the file with levels moved by `shift` says of an image."""
    centres = (np.array(LEVELS) + shift) / 255
    return 2 * centres * np.asarray(Image.open(image)).mean() / 255 - centres**2


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Images with the scores of the dense model, a camera on every row, and beside them two models that estimate these
    scores.
    """
    for name, shift, spare in (("dense", 0, 9000), ("small", 12, 0)):
        classifier_file(tmp_path / f"{name}.onnx", [level + shift for level in LEVELS], spare, task="regression")
    names = sorted(grey_images(tmp_path / "images", COUNT))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", *NAMES, "camera", "split"])
        for place, name in enumerate(names):
            values = (f"{value:.6f}" for value in scores(tmp_path / "images" / name, 0))
            half = "train" if place < TRAIN else "val"
            lines.writerow([f"images/{name}", *values, CAMERAS[place % 3 == 0], half])
    return tmp_path / "table.csv"


def largest(table: Path, ids: tuple[str, ...]) -> float:
    """The largest score of some images."""
    return max(np.abs(scores(table.parent / name, 0)).max() for name in ids)


@pytest.mark.parametrize("more", [[], ["--anytime"]])
def test_the_risk_is_held_in_every_group_of_a_table(px: Px, table: Path, more: list[object]) -> None:
    files = [table.with_name(f"{name}.onnx") for name in ("dense", "small")]
    out = table.with_name("out")
    command = ["certify", *files, "--data", table, "--max-drop", 0.2, "--group", "camera", "--quiet"]
    outcome = px(*command, "--risk", "loss-increase", *more, "--out", out)
    assert outcome.code == 0, outcome.err
    record = json.loads((out / "certificate.json").read_text())
    assert [each["name"] for each in record["rows"][1]["classes"]] == sorted(CAMERAS)
    assert px("verify", out, "--quiet").code == 0
    if not more:
        preprocessing = Preprocessing((3, SIDE, SIDE), (0.0,) * 3, (1.0,) * 3)
        ids = load_splits(open_source(str(table)), preprocessing).ids
        errors = {
            name: np.abs(scores(table.parent / name, 12) - scores(table.parent / name, 0)).mean()
            / largest(table, ids["select"])
            for name in ids["certify"]
        }
        back = [errors[name] for name in ids["certify"] if int(Path(name).stem) % 3 == 0]
        row = record["rows"][1]["classes"][0]
        assert (row["name"], row["n"]) == ("back", len(back))
        assert row["errors"] == pytest.approx(sum(back), rel=1e-4)
        limit = RiskLimit("loss-increase", 0.2)
        assert row["p_value"] == pytest.approx(limit.p_value(np.array(back)), rel=1e-3)
    text = table.read_text()
    table.write_text(text.replace("back", "side"))
    assert px("verify", out, "--quiet").code == 3, "a group that is another one now"


def test_what_cannot_be_held_in_groups_of_a_table(px: Px, table: Path) -> None:
    files = [table.with_name(f"{name}.onnx") for name in ("dense", "small")]
    command = ["certify", *files, "--data", table, "--max-drop", 0.2, "--quiet"]
    assert "for classifiers; give --risk mean-loss or loss-increase" in one_line(px(*command, "--group", "camera"))
    losses = [*command, "--risk", "loss-increase"]
    assert "unknown column 'kamera'; did you mean camera" in one_line(px(*losses, "--group", "kamera"))
    assert "for classifiers; give --risk mean-loss or loss-increase" in one_line(px(*losses, "--part", "classes"))
    assert "'back', the smallest group" in one_line(px(*losses, "--max-drop", 0.01, "--group", "camera"))
