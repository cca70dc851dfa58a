"""A path of models, images without labels, and a folder that asks for some."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Px
from label_tables import COUNT, filled, limit, models, truth_of
from linear_files import LEVELS, classifier_file, grey_images


@pytest.fixture(autouse=True)
def record(own_cache: Path) -> None:
    """A record of used splits of its own for every test."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of a path, and images."""
    root = tmp_path_factory.mktemp("path")
    for name, shift, spare in (("dense", 0, 9000), ("half", 6, 4000), ("small", 30, 0)):
        classifier_file(root / f"{name}.onnx", [level + shift for level in LEVELS], spare)
    (root / "truth.json").write_text(json.dumps(grey_images(root / "photos", COUNT)))
    return root


@pytest.fixture
def questions(place: Path, px: Px, tmp_path: Path) -> Path:
    """A folder that asks for labels."""
    outcome = px("certify", *models(place), "--unlabelled", place / "photos", *limit(), "--out", tmp_path / "asked")
    assert outcome.code == 0, outcome.err
    return tmp_path / "asked"


@pytest.fixture
def certified(questions: Path, place: Path, px: Px) -> Path:
    """A folder with a certificate."""
    truth = truth_of(place)
    outcome = px(
        "certify", "--answers", filled(questions, lambda row: truth[row["image"]]), "--out", questions, "--quiet"
    )
    assert outcome.code == 0, outcome.err
    return questions
