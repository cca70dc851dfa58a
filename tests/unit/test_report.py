from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.testing
from hypothesis import given
from hypothesis import strategies as st

from pxcompress import cli, pipeline
from pxcompress.certify.parts import Part
from pxcompress.certify.path import Candidate, RiskLimit, certify
from pxcompress.certify.record import CertificateRecord
from pxcompress.deploy.bench import BenchRow
from pxcompress.deploy.comparison import Comparison, ratios, verdict
from pxcompress.deploy.predictions import Predictions
from pxcompress.errors import InputError
from pxcompress.proof import (
    ClassChange,
    ClassShare,
    DataSummary,
    Environment,
    Estimate,
    ExplanationSimilarity,
    GroupWidth,
    Latency,
    LayerCost,
    Measurement,
    OperatorTime,
    Parity,
    Placement,
    Speedup,
    StageTime,
    Target,
    Warning,
)
from pxcompress.recipe import Bench, Guarantee, Recipe
from pxcompress.report import from_json, to_html, to_json, to_table
from pxcompress.report.card import to_card
from pxcompress.report.compare import to_comparison_table
from pxcompress.report.next_step import next_step
from pxcompress.report.record import PlanCosts, Report
from pxcompress.report.summary import (
    describe_change,
    describe_conditions,
    format_bytes,
    format_command,
    format_count,
    format_milliseconds,
    wilson_interval,
    write_headline,
)
from pxcompress.report.table import format_bench
from pxcompress.tasks.classification import Classification
from pxcompress.types import Agreement, Agreements, Fixed

ENVIRONMENT = Environment(
    **dict.fromkeys((field.name for field in dataclasses.fields(Environment)), "1"),
)
ENVIRONMENT = dataclasses.replace(
    ENVIRONMENT, device_name="Some GPU", cpu_name="Some CPU", cpu_count=4, threads=2, onnx_opset=18, cuda=None
)
NASTY = "<b>x</b> & \"q\" 'a' -> \N{SNOWMAN} </script><img src=http://x.y/z>"
VOID = {"meta", "wbr", "br", "hr", "img", "input", "link"}


def measurement(top1: float, p50: float, cost: int) -> Measurement:
    interval = wilson_interval(top1, 400)
    quality = Estimate(top1, interval.low, interval.high)
    return Measurement(
        quality, 400, 1000 * cost, 2_000_000 * cost, 5000 * cost, latency(p50), 1000 / p50, 1, "CPUExecutionProvider"
    )


def latency(p50: float) -> Latency:
    """Of 200 calls around `p50` milliseconds."""
    quantiles = tuple(p50 * (0.9 + 0.01 * n) for n in range(21))
    return Latency(mean=p50 * 1.1, p50=p50, p90=p50 * 1.5, p99=p50 * 2, runs=200, quantiles=quantiles)


