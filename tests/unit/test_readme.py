"""What README shows works as it stands there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from models import subject

from pxcompress.scorers import SCORERS
from pxcompress.state import seeded

README = (Path(__file__).parents[2] / "README.md").read_text()
MODULE, SEGMENTER, SCORER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_module_example_prints_a_slim_model(capsys: pytest.CaptureFixture[str]) -> None:
    with seeded(0):
        exec(compile(MODULE, "README", "exec"), {})
    printed = capsys.readouterr().out
    assert "Conv2d(64, 64" not in printed
    assert "out_features=10" in printed


def test_the_example_with_two_inputs_keeps_its_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    with seeded(0):
        exec(compile(SEGMENTER, "README", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([1, 5, 32, 32])\n"


def test_the_scorer_example_is_a_whole_scorer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(SCORERS, "_classes", dict(SCORERS._all()))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "readme_scorer.py").write_text(SCORER)
    importlib.import_module("readme_scorer")
    net = subject("flatten_cnn")
    batches = [(net.inputs, torch.zeros(len(net.inputs), dtype=torch.int64))]
    scores, other = (
        SCORERS.build(f"relevance-norm:p=1,composite={rules}")(net.model, net.groups, batches)
        for rules in ("epsilon", "gamma")
    )
    assert not torch.equal(scores["conv1"], other["conv1"])
    assert {name: len(values) for name, values in scores.items()} == {group.name: group.units for group in net.groups}
