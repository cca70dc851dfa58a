"""report.json: it comes back equal, has the documented keys, and is refused in one line where it is none."""

from __future__ import annotations

import dataclasses
import json

import pytest
from reports import NASTY, REPORT, certified, make_report, with_classes

from pxcompress.errors import InputError
from pxcompress.proof import (
    Warning,
)
from pxcompress.report import from_json, to_json


def test_json_comes_back_equal() -> None:
    assert from_json(to_json(REPORT)) == REPORT


def test_json_has_the_documented_keys() -> None:
    content = json.loads(to_json(REPORT))
    assert next(iter(content)) == "schema_version"
    assert content["schema_version"] == 1
    assert content["dense"]["latency_ms"].keys() == {"mean", "p50", "p90", "p99", "runs", "quantiles"}
    top = {"quality", "params", "macs", "onnx_bytes", "latency_ms", "throughput", "batch_size", "provider"}
    assert top <= content["dense"].keys() == content["pruned"].keys()
    assert content["ratios"].keys() == {"params", "macs", "onnx_bytes", "speedup_p50"}
    assert content["dense"]["quality"].keys() == content["change"].keys() == {"value", "low", "high"}
    assert content["metric"] == {"name": "top-1", "unit": "share", "higher_is_better": True, "binary": True}
    assert content["task"] == "classification"
    assert content["parity"].keys() == {"samples", "max_abs", "agreement", "passed"}
    assert content["provider"].keys() == {
        "asked",
        "got",
        "nodes_on_provider",
        "nodes_total",
        "fallback_reason",
        "elsewhere",
        "options",
        "device",
    }
    assert content["stages"][0].keys() == {"name", "seconds", "peak_rss_bytes", "quality_after"}
    assert content["stages"][2]["quality_after"] is None
    assert content["groups"][0] == {"name": "layer0.conv", "kind": "channel", "units": 64, "kept": 8}
    assert {"name", "classes", "score", "repair", "select", "certify", "test"} <= content["data"].keys()


def test_json_keeps_any_text() -> None:
    report = make_report(notes=(Warning("remark", NASTY),), folder=NASTY)
    assert to_json(report).isascii()
    assert from_json(to_json(report)) == report


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_json_lacks(value: float) -> None:
    with pytest.raises(ValueError):
        to_json(make_report(dense=dataclasses.replace(REPORT.dense, throughput=value)))


def broken(path: str, value: object = ...) -> str:
    """report.json with the key at `path` set to `value`, or removed."""
    content = json.loads(to_json(REPORT))
    *outer, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = content
    for key in outer:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the text: Invalid JSON: EOF while parsing"),
        ("[" * 100_000, "the text: Invalid JSON: recursion limit"),
        ("1" * 5000, "the text: Invalid JSON: number out of range"),
        ("[]", "the text: expected an object"),
        (broken("schema_version", 2), "schema_version: expected 1, not 2"),
        (broken("dense.latency_ms.p90"), r"dense\.latency_ms\.p90: it is missing"),
        (broken("dense.latency_ms.p95", 1.0), r"dense\.latency_ms\.p95: Unexpected keyword argument"),
        (broken("groups.1.units", "many"), r"groups\.1\.units: expected a valid integer, not 'many'"),
        (broken("parity.samples", True), r"parity\.samples: expected a valid integer, not True"),
        (broken("stages", {}), r"stages: expected a valid array, not {}"),
        (broken("dense", []), r"dense: expected an object"),
        (broken("certificate", []), r"certificate: expected an object"),
        (broken("recipe.rounds", "two"), r"recipe\.rounds: expected a valid integer, not 'two'"),
        (broken("pruned.quality.value", 2), r"pruned\.quality\.value: expected a share from 0 to 1, not 2"),
        (broken("pruned.samples", -1), r"pruned\.samples: expected greater than or equal to 0, not -1"),
        (broken("stages.0.quality_after", "x"), r"stages\.0\.quality_after: expected a valid number, not 'x'"),
        (broken("dense.latency_ms.p50", float("inf")), r"p50: expected a finite number, not inf"),
        (
            broken("groups.0.kind", "wheel"),
            r"groups\.0\.kind: expected 'channel', 'neuron', 'head' or 'direction', not 'wheel'",
        ),
    ],
)
def test_json_that_is_no_report_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        from_json(text)
    assert "\n" not in str(caught.value)


def test_a_report_with_a_certificate_comes_back_equal() -> None:
    report = certified(0, 3, 90)
    assert from_json(to_json(report)) == report
    assert from_json(to_json(REPORT)).certificate is None


def test_class_shares_come_back_equal() -> None:
    report = with_classes(0.25, None, 0.5)
    assert from_json(to_json(report)) == report
    assert from_json(to_json(REPORT)).class_shares == ()
