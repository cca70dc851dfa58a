"""Off-the-shelf models beside a pruned one."""

from __future__ import annotations

import dataclasses
import json
from math import inf, log
from pathlib import Path

import pytest
from command import Px, one_line
from test_report import make_report

from pxcompress.proof import Latency, Report, Rival, Speedup
from pxcompress.report import from_json, to_html, to_json, to_table
from pxcompress.run_folder import shelf

LATENCY = Latency(1.1, 1.0, 1.5, 2.0, 200)
RIVALS = (
    Rival("resnet18", 11_000_000, 37_000_000, 44_000_000, LATENCY, Speedup(0.5, 0.45, 0.55)),
    Rival("convnext_atto", 3_400_000, 11_000_000, 13_500_000, LATENCY, Speedup(1.1, 0.9, 1.3), 0.75),
)


def _compared() -> Report:
    return make_report(rivals=RIVALS)


def test_a_report_with_rivals_survives_json_and_shows_them() -> None:
    report = _compared()
    assert from_json(to_json(report)) == report
    lines = {line.split()[0]: line for line in to_table(report).splitlines() if line}
    assert "0.50x (0.45 to 0.55)  random weights" in lines["resnet18"]
    assert "1.10x (0.90 to 1.30)  75.0%" in lines["convnext_atto"]
    assert "random weights" in to_html(report)
    assert "Off the shelf" not in to_html(dataclasses.replace(report, rivals=()))


def test_what_is_similar_goes_by_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    macs = {"a": 10, "b": 100, "c": 130, "d": 201, "e": 90, "f": 101, "g": 99, "h": 80}
    monkeypatch.setattr(shelf, "FAMILIES", (("a", "b"), ("c",), ("d",), ("e",), ("f", "g"), ("h",)))
    monkeypatch.setattr(shelf, "_distance", lambda name, wanted, *_: abs(log(macs[name] / wanted)))
    assert shelf.similar(100, (3, 32, 32), 5) == ("b", "f", "e", "h")
    assert shelf.similar(100_000, (3, 32, 32), 5) == ()


def test_macs_are_counted_without_weights() -> None:
    count = 22_388_160
    assert shelf._distance("resnet10t", count, (3, 32, 32), 10) < 0.01
    assert shelf._distance("vit_tiny_patch16_224", count, (3, 48, 48), 10) < log(100)
    assert shelf._distance("resnet10t", count, (3, 0, 0), 10) == inf


def test_other_inputs_are_refused_before_any_work(px: Px, tmp_path: Path) -> None:
    options = ["--model", "pxcompress.nets:dna_cnn", "--data", "dna:train=40,select=10,held_out=40", "--ratio", 0.5]
    outcome = px("run", *options, "--compare", "--out", tmp_path / "out", "--quiet")
    assert "--compare knows models of square colour images" in one_line(outcome)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_compares(px: Px, tmp_path: Path) -> None:
    options = ["--model", "models:AnyClasses", "--data", "glyphs:train=640,select=80,held_out=160", "--ratio", 0.5]
    options += ["--round-to", 1, "--score", "magnitude", "--compare", "--quiet", "--json"]
    outcome = px("run", *options, "--out", tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    for rival in report["rivals"]:
        assert report["pruned"]["macs"] / 2.1 < rival["macs"] < report["pruned"]["macs"] * 2.1
        assert rival["top1"] is None
        assert rival["speedup"]["ratio"] == pytest.approx(
            report["pruned"]["latency_ms"]["p50"] / rival["latency_ms"]["p50"]
        )
    assert not [path for path in (tmp_path / "out").iterdir() if path.stem in {r["name"] for r in report["rivals"]}]
