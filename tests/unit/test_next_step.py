"""What a report advises to do next."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from reports import REPORT, certified, make_report, make_target, measurement, with_top1

from pxcompress.proof import (
    Speedup,
    Warning,
)
from pxcompress.report import to_table
from pxcompress.report.next_step import next_step


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