def independent(dense: Measurement, pruned: Measurement) -> tuple[ClassChange, ...]:
    """Two classes of as many samples, on which both models are right independently of each other."""
    first, second = (round(of.quality.value * of.samples) for of in (dense, pruned))
    whole = (dense.samples, first, second, round(first * second / dense.samples))
    halves = [count // 2 for count in whole]
    return ClassChange("cat", *halves), ClassChange(
        "dog", *(all - half for all, half in zip(whole, halves, strict=True))
    )


def predictions_of(right: list[bool]) -> Predictions:
    """Of a classifier that is right on these samples."""
    statistics = torch.tensor(right, dtype=torch.float64)[:, None]
    return Predictions(Classification(), statistics, torch.ones(len(right)))


def paired(right: int, first: int, second: int, wrong: int) -> Estimate:
    """Of so many samples: both right, the first only, the second only, both wrong."""
    dense = predictions_of([True] * (right + first) + [False] * (second + wrong))
    pruned = predictions_of([True] * right + [False] * first + [True] * second + [False] * wrong)
    return pruned.change(dense)


def change_of(classes: tuple[ClassChange, ...]) -> Estimate:
    """Of the samples of all classes together."""
    samples, dense, pruned, both = (
        sum(getattr(each, count) for each in classes) for count in ("samples", "dense", "pruned", "both")
    )
    return paired(both, dense - both, pruned - both, samples - dense - pruned + both)


def compare(dense: Measurement, pruned: Measurement, speedup: Speedup) -> Comparison:
    """Both as classifiers on two threads, right independently of each other."""
    classes = independent(dense, pruned)
    placement = Placement("auto", "CPUExecutionProvider", 17, 17)
    return Comparison(dense, pruned, placement, speedup, Classification.metric, change_of(classes), 2, classes)


def make_target(file: str, precision: str, of: Measurement, speedup: Speedup, both: int) -> Target:
    """A file that costs and answers as `of`; it is right on `both` of the 360 of 400 samples that dense.onnx has."""
    right = round(400 * of.quality.value)
    placement = Placement("auto", "CPUExecutionProvider", 17, 17)
    times, change = of.latency_ms, paired(both, 360 - both, right - both, 40 - right + both)
    return Target(file, precision, of.onnx_bytes, of.quality, 400, 1.0, 0.0, times, 9.0, speedup, placement, change)


def make_report(low: float = 3.9, high: float = 4.1, p50: float = 3.0, **changes: Any) -> Report:
    """A report whose verdict is the real one for a speed-up interval from `low` to `high`."""
    dense, pruned = measurement(0.9, 12.0, 40), measurement(0.85, p50, 10)
    comparison = compare(dense, pruned, Speedup(12.0 / p50, low, high))
    report = Report(
        recipe=Recipe("resnet18", 0.5, scorer="magnitude"),
        environment=ENVIRONMENT,
        data=DataSummary("digits", ("cat", "dog"), 11, 12, 13, 14, 400),
        task="classification",
        metric=comparison.metric,
        weights="trained-here",
        input_shape=(3, 32, 32),
        dense=dense,
        pruned=pruned,
        ratios=ratios(dense, pruned),
        parity=Parity(400, 2.5e-6, 1.0, True),
        provider=comparison.placement,
        stages=(
            StageTime("weights", 12.5, 10**9, 0.9),
            StageTime("prune", 0.25, 2 * 10**9, 0.4),
            StageTime("export", 3, 1),
        ),
        groups=(
            *(GroupWidth(f"layer{n}.conv", "channel", 64, 8 * (n % 8 + 1)) for n in range(120)),
            GroupWidth("blocks.0.attn", "head", 12, 12),
        ),
        fixed=(
            Fixed("fc", 2, "it is the classifier"),
            Fixed("stem", 8, "it is a stem"),
            Fixed("stem2", 9, "it is a stem"),
        ),
        plan=PlanCosts("macs", "MACs", 80e6, 20e6, 40e6),
        folder="exported/run",
        verdict=f"{verdict(comparison)}: exported/run/model.onnx",
        notes=(Warning("demonstration", "embedded data: a demonstration"),),
        speedup=comparison.speedup,
        change=comparison.change,
        class_changes=comparison.classes,
        layers=(LayerCost("conv", 80_000_000, 20_000_000),),
        sha256={"model.onnx": "ab" * 32},
    )
    report = dataclasses.replace(report, **changes)
    if "class_changes" in changes:
        return report
    classes = independent(report.dense, report.pruned)
    return dataclasses.replace(report, class_changes=classes, change=change_of(classes))


REPORT = make_report()


class Page(HTMLParser):
    """Elements, text and balance of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]

    @property
    def text(self) -> str:
        return " ".join("".join(text for tag, text in self.texts if tag != "style").split())


@pytest.fixture(scope="module")
def parsed() -> Page:
    return Page(to_html(REPORT))


# report.json


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


# Explanations

ALIKE = ExplanationSimilarity(32, "epsilon", 0.941, 0.887, 0.83)


def test_every_view_says_how_alike_the_explanations_are() -> None:
    report = make_report(explanations=ALIKE)
    assert from_json(to_json(report)) == report
    assert from_json(to_json(REPORT)).explanations is None
    line = "explanations, dense and pruned: cosine 0.94, rank correlation 0.89, top 10 % in common 83%"
    assert [text for text in to_table(report).splitlines() if text.startswith(line)]
    assert line[1:] in to_card(report)
    page = Page(to_html(report))
    assert "Explanations before and after" in page.text
    assert "32 samples of the select split" in page.text
    for view in (to_table(REPORT), to_card(REPORT), Page(to_html(REPORT)).text):
        assert "xplanations" not in view


def test_every_view_says_how_near_the_outputs_are_on_samples_held_out() -> None:
    report = make_report(agreements=Agreements(Agreement(400, 0.9, 0.12), Agreement(380, 0.97, 0.03)))
    assert from_json(to_json(report)) == report
    line = (
        "agreement with the dense model, before export: 90.0% on 400 held-out samples (95 % interval 86.7% to 92.6%), "
        "97.0% on 380 of those that weights were fitted to"
    )
    assert line in to_table(report).splitlines()
    assert line[1:] in Page(to_html(report)).text
    assert "held-out" not in to_table(REPORT)


# Certificate

WHOLE, CONFIDENT = Part(), Part("confident", 0.8, 0.97164)


def certified(*errors: int, spent: str = "", part: Part = WHOLE) -> Report:
    """REPORT with a certificate on 400 samples of a path of models with so many errors, the dense one first.

    The errors are all in the first of two classes.
    """
    models = [Candidate(f"model {place}", 100 - place, np.arange(400) < count) for place, count in enumerate(errors)]
    classes = part.classes(np.arange(400) // 200, ["cat", "dog"])
    certificate = certify(models, part.with_scope(RiskLimit(alpha=0.05)), classes)
    record = CertificateRecord.of(
        certificate, part, reserved=500, hashes={"model": "digest of model"}, unit="units", data="digits"
    )
    return make_report(certificate=dataclasses.replace(record, spent=spent))


def test_a_report_with_a_certificate_comes_back_equal() -> None:
    report = certified(0, 3, 90)
    assert from_json(to_json(report)) == report
    assert from_json(to_json(REPORT)).certificate is None


@pytest.mark.parametrize(
    ("errors", "title", "class_"),
    [
        ((0, 3, 90), "Certified: With 95 % confidence", "verdict"),
        ((0, 90), "Only the dense model is certified: With", "verdict caution"),
        ((90, 0), "Not certified: the dense model stays.", "verdict caution"),
    ],
)
def test_the_badge_says_what_is_certified(errors: tuple[int, ...], title: str, class_: str) -> None:
    page = Page(to_html(certified(*errors)))
    assert title in page.text
    boxes = [
        attributes["class"] for tag, attributes in page.elements if (attributes.get("class") or "")[:7] == "verdict"
    ]
    assert boxes == [class_, "verdict"]
    for text in (
        "What it does not promise",
        "data that differ",
        "single class",
        "same samples are used again",
        "digest of",
    ):
        assert text in page.text
        assert text not in Page(to_html(REPORT)).text


@pytest.mark.parametrize(
    ("part", "title", "shown", "limit", "absent"),
    [
        (WHOLE, "Certified", "3 of 400", "Nothing for a single class", ("samples count", "weakest", "is confident")),
        (
            CONFIDENT,
            "Certified where the dense model is confident",
            "400 of 500 samples count: those whose largest softmax probability in the dense model is at least 0.97164",
            "Nothing for predictions of which the dense model is not confident",
            ("weakest",),
        ),
        (
            Part("classes"),
            "Certified in every class",
            "3 of 200 in 'cat'",
            "Nothing for a part of a class",
            ("Nothing for a single class", "single classes", "samples count"),
        ),
    ],
)
def test_table_and_page_say_for_which_part_it_holds(
    part: Part, title: str, shown: str, limit: str, absent: tuple[str, ...]
) -> None:
    report = certified(0, 3, 90, part=part)
    page, text = Page(to_html(report)).text, to_table(report)
    assert f"{title}: With 95 % confidence" in page
    assert f"\n{title}: With 95 % confidence" in text
    assert shown in page
    assert shown in text
    assert limit in page
    for words in absent:
        assert words not in page
        assert words not in text


def test_the_table_shows_the_path_and_what_it_promises() -> None:
    lines = to_table(certified(0, 3, 90, spent="used once before")).splitlines()
    outcomes = {line.split("  ")[0]: line.rsplit("  ", 1)[1] for line in lines if line.startswith("model ")}
    assert outcomes == {"model": "outcome", "model 0": "passed", "model 1": "chosen", "model 2": "not certified"}
    assert any(line.startswith("Certified: With 95 % confidence") for line in lines)
    assert "note: used once before" in lines
    assert lines[-2] == REPORT.verdict


# Classes


def with_classes(*removed: float | None) -> Report:
    """REPORT with a share for each of so many classes; None stands for one without samples."""
    rows = [ClassShare(f"kind {n}", 0 if share is None else 9 + n, share) for n, share in enumerate(removed)]
    return make_report(class_shares=tuple(rows))


def test_class_shares_come_back_equal() -> None:
    report = with_classes(0.25, None, 0.5)
    assert from_json(to_json(report)) == report
    assert from_json(to_json(REPORT)).class_shares == ()


def test_the_class_that_lost_most_comes_first_and_unknown_ones_are_named() -> None:
    report = with_classes(0.25, None, 0.5, 0.3)
    text = Page(to_html(report)).text
    places = [text.index(f"{name}: {share} removed") for name, share in (("kind 2", "50.0%"), ("kind 3", "30.0%"))]
    assert places == sorted(places)
    assert "No sample in the score split: kind 1." in text
    line = (
        "class relevance that the removed units carried: 35.0% on average, 50.0% for 'kind 2', the most of 3 classes, "
        "before repair; 1 without samples in the score split left out"
    )
    assert line[1:] in text
    assert line in to_table(report).splitlines()
    assert to_table(report).splitlines()[-2] == REPORT.verdict


def test_the_page_shows_the_worst_of_many_classes_and_counts_the_others() -> None:
    text = Page(to_html(with_classes(*(n / 100 for n in range(30)), *[None] * 25))).text
    assert text.count("% removed") == 20
    assert "10 more in report.json." in text
    assert "kind 49 and 5 more." in text


def test_without_class_scores_nothing_is_said_of_classes(parsed: Page) -> None:
    assert "What the removed units carried for each class" not in parsed.text
    assert "class relevance" not in to_table(REPORT)
    assert "What the removed units carried for each class" not in to_html(with_classes(None))


def with_changes(*counts: tuple[int, int, int]) -> Report:
    """REPORT with samples, and right ones of both models, of so many classes."""
    return make_report(class_changes=tuple(ClassChange(f"kind {n}", *of, min(of[1:])) for n, of in enumerate(counts)))


def test_every_view_says_what_each_class_lost_the_worst_first() -> None:
    report = with_changes((50, 50, 48), (40, 40, 30), (50, 40, 45), (9, 9, 9))
    assert from_json(to_json(report)) == report
    line = "2 of 4 classes lost answers, 1 gained some; most: 'kind 1', 40 -> 30 of 40 samples right"
    assert line in to_table(report).splitlines()
    assert f"- {line}" in to_card(report).replace("\\", "").replace("&gt;", ">")
    page = Page(to_html(report))
    assert line[1:] in page.text
    heads = [text for tag, text in page.texts if tag == "span" and text.startswith("kind")]
    assert heads == ["kind 1", "kind 0", "kind 3", "kind 2"]
    assert "-25.0-40.2 to -11.1" in page.text
    many = Page(to_html(with_changes(*[(10, 9, 9)] * 30))).text
    assert "10 more in report.json." in many
    assert "0 of 30 classes lost answers, 0 gained some." in many


# Where work and time went


def test_the_page_shows_where_macs_and_milliseconds_went() -> None:
    layers = [LayerCost(f"layer{n // 10}.{n}.conv", 1000, 250) for n in range(40)] + [LayerCost("", 5, 5)]
    times = (OperatorTime("Conv", 0.9, 0.5), OperatorTime("Gemm", 0.095, 0.5), OperatorTime("Flat", 0.005, 0.0))
    report = make_report(layers=tuple(layers), operators=times)
    assert from_json(to_json(report)) == report
    page, many = Page(to_html(report)).text, "\N{MULTIPLICATION SIGN}"
    assert f"layer3layer3: pruned against dense10 k2.50 k4{many} fewer" in page
    assert "elsewhere" in page
    assert f"ConvConv: pruned against dense10.8 ms1.50 ms7.2{many} less" in page
    assert f"GemmGemm: pruned against dense1.14 ms1.50 ms1.32{many} more" in page
    assert "Flat" not in page


def test_the_page_draws_how_calls_are_distributed_on_one_scale() -> None:
    page = Page(to_html(REPORT))
    assert "From 0 to 13.1 ms: pale are 5 to 95 % of the calls" in page.text
    assert "pruned: 5 % within 2.73 ms, 25 % within 2.85 ms" in page.text
    pale = [attributes for tag, attributes in page.elements if "pale" in (attributes.get("class") or "")]
    ends = [float(each["x"] or 0) + float(each["width"] or 0) for each in pale]
    assert ends == pytest.approx([100, 25], abs=0.02)


# Figures


@pytest.mark.parametrize(("right", "samples", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)])
def test_wilson_interval_is_that_of_newcombe_1998_table_1(right: int, samples: int, low: float, high: float) -> None:
    interval = wilson_interval(right / samples, samples)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("cells", [(36, 12, 2, 0), (20, 12, 2, 16), (300, 20, 4, 60), (0, 5, 5, 0), (50, 0, 0, 0)])
def test_interval_of_a_paired_drop_is_newcombes_method_10(cells: tuple[int, int, int, int]) -> None:
    """Against the formulas as they stand in the paper, with Wilson's own beside them."""
    a, b, c, d = cells
    n = a + b + c + d

    def limits(x: int) -> tuple[float, float]:
        z = 1.959963984540054
        middle, half = 2 * x + z * z, z * math.sqrt(z * z + 4 * x * (1 - x / n))
        return (middle - half) / (2 * (n + z * z)), (middle + half) / (2 * (n + z * z))

    (l2, u2), (l3, u3) = limits(a + b), limits(a + c)
    p2, p3 = (a + b) / n, (a + c) / n
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    bracket = a * d - b * c
    bracket = max(bracket - n / 2, 0) if bracket > 0 else bracket
    phi = bracket / math.sqrt(margins) if margins else 0
    low = math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u3 - p3) + (u3 - p3) ** 2)
    high = math.sqrt((u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p3 - l3) + (p3 - l3) ** 2)
    change = paired(*cells)
    assert (-change.high, -change.low) == pytest.approx((p2 - p3 - low, p2 - p3 + high), abs=1e-9)
    assert change.value == pytest.approx(p3 - p2)


