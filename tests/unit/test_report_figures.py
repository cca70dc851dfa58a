"""Figures of a report: intervals, digits, changes, the headline, and the command that makes it again."""

from __future__ import annotations

import math
import shlex

import numpy as np
import pytest
import typer.testing
from hypothesis import given
from hypothesis import strategies as st
from reports import REPORT, make_report, paired

from pxcompress import cli, pipeline
from pxcompress.recipe import Bench, Guarantee, Recipe
from pxcompress.report.record import Report
from pxcompress.report.summary import (
    describe_change,
    format_bytes,
    format_command,
    format_count,
    format_milliseconds,
    wilson_interval,
    write_headline,
)


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
    intervals = {tuple(cells): paired(*cells) for cells in drawn}
    held = [intervals[tuple(cells)].low <= -0.01 <= intervals[tuple(cells)].high for cells in drawn]
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
