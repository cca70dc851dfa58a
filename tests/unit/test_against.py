"""`run --against`: what is measured beside the pruned model, and which of all is to be shipped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from command import Px, check_sums, image_folder, one_line
from models import CLASSES
from reports import latency, make_report

from pxcompress.proof import Contender, ContenderKind, Estimate, Speedup
from pxcompress.recipe import Recipe
from pxcompress.report.against import describe_choice, is_best_at_its_speed, list_contenders
from pxcompress.report.build import from_json
from pxcompress.report.html import to_html
from pxcompress.report.record import Report
from pxcompress.run_folder.smaller_images import resize_model, scale_side


def contender(name: str, kind: ContenderKind, p50: float, top1: float, beside: tuple[float, float]) -> Contender:
    """Measured in `p50` milliseconds; `beside` is the interval of what it has more than the pruned one."""
    change = Estimate(sum(beside) / 2, *beside)
    return Contender(
        name,
        kind,
        (3, 32, 32),
        1000,
        2000,
        3000,
        Estimate(top1, top1 - 0.01, top1 + 0.01),
        400,
        latency(p50),
        Speedup(4 / p50, 3.9 / p50, 4.1 / p50),
        change,
        change,
    )


DENSE = contender("dense", "dense", 4.0, 0.95, (0.0, 0.04))
PRUNED = contender("pruned", "pruned", 2.0, 0.93, (0.0, 0.0))
BETTER = contender("resnet18", "given", 1.9, 0.945, (0.005, 0.025))
ALIKE = contender("dense at 28x28 pixels", "smaller-images", 2.05, 0.935, (-0.005, 0.015))
SLOW = contender("dense, int8", "dense-int8", 3.0, 0.949, (0.01, 0.03))


def report_with(*contenders: Contender, **goal: float) -> Report:
    recipe = Recipe("resnet50", **(goal or {"ratio": 0.5}))  # type: ignore[arg-type]
    return dataclasses.replace(make_report(), recipe=recipe, contenders=contenders)


@pytest.mark.parametrize(
    ("goal", "others", "words"),
    [
        ({}, [BETTER, SLOW], "ship resnet18, NOT THE PRUNED MODEL (top-1 94.5%, 93.5% to 95.5%; 1.90 ms; +1.5"),
        ({}, [BETTER, SLOW], "(+0.5 to +2.5) points against the pruned model)"),
        ({}, [ALIKE, SLOW], "against the pruned model, no difference shown)"),
        ({}, [SLOW], "2 ms a call (what the pruned model takes) ship pruned ("),
        ({}, [SLOW], "nothing else that was measured is as fast"),
        ({"speedup": 1.3}, [SLOW], "3.08 ms a call (1.3x faster than dense) ship dense, int8, NOT THE PRUNED"),
        ({"latency_ms": 5.0}, [SLOW], "at most 5 ms a call ship dense, NOT THE PRUNED MODEL"),
        ({"latency_ms": 1.0}, [SLOW], "Nothing takes at most 1 ms a call; the fastest is pruned (top-1 93.0%"),
    ],
)
def test_what_is_to_be_shipped(goal: dict[str, float], others: list[Contender], words: str) -> None:
    assert words in describe_choice(report_with(DENSE, PRUNED, *others, **goal))


def test_without_rivals_nothing_is_said() -> None:
    assert describe_choice(report_with()) == ""
    assert list_contenders(report_with()) == []


def test_stars_are_for_what_no_other_beats_in_both() -> None:
    report = report_with(DENSE, PRUNED, BETTER, ALIKE, SLOW)
    best = {each.name for each in report.contenders if is_best_at_its_speed(each, report)}
    assert best == {"dense", "dense, int8", "resnet18"}
    names = [row[0] for row in list_contenders(report)]
    assert names == ["resnet18 *", "pruned", "dense at 28x28 pixels", "dense, int8 *", "dense *"]


def test_the_page_shows_them_all_and_may_show_pictures() -> None:
    page = to_html(report_with(DENSE, PRUNED, BETTER))
    assert "img-src data:" in page
    assert 'src="data:image/svg+xml' in page
    assert "ship resnet18, NOT THE PRUNED MODEL" in page
    assert page.count("Is pruning worth it?") == 1
    assert "Is pruning worth it?" not in to_html(report_with())


def test_sides_that_strides_divide() -> None:
    assert [scale_side(side, 0.86) for side in (224, 128, 32)] == [192, 112, 28]
    assert [scale_side(side, 0.75) for side in (224, 128, 32)] == [176, 96, 24]


def test_position_embeddings_are_resampled_and_the_model_is_left_as_it_was() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=1, num_classes=4).eval()
    smaller = resize_model(model, (48, 48))
    with torch.no_grad():
        assert smaller(torch.randn(1, 3, 48, 48)).shape == model(torch.randn(1, 3, 64, 64)).shape == (1, 4)


@pytest.mark.slow
def test_a_run_with_a_rival_measures_it_all(px: Px, tmp_path: Path) -> None:
    data = image_folder(tmp_path / "images", {"train": 24, "val": 30}, CLASSES, 16)
    model = ["--model", "models:FlattenCNN", "--data", data, "--input-size", 16, "--ratio", 0.4, "--budget", "channels"]
    options = [*model, "--score", "magnitude", "--repair", "fold", "--round-to", 1, "--quiet"]
    first = px("run", *options, "--out", tmp_path / "first")
    assert first.code == 0, first.err
    assert "no file 'nothing.onnx'" in one_line(px("run", *options, "--against", "nothing.onnx"))
    assert "timm has no model 'resnet'" in one_line(px("run", *options, "--against", "resnet"))
    rival = tmp_path / "first" / "model.onnx"
    outcome = px("run", *options, "--against", rival, "--against", "models:AnyClasses", "--out", tmp_path / "second")
    assert outcome.code == 0, outcome.err
    report = from_json((tmp_path / "second" / "report.json").read_text())
    kinds = [each.kind for each in report.contenders]
    assert kinds[:2] == ["dense", "pruned"]
    assert kinds.count("given") == 2
    assert {"dense-int8", "pruned-int8"} <= set(kinds)
    given_file = next(each for each in report.contenders if each.name == "model.onnx")
    assert given_file.change == report.contenders[1].change, "the pruned model of the same run, once more"
    assert "Is pruning worth it?" in (tmp_path / "second" / "report.html").read_text()
    assert describe_choice(report) in outcome.out
    assert str(rival) in report.recipe.against
    assert any((tmp_path / "second" / "against").iterdir())
    check_sums(tmp_path / "second")