def test_a_paired_interval_holds_the_truth_as_often_as_it_says_and_is_narrower() -> None:
    """Of 400 tests of 300 samples, of which the slim model gets 2 % wrong that were right and 1 % the other way."""
    drawn = np.random.default_rng(0).multinomial(300, (0.9, 0.02, 0.01, 0.07), size=400).tolist()
    found = {tuple(cells): paired(*cells) for cells in drawn}
    held = [found[tuple(cells)].low <= -0.01 <= found[tuple(cells)].high for cells in drawn]
    assert 0.93 <= np.mean(held) <= 0.99
    apart, together = paired(251, 25, 22, 2), paired(270, 6, 3, 21)
    assert together.high - together.low < 0.6 * (apart.high - apart.low)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_its_share_and_stays_a_share(case: tuple[int, int]) -> None:
    right, samples = case
    interval = wilson_interval(right / samples, samples)
    assert 0 <= interval.low <= right / samples + 1e-12
    assert right / samples - 1e-12 <= interval.high <= 1
    assert interval.low < interval.high


def test_figures_have_three_digits_and_no_exponent() -> None:
    counts = {999: "999", 1000: "1 k", 23_528_522: "23.5 M", 999_700: "1.00 M", 4.1e9: "4.10 G", 0: "0"}
    assert {value: format_count(value) for value in counts} == counts
    assert [format_bytes(value) for value in (12, 94_300_000, 1.5e9)] == ["12 B", "94.3 MB", "1.50 GB"]
    assert [format_milliseconds(value) for value in (123.4, 12.34, 4.409, 0.86)] == [
        "123 ms",
        "12.3 ms",
        "4.41 ms",
        "0.860 ms",
    ]


