"""The page of a run: whole, escaped, drawn to scale."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from reports import NASTY, REPORT, Page, make_report, with_classes

from pxcompress.proof import (
    LayerCost,
    OperatorTime,
    Parity,
)
from pxcompress.recipe import Recipe
from pxcompress.report import from_json, to_html, to_json, to_table


@pytest.fixture(scope="module")
def parsed() -> Page:
    return Page(to_html(REPORT))


def test_without_class_scores_nothing_is_said_of_classes(parsed: Page) -> None:
    assert "What the removed units carried for each class" not in parsed.text
    assert "class relevance" not in to_table(REPORT)
    assert "What the removed units carried for each class" not in to_html(with_classes(None))


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
