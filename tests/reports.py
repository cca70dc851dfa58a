"""Reports to show, with figures that follow from each other, and pages as tests read them."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from typing import Any

import numpy as np
import torch

from pxcompress.certify.parts import Part
from pxcompress.certify.path import Candidate, RiskLimit, certify
from pxcompress.certify.record import CertificateRecord
from pxcompress.deploy.comparison import Comparison, ratios, verdict
from pxcompress.deploy.predictions import Predictions
from pxcompress.proof import (
    ClassChange,
    ClassShare,
    DataSummary,
    Environment,
    Estimate,
    GroupWidth,
    Latency,
    LayerCost,
    Measurement,
    Parity,
    Placement,
    Speedup,
    StageTime,
    Target,
    Warning,
)
from pxcompress.recipe import Recipe
from pxcompress.report.record import PlanCosts, Report
from pxcompress.report.summary import (
    wilson_interval,
)
from pxcompress.tasks.classification import Classification
from pxcompress.types import FixedLayer

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
            FixedLayer("fc", 2, "it is the classifier"),
            FixedLayer("stem", 8, "it is a stem"),
            FixedLayer("stem2", 9, "it is a stem"),
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


def with_classes(*removed: float | None) -> Report:
    """REPORT with a share for each of so many classes; None stands for one without samples."""
    rows = [ClassShare(f"kind {n}", 0 if share is None else 9 + n, share) for n, share in enumerate(removed)]
    return make_report(class_shares=tuple(rows))


def with_top1(top1: float, **changes: Any) -> Report:
    """REPORT with another accuracy of the slim model."""
    pruned = dataclasses.replace(REPORT.pruned, quality=measurement(top1, 3.0, 10).quality)
    return make_report(pruned=pruned, ratios=ratios(REPORT.dense, pruned), **changes)