@given(st.floats(0.001, 1e6), st.floats(0.001, 1e6))
def test_change_names_the_direction(dense: float, pruned: float) -> None:
    words = describe_change(dense, pruned, "fewer", "more")
    assert words == "same" or words.endswith("fewer" if pruned < dense else "more")
    assert words == "same" or float(words.partition("x")[0]) > 1


@pytest.mark.parametrize(
    ("low", "high", "p50", "start"),
    [
        (3.9, 4.1, 3.0, "4x faster, 4x smaller, 5.0 points top-1 lost (95 % interval of the change -9.6 to -0.4)"),
        (0.9, 1.5, 10.0, "not shown to be faster (1.20x, 95 % interval 0.90 to 1.50), "),
        (0.7, 0.9, 15.0, "slower (0.80x, 95 % interval 0.70 to 0.90), "),
    ],
)
def test_headline_never_claims_more_than_the_verdict(low: float, high: float, p50: float, start: str) -> None:
    report = make_report(low, high, p50)
    assert write_headline(report).startswith(start)
    assert ("x faster" in write_headline(report)) == (low > 1) == ("x faster" in report.verdict)


def with_top1(top1: float, **changes: Any) -> Report:
    """REPORT with another accuracy of the slim model."""
    pruned = dataclasses.replace(REPORT.pruned, quality=measurement(top1, 3.0, 10).quality)
    return make_report(pruned=pruned, ratios=ratios(REPORT.dense, pruned), **changes)


def test_every_view_claims_a_change_of_accuracy_only_where_its_interval_leaves_0_out() -> None:
    nothing = "no top-1 difference shown"
    for top1, words in (
        (0.96, "6.0 points top-1 gained (95 % interval of the change +2.5 to +9.7)"),
        (0.91, f"{nothing} (+1.0 points, 95 % interval of the change -3.1 to +5.1)"),
        (0.9001, f"{nothing} (0.0 points, 95 % interval of the change -4.2 to +4.2)"),
        (0.88, f"{nothing} (-2.0 points, 95 % interval of the change -6.4 to +2.4)"),
        (0.85, "5.0 points top-1 lost (95 % interval of the change -9.6 to -0.4)"),
    ):
        report = with_top1(top1)
        assert write_headline(report).endswith(words)
        assert words.partition(" (")[0] in to_card(report)
        page = Page(to_html(report)).text
        assert words.partition(" (")[0] in page
        assert ("no difference shown" in page) == (nothing in page) == words.startswith(nothing)


# What to do next


def test_the_next_step_is_what_the_outcome_calls_for() -> None:
    own = make_report(weights="pretrained", folder="exported/my run")
    slow = {"low": 0.9, "high": 1.5, "p50": 10.0}
    busy = (Warning("busy", "x"),)
    guessing = dataclasses.replace(REPORT.dense, quality=measurement(0.51, 3.0, 10).quality)
    fine = with_top1(0.899, weights="pretrained", folder="exported/my run")
    steps = {
        "to win accuracy back: --repair fold --repair least-squares --repair batchnorm --repair finetune; or": (
            make_report(recipe=REPORT.recipe.but(repair=("closed-form",)))
        ),
        "to lose less: a smaller --ratio, more images, or more steps, --repair closed-form --repair finetune:": REPORT,
        "a smaller --ratio, more images, or a larger --max-drop": certified(0, 90),
        "give weights that know these classes (--checkpoint)": make_report(dense=guessing),
        "time it on a quiet machine: pxcompress bench exported/run": with_top1(0.9, notes=busy),
        "to be faster: --speedup 2x, which plans by milliseconds": with_top1(0.9, **slow),
        "to be faster: a larger --batch-size (here 1) or --ratio": with_top1(
            0.9, **slow, recipe=REPORT.recipe.but(budget="latency:provider=cpu")
        ),
        "the same on your own images: pxcompress run --model resnet18 --data path/to/images --ratio 0.5": with_top1(
            0.9
        ),
        "ship 'exported/my run/model.onnx'; predict.py beside it": fine,
    }
    for words, report in steps.items():
        assert next_step(report).startswith(words)
        assert to_table(report).splitlines()[-1].startswith(f"next: {words}")
    assert "larger --ratio may cost" in next_step(with_top1(0.94, weights="pretrained"))
    assert "larger --ratio may cost" not in next_step(fine)
    points = {"input_shape": (2,), "weights": "trained-here"}
    steps = {
        "the same for your own net and its inputs: pxcompress.compress_module": with_top1(0.9, **points),
        "to lose less: a smaller --ratio, more samples": make_report(**points),
        "a smaller --ratio, more samples, or a larger --max-drop": dataclasses.replace(certified(0, 90), **points),
    }
    for words, report in steps.items():
        assert next_step(report).startswith(words)
    missed = dataclasses.replace(own, missed="1.8x faster, 2x was asked for")
    assert to_table(missed).splitlines()[-1] == missed.verdict


@pytest.mark.parametrize(
    ("top1", "speed", "guarantee", "file"),
    [
        (0.895, Speedup(8, 7, 9), None, "model.int8.onnx"),
        (0.88, Speedup(8, 7, 9), None, "model.onnx"),
        (0.895, Speedup(4.05, 4.0, 4.2), None, "model.onnx"),
        (0.895, Speedup(8, 7, 9), certified(0, 3).certificate, "model.onnx"),
    ],
)
def test_the_file_to_ship_is_faster_and_as_good(top1: float, speed: Speedup, guarantee: Any, file: str) -> None:
    rows = [
        make_target(name, "fp32", measurement(right, 3.0, 10), speedup, round(360 * right))
        for name, right, speedup in (
            ("dense.onnx", 0.9, Speedup(1, 1, 1)),
            ("model.onnx", 0.9, Speedup(4, 3.9, 4.1)),
            ("model.int8.onnx", top1, speed),
        )
    ]
    report = with_top1(0.9, weights="pretrained", targets=tuple(rows), certificate=guarantee)
    assert f"exported/run/{file};" in next_step(report)


def test_tables_fit_into_80_columns() -> None:
    """Those of the widest figures that a run may have; prose may be longer, a terminal breaks it."""
    times = Latency(100.0, 0.0804, 0.123, 0.2, 200, (0.08,) * 21)
    names = ("dense.onnx", "model.onnx", "model.fp16.onnx", "model.int8.onnx")
    change = Speedup(1.02, 0.97, 12.06)
    placed = Placement("cuda", "CUDAExecutionProvider", 100, 142, "x", {"CPUExecutionProvider": 42})
    perfect = dataclasses.replace(measurement(1.0, 3.0, 10), onnx_bytes=12_300_000, latency_ms=times)
    rows = [make_target(name, "fp32", perfect, change, 360) for name in names]
    targets = [dataclasses.replace(row, provider=placed) for row in rows]
    report = make_report(targets=tuple(targets))
    lines = to_table(report).splitlines()
    places = [lines.index("", start) for start in (0, 12)]
    assert all(len(line) <= 80 for line in lines[: places[-1]] if not line.startswith("nodes: "))
    compared = to_comparison_table({"a" * 40: report, "b": REPORT}).splitlines()
    assert all(len(line) <= 80 for line in compared[: compared.index("")] if line.startswith("  "))


# The command


RECIPES = [
    Recipe("resnet18", 0.5, scorer="magnitude"),
    Recipe("hf-hub:timm/x", 0.3, data="my data/it's", scorer="magnitude", repair=(), seed=7, skip_corrupt=True),
    Recipe("m", 0.25, checkpoint="w x.pth", input_size=64, scorer="random", budget="macs", round_to=1, min_keep=0.2),
    Recipe("m", 0.25, scorer="random", normalise="max", repair=("batchnorm",), bench=Bench(8, "cpu", 2)),
    Recipe("m", 0.25, scorer="random", guarantee=Guarantee(0.03)),
    Recipe("m", 0.25, scorer="random", class_scores=True),
    Recipe("m", 0.25, scorer="random", guarantee=Guarantee(0.01, 0.9, "disagreement", 3), bench=Bench(2)),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_command_gives_the_recipe_back(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line goes through the real command line, up to the recipe it would run."""
    seen: list[Recipe] = []

    def work(recipe: Recipe, *args: object, **options: object) -> Report:
        seen.append(recipe)
        return REPORT

    monkeypatch.setattr(pipeline, "compress_in_process", work)
    words = shlex.split(format_command(recipe))
    assert words[0] == "pxcompress"
    result = typer.testing.CliRunner().invoke(cli.app, words[1:])
    assert result.exit_code == 0, result.output
    assert seen == [recipe]


def test_command_leaves_defaults_out() -> None:
    assert format_command(Recipe("m", 0.5)) == "pxcompress run --model m --ratio 0.5"


# The terminal


def test_table_golden() -> None:
    assert to_table(REPORT).splitlines() == [
        "                          dense          pruned  ratio",
        "top-1                     90.0%           85.0%  -5.0 points",
        "  95 % interval  86.7% to 92.6%  81.2% to 88.2%  -9.6 to -0.4 points",
        "MACs                       80 M            20 M  0.250 (4x fewer)",
        "parameters                 40 k            10 k  0.250 (4x fewer)",
        "file size                200 kB           50 kB  0.250 (4x smaller)",
        "latency p50               12 ms            3 ms  0.250 (4x lower)",
        "latency p90               18 ms         4.50 ms  0.250 (4x lower)",
        "throughput               83.3/s           333/s  4.000 (4x more)",
        "",
        "Some CPU, CPUExecutionProvider, 2 CPU threads, batch 1, fp32, 400 test samples, input 3x32x32, "
        "weights trained here",
        "0.75 of the MACs removed: 0.44 of the channels and heads, 0.75 of the milliseconds",
        "2 of 2 classes lost answers, 0 gained some; most: 'cat', 180 -> 170 of 200 samples right",
        "note: embedded data: a demonstration",
        REPORT.verdict,
        "next: to lose less: a smaller --ratio, more images, or more steps, --repair closed-form "
        "--repair finetune:steps=3000",
    ]


@pytest.mark.parametrize(
    ("budget", "p50", "line"),
    [
        (
            ("channels", "units", 40.0, 20.0, 20.0),
            3.0,
            "0.44 of the channels and heads removed: 0.75 of the MACs, 0.75 of",
        ),
        (("latency", "ms", 4.0, 2.0, 2.0), 3.0, "0.75 of the milliseconds removed: 0.75 of the MACs, 0.44 of the"),
        (
            ("params", "parameters", 4.0, 1.0, 2.0),
            15.0,
            "0.75 of the parameters removed: 0.75 of the MACs, 0.44 of the",
        ),
        (
            ("macs", "MACs", 80e6, 20e6, 40e6),
            15.0,
            "0.75 of the MACs removed: 0.44 of the channels and heads, 0.25 more",
        ),
    ],
)
def test_the_table_says_what_a_ratio_came_to_in_other_units(budget: tuple[Any, ...], p50: float, line: str) -> None:
    assert f"\n{line} " in to_table(make_report(p50=p50, plan=PlanCosts(*budget)))


def test_table_names_the_path_of_the_artefact_and_is_ascii() -> None:
    assert to_table(REPORT).splitlines()[-2].endswith(": exported/run/model.onnx")
    assert to_table(REPORT).isascii()


def test_table_names_the_gpu_only_where_it_ran() -> None:
    on_gpu = make_report(provider=Placement("auto", "CUDAExecutionProvider", 17, 17))
    told = Placement("cuda", "CUDAExecutionProvider", 17, 17, options={"use_tf32": "0", "enable_cuda_graph": "1"})
    assert "CUDAExecutionProvider (use_tf32 0, enable_cuda_graph 1)" in describe_conditions(make_report(provider=told))
    assert "Some GPU, CUDAExecutionProvider" in to_table(on_gpu)
    assert "Some GPU" not in to_table(REPORT)


def bench_row(path: str, p50: float, change: Speedup | None, **placed: Any) -> BenchRow:
    times = Latency(p50, p50, p50, p50, 200, (p50,) * 21)
    placement = Placement("cuda", "CUDAExecutionProvider", **{"nodes_on_provider": 6, "nodes_total": 6, **placed})
    shape = (1, 3, 8, 8)
    return BenchRow(
        path,
        shape,
        1,
        times,
        1000 / p50,
        10**6,
        "fp32",
        2,
        "not pinned, of 4 cores",
        placement,
        25.0,
        0.031,
        change,
    )


def test_bench_table_compares_with_the_first_line() -> None:
    rows = [
        bench_row("dense.onnx", 10.0, None),
        bench_row("model.onnx", 5.0, Speedup(2.0, 1.9, 2.1)),
        bench_row("other.onnx", 9.8, Speedup(1.02, 0.97, 1.06)),
    ]
    lines = format_bench(rows).splitlines()
    assert max(map(len, lines[:13])) <= 80
    assert lines[2].split() == ["model.onnx", "1", *4 * ["5", "ms"], "200/s"]
    assert lines[6].endswith("reference")
    assert lines[7].endswith("25 ms  2.00x (1.90 to 2.10)")
    assert lines[8].endswith("no difference shown, 1.02x (0.97 to 1.06)")
    assert lines[10] == "dense.onnx: fp32, 6 nodes on CUDA"
    assert lines[14:16] == [
        "200 runs of each file, in turns; CPU threads: 2, not pinned, of 4 cores; random inputs",
        "noise: half of the calls are within 3.1% of p50",
    ]


def test_bench_table_says_that_the_machine_is_busy() -> None:
    row = dataclasses.replace(bench_row("dense.onnx", 10.0, None), noise=0.3)
    assert "within 30.0% of p50; THE MACHINE IS BUSY" in format_bench([row])


def slow_on_average(mean: float) -> Latency:
    """Of calls most of which take 3 ms."""
    return dataclasses.replace(REPORT.pruned.latency_ms, mean=mean)


def test_what_p50_and_mean_say_is_no_speed_where_they_disagree() -> None:
    for mean, agree in ((14.0, False), (13.0, True)):  # the dense model's is 13.2
        pruned = dataclasses.replace(REPORT.pruned, latency_ms=slow_on_average(mean))
        comparison = compare(REPORT.dense, pruned, Speedup(4.0, 3.9, 4.1))
        report = make_report(pruned=pruned, verdict=verdict(comparison))
        assert comparison.disagrees is not agree
        assert ("4x faster" in report.verdict) is agree
        assert ("SPEED UNCLEAR at batch 1: 4.00x by p50, 0.94x by the mean" in report.verdict) is not agree
        assert ("4x faster" in write_headline(report)) is agree
    slower = compare(REPORT.pruned, REPORT.dense, Speedup(0.25, 0.2, 0.3))
    assert "NOT FASTER" in verdict(slower)
    held_up = dataclasses.replace(REPORT.pruned, latency_ms=slow_on_average(20.0))
    assert "SPEED UNCLEAR" in verdict(dataclasses.replace(slower, dense=held_up))


def test_bench_says_where_p50_and_mean_disagree() -> None:
    first, second = bench_row("dense.onnx", 10.0, None), bench_row("model.onnx", 5.0, Speedup(2.0, 1.9, 2.1))
    assert "SPEED UNCLEAR" not in format_bench([first, second])
    held_up = dataclasses.replace(second, latency_ms=slow_on_average(20.0))
    assert "SPEED UNCLEAR: model.onnx at batch 1 is 2.00x as fast by p50, but 0.50x" in format_bench([first, held_up])


def test_bench_table_names_the_nodes_that_run_elsewhere() -> None:
    reason = "2 of 6 nodes run elsewhere: 2 Shape on CPUExecutionProvider"
    placed = {"nodes_on_provider": 4, "elsewhere": {"CPUExecutionProvider": 2}, "fallback_reason": reason}
    lines = format_bench([bench_row("dense.onnx", 10.0, None, **placed)]).splitlines()
    assert "dense.onnx: fp32, 4 of 6 on CUDA, 2 on CPU" in lines
    assert lines[-1] == f"note: {reason}"


# The page


def test_page_loads_nothing(parsed: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(parsed.tags)
    names = {name for _, attributes in parsed.elements for name in attributes}
    assert not {name for name in names if name in ("src", "href", "xlink:href", "style") or name.startswith("on")}
    text = to_html(REPORT)
    assert not [part for part in ("http://", "https://", "url(", "@import") if part in text]
    policies = [a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_page_is_ascii_and_in_one_declared_language(parsed: Page) -> None:
    assert to_html(REPORT).startswith('<!DOCTYPE html>\n<html lang="en">')
    assert to_html(REPORT).isascii()
    assert parsed.tags.count("h1") == parsed.tags.count("title") - parsed.tags.count("svg") + _swatches(parsed) == 1


def _swatches(parsed: Page) -> int:
    return sum(tag == "svg" and attributes.get("viewbox") == "0 0 12 12" for tag, attributes in parsed.elements)


def test_page_escapes_every_text_of_the_report() -> None:
    def soiled(value: Any) -> Any:
        if isinstance(value, Recipe):  # checks what it holds
            return value.but(model=NASTY, data=NASTY, checkpoint=NASTY, only=(NASTY,))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(
                value, **{f.name: soiled(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        if isinstance(value, dict):
            return {f"{NASTY}{key}": soiled(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(soiled(item) for item in value)
        return f"{value}{NASTY}" if isinstance(value, str) else value

    report = soiled(make_report(data=dataclasses.replace(REPORT.data, skipped=("a.png",))))
    page, clean = Page(to_html(report)), Page(to_html(REPORT))
    assert not [part for part in ("<b>x", "<img", "</script") if part in to_html(report)]
    assert set(page.tags) == set(clean.tags)
    assert page.text.count("<b>x</b>") > 150
    for text in (
        report.groups[5].name,
        report.data.classes[1],
        report.fixed[0].reason,
        report.notes[0].text,
        report.folder,
    ):
        assert " ".join(text.split()) in page.text


def test_page_has_all_that_is_needed_to_check_it(parsed: Page) -> None:
    for group in REPORT.groups:
        assert f"{group.name}{group.units} \N{RIGHTWARDS ARROW} {group.kept}" in parsed.text.replace(
            f"{group.name}: {group.kept} of {group.units} {group.kind}s kept", ""
        )
    for text in (
        "4\N{MULTIPLICATION SIGN} faster, 4\N{MULTIPLICATION SIGN} smaller, "
        "5.0 points top\N{NON-BREAKING HYPHEN}1 lost",
        "4.00\N{MULTIPLICATION SIGN} (3.90 to 4.10) the speed",
        "top-1 \N{MINUS SIGN}5.0 (\N{MINUS SIGN}9.6 to \N{MINUS SIGN}0.4) points",
        "it is the classifier",
        "stem (8), stem2 (9)",
        "2.50e-06",
        "17 of 17",
        "bench.batch_size",
        "250 ms",
        "2 GB",
        "pxcompress run --model resnet18 --ratio 0.5 --score magnitude",
        "exported/run/model.onnx",
        "embedded data: a demonstration",
    ):
        assert " ".join(text.split()) in parsed.text, text


def test_every_drawing_is_named_or_decoration(parsed: Page) -> None:
    named = sum(tag == "svg" and attributes.get("role") == "img" for tag, attributes in parsed.elements)
    assert named + _swatches(parsed) == parsed.tags.count("svg")
    assert parsed.tags.count("title") == named + 1
    assert parsed.tags.count("caption") == parsed.tags.count("table")
    assert all(a.get("scope") in ("row", "col") for tag, a in parsed.elements if tag == "th")


def test_bars_are_to_scale_and_inside_their_drawing(parsed: Page) -> None:
    bars = [float(a["width"] or 0) for tag, a in parsed.elements if tag == "rect" and a["class"] in ("dense", "pruned")]
    assert all(0 <= width <= 100 for width in bars)
    assert [width for width in bars if width != 12][:8] == [90, 85, 100, 25, 100, 25, 100, 25]


def test_page_of_a_bare_report_stands() -> None:
    report = make_report(stages=(), groups=(), fixed=(), notes=())
    assert "Every layer that was found could be narrowed." in Page(to_html(report)).text


def test_page_of_a_model_that_is_not_faster_says_so_in_sentence_case() -> None:
    page = Page(to_html(make_report(0.7, 0.9, 15.0)))
    assert "Slower, 4\N{MULTIPLICATION SIGN} smaller" in page.text
    assert "verdict caution" in [attributes.get("class") for _, attributes in page.elements]
    assert "verdict caution" not in to_html(REPORT)


def test_a_failed_parity_is_not_hidden() -> None:
    report = make_report(parity=Parity(4, 0.5, 0.25, False))
    assert "passedNO" in Page(to_html(report)).text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_page_renders_in_a_browser_without_a_complaint(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(to_html(REPORT))
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = f"--disable-component-update --disable-sync --enable-logging=stderr --user-data-dir={tmp_path / 'profile'}"
    run = ["chromium", *options.split(), *more.split(), "--dump-dom", file.as_uri()]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True)
    assert "4\N{MULTIPLICATION SIGN} faster" in done.stdout
    assert done.stdout.count("<li>") == len(REPORT.groups) + len(REPORT.notes)
    assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize(("scorer", "what"), [("lrp:target=label", "relevance"), ("lrp-residual", "scores")])
def test_a_share_of_relevance_says_what_ratio_it_came_to(scorer: str, what: str) -> None:
    recipe = Recipe("resnet18", relevance_share=0.05, scorer=scorer)
    report = make_report(recipe=recipe)
    line = f"what holds at most 5.0% of every layer's {what} to remove: that came to ratio 0.750 of the MACs"
    assert line in to_table(report).splitlines()
    assert line in Page(to_html(report)).text
    assert "came to" not in to_table(REPORT)
